"""A model linearized as a whole trains, checkpoints, casts and generates as any model does."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import linlora
from linlora.stream import DualTensor, Stream, TangentError
from linlora.testing import randomize, tiny_base, tiny_batch, tiny_model


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 64, (48, 7))
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": (tokens[:, 0] % 3).tolist()})


def batches(dataset, size=16):
    rows = dataset.with_format("torch")
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def linearized(architecture="bert", trained=True, displaced=0.1, **lora_options):
    model = tiny_model(architecture, trained, **lora_options)
    linlora.linearize(model, scope="model")
    randomize(model, 5, ("lora_dA", "lora_dB") if trained else ("lora_B",), displaced)
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_training_follows_torch_func_step_by_step(dataset):
    model, oracle = linearized(displaced=0.0).double(), tiny_model("bert", True).double()
    point = {name: p.detach() for name, p in oracle.named_parameters() if "lora_" in name}
    delta = {name: torch.zeros_like(p).requires_grad_() for name, p in point.items()}
    ours = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    theirs = torch.optim.SGD(delta.values(), lr=0.5)
    losses = []
    for batch in batches(dataset) * 2:
        loss = model(**batch).loss
        ours.zero_grad()
        loss.backward()
        ours.step()
        with sdpa_kernel(SDPBackend.MATH):
            f, tangent = torch.func.jvp(
                lambda p, x=batch["input_ids"]: torch.func.functional_call(oracle, p, (x,)).logits, (point,), (delta,)
            )
        expected = cross_entropy(f + tangent, batch["labels"])
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        losses.append(loss.item())
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3)


def test_hf_trainer_trains_evaluates_saves_and_resumes(dataset, tmp_path):
    def trainer(steps):
        model = tiny_model("bert", trained=True)
        linlora.linearize(model, scope="model")
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2,
            learning_rate=1e-2, save_steps=3, logging_steps=1, report_to=[], disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), seed=0, lr_scheduler_type="constant", eval_strategy="steps",
            eval_steps=3,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset)

    def losses(run, name="loss"):
        return [entry[name] for entry in run.state.log_history if name in entry]

    whole = trainer(6)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    assert len(losses(whole, "eval_loss")) == 2
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    np.testing.assert_allclose(losses(resumed)[-3:], losses(whole)[-3:], rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(dataset):
    model, batch = linearized(), batches(dataset)[0]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**batch).loss.backward()
    assert expected.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_reentrant_checkpointing_is_refused_with_the_remedy(dataset):
    model = linearized()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    with pytest.raises(TangentError, match="use_reentrant=False"):
        model(**batches(dataset)[0])


def test_train_mode_dropout_runs_in_both_streams(dataset):
    model = linearized(lora_dropout=0.2)
    model.train()
    losses = {model(**batches(dataset)[0]).loss.item() for _ in range(3)}
    assert len(losses) == 3
    torch.manual_seed(1)
    loss = model(**batches(dataset)[0]).loss
    loss.backward()
    torch.manual_seed(1)
    assert model(**batches(dataset)[0]).loss == loss


def test_autocast_keeps_parameters_and_gradients_in_fp32(dataset):
    model, batch = linearized(), batches(dataset)[0]
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model).values())
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["bert", "llama", "flan_t5"])
def test_half_precision_models_stay_close_to_float32(architecture, dtype):
    errors = []
    for model in (tiny_model(architecture, True), linearized(architecture)):
        expected = model(**tiny_batch(architecture))[0]
        actual = model.to(dtype)(**tiny_batch(architecture))[0]
        assert actual.dtype == dtype
        errors.append(linlora.testing.relative_error(actual, expected))
    plain, ours = errors
    assert ours < 4.0 * plain  # J δ, as large as f here, has rounded derivatives besides


def test_evaluation_needs_no_graph(dataset):
    model, batch = linearized(), batches(dataset)[0]
    expected = model(**batch).loss
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(**batch).loss, expected.detach())


@pytest.mark.parametrize("use_cache", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "t5"])
def test_generate_follows_the_linearized_logits(architecture, use_cache):
    model = linearized(architecture)
    tokens = tiny_batch(architecture)["input_ids"]
    generated = model.generate(
        input_ids=tokens, max_new_tokens=4, use_cache=use_cache, do_sample=False, pad_token_id=0, eos_token_id=63
    )
    is_decoder = architecture != "t5"
    row = tokens if is_decoder else torch.zeros(len(tokens), 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(4):
            inputs = {"input_ids": row} if is_decoder else {"input_ids": tokens, "decoder_input_ids": row}
            row = torch.cat([row, model(**inputs)[0][:, -1:].argmax(-1)], 1)
    length = generated.shape[1]
    ended = (row[:, :length] == 63).cumsum(1) > 0  # generate pads what follows the end
    torch.testing.assert_close(generated[~ended], row[:, :length][~ended])


@pytest.mark.parametrize("prompt", ["with a graph", "copied"])
def test_a_prompt_is_continued_from_its_cache(prompt):
    model, tokens = linearized("llama").double(), tiny_batch("llama")["input_ids"]
    with torch.set_grad_enabled(prompt == "with a graph"):
        cache = model(input_ids=tokens[:, :5], use_cache=True).past_key_values
    with torch.no_grad():
        cache = cache if prompt == "with a graph" else copy.deepcopy(cache)
        actual = model(input_ids=tokens[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(actual, model(input_ids=tokens).logits[:, 5:])


def test_a_static_cache_generates_what_the_dynamic_one_does():
    model, options = linearized("llama"), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**tiny_batch("llama"), **options)
    actual = model.generate(**tiny_batch("llama"), **options, cache_implementation="static")
    torch.testing.assert_close(actual, expected)


class Filled(TorchDispatchMode):
    """The sizes of the tensors that are filled with zeros inside."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::zeros", "aten::zeros_like", "aten::new_zeros"):
            self.sizes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "routed"])
def test_backward_fills_no_zeros_for_tangents(architecture):
    kind = "bert" if architecture == "routed" else architecture
    if architecture == "routed":
        model = linlora.routing.route(tiny_base(kind), 3, n_skills=2, rank=2, target_modules=["query", "value"])
    else:
        model = tiny_model(kind, trained=True)
    linlora.linearize(model, scope="model")
    inputs = {"task_ids": [0, 1, 2]} if architecture == "routed" else {}
    output = model(**tiny_batch(kind), **inputs)[0]
    with Filled() as filled:
        output.sum().backward()
    assert [size for size in filled.sizes if not {7, 21}.isdisjoint(size)] == []  # of activations: 3 texts of 7 tokens


def test_a_gradient_that_ends_leaves_none_before_it():
    class Ends(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, g):
            return None

    x = torch.randn(2, 4, requires_grad=True)
    weight, stream = torch.ones(4, 4), Stream()
    for function in (
        functional.relu,
        lambda x: functional.silu(x) * (x + 1.0),
        lambda x: functional.layer_norm(x, (4,)),
        lambda x: functional.rms_norm(x, (4,)),
        lambda x: functional.linear(x, weight),
    ):
        y = function(DualTensor(x, torch.ones_like(x), stream)).primal
        assert torch.autograd.grad(Ends.apply(y).sum(), x, allow_unused=True) == (None,)
