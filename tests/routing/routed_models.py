"""Small routed models with random inventories, and what one task of them is by hand."""

import torch

from linlora import routing
from linlora.testing import tiny_base

TARGETS = {
    "bert": ["query", "value", "dense"],
    "t5": ["q", "v", "wi"],
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


def fill(model, seed=1, scale=0.2):
    """Random skills and logits, of a size that shows in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "logits" in name or "table" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(scale * noise if "lora_" in name else noise)
    return model


def routed_model(architecture="bert", n_tasks=4, dtype=torch.float64, scale=0.2, **options):
    """A routed model of four heads and three skills of rank 2, in eval mode, in float64 unless told otherwise."""
    base = tiny_base(architecture).to(dtype)
    options = {"n_skills": 3, "n_heads": 4, "rank": 2, "target_modules": TARGETS[architecture], **options}
    return fill(routing.route(base, n_tasks, **options), scale=scale).eval()


def mixed_by_hand(A, B, w):
    """A_z (K, r) and B_z (r, N) of weights w (Q, S), in loops over heads and skills."""
    heads, skills = range(A.shape[0]), range(A.shape[1])
    A_z = torch.cat([sum(w[q, s] * A[q, s] for s in skills) for q in heads], 0)
    B_z = torch.cat([sum(w[q, s] * B[q, s] for s in skills) for q in heads], 1)
    return A_z, B_z


def poly_weights(layer, task):
    """σ(Z_t) / Σ_s σ(Z_t), (Q, S)."""
    p = 1 / (1 + torch.exp(-layer.selector.logits[task].view(layer.sizes.n_heads, layer.sizes.n_skills)))
    return p / p.sum(-1, keepdim=True)


def folded(routed, delta_weight, run):
    """run() with ΔW (N, K) of delta_weight(layer) added to every base weight, and no adapter."""
    kept = [layer.weight.data for layer in routed.routed_layers]
    try:
        for layer in routed.routed_layers:
            delta = delta_weight(layer).detach()
            conv = type(layer.base_layer).__name__ == "Conv1D"
            layer.weight.data = layer.weight.data + (delta.t() if conv else delta)
        with routed.disable_adapter(), torch.no_grad():
            return run()
    finally:
        for layer, weight in zip(routed.routed_layers, kept, strict=True):
            layer.weight.data = weight


def task_alone(routed, task, **inputs):
    """The main output of a plain Poly model for rows of one task, by W + s (A_z B_z)ᵀ in every layer."""

    def delta_weight(layer):
        A_z, B_z = mixed_by_hand(layer.lora_A, layer.lora_B, poly_weights(layer, task))
        return layer.sizes.scaling * (A_z @ B_z).t()

    return folded(routed, delta_weight, lambda: routed(**inputs)[0])


def rows_of(batch, rows):
    return {name: x[rows] for name, x in batch.items()}
