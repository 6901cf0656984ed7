"""Whole models for the training-step cases: transformers with random weights, LoRA on every linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from linlora.testing import randomize

from .cases import Case
from .data import SCALING
from .job import switched
from .shapes import MODELS, ModelSpec

_LABELS, _VOCABULARY, _PATCH = 10, 1024, 8


class ModelJob:
    """A training step: forward, loss, backward, AdamW on the adapter. `prepare` makes a provider's model of the PEFT
    model. The loss is the cross entropy of the logits the model returns, the same for every provider.

    Without an optimizer (`train=False`) it is the floor: forward and backward through the frozen model. `exact` is the
    same step, of the same rounded parameters, in float64.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        prepare: Callable[[Any], nn.Module],
        backend: str | None = None,
        train: bool = True,
        exact: bool = False,
    ) -> None:
        self.backend = backend
        spec = MODELS[case.model]
        model: Any = _peft_model(spec, case.rank) if train else _frozen_model(spec)
        if case.form == "pair" and train:
            randomize(model, seed=2)
        model = prepare(model)
        if train:
            _move(model, case.form)
        self.names = ("A", "B") if case.form == "pair" else ("B",)  # at B0 = 0 the down projections have no gradient
        self.model = model.to(device, getattr(torch, case.dtype)).train()
        self.batch = _batch(spec, device, getattr(torch, case.dtype))
        if exact:
            self.model = self.model.double()
            self.batch = {name: t.double() if t.is_floating_point() else t for name, t in self.batch.items()}
        self.labels = self.batch.pop("labels")
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5) if train else None

    def context(self) -> ExitStack:
        return switched(self.backend)

    def step(self) -> Tensor:
        loss = self._loss()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss

    def results(self) -> dict[str, Tensor]:
        """The loss and the gradients of the trained factors, all layers in one vector."""
        with self.context():
            loss = self._loss()
            loss.backward()
        results = {"loss": loss.detach()}
        for factor in self.names:
            found = [
                parameter.grad.flatten()
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None and (f".lora_{factor}." in name or f".lora_d{factor}." in name)
            ]
            if found:
                results[f"grad_{factor}"] = torch.cat(found)
        self.model.zero_grad(set_to_none=True)
        return results

    def resident(self) -> Iterable[Tensor]:
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        moments = [value for entry in state for value in entry.values() if isinstance(value, Tensor)]
        return [*chain(self.model.parameters(), self.model.buffers()), *moments, *self.batch.values(), self.labels]

    def _loss(self) -> Tensor:
        outputs = self.model(**self.batch)
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
        logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(logits, self.labels.flatten())


def _move(model: nn.Module, form: str) -> None:
    """Away from the linearization point, by the same step in every provider's own parameters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (form == "pair" or ".lora_B." in name):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def _peft_model(spec: ModelSpec, rank: int) -> PeftModel:
    config = LoraConfig(r=rank, lora_alpha=round(SCALING * rank), target_modules="all-linear", lora_dropout=0.0)
    return get_peft_model(_base_model(spec), config, autocast_adapter_dtype=False)


def _frozen_model(spec: ModelSpec) -> nn.Module:
    model = _base_model(spec)
    model.requires_grad_(False)
    model.enable_input_require_grads()  # so that backward runs through every layer, as it does under an adapter
    return model


def _base_model(spec: ModelSpec) -> Any:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
    }
    if spec.architecture == "llama":
        size |= {"num_key_value_heads": max(spec.heads // 4, 1), "intermediate_size": 7 * spec.hidden // 2}
        config = transformers.LlamaConfig(vocab_size=_VOCABULARY, use_cache=False, **size)
        return transformers.LlamaForCausalLM(config)
    size |= {
        "intermediate_size": 4 * spec.hidden,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": _LABELS,
    }
    if spec.architecture == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=_VOCABULARY, **size))
    side = round((spec.tokens - 1) ** 0.5)
    size |= {"image_size": side * _PATCH, "patch_size": _PATCH}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**size))


def _batch(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(_LABELS, (spec.batch,), generator=generator)
    if spec.architecture != "vit":
        tokens = torch.randint(1, _VOCABULARY, (spec.batch, spec.tokens), generator=generator)
        if spec.architecture == "llama":  # one label a token
            labels = torch.randint(_VOCABULARY, (spec.batch, spec.tokens), generator=generator)
        return {"input_ids": tokens.to(device), "labels": labels.to(device)}
    side = round((spec.tokens - 1) ** 0.5) * _PATCH
    pixels = torch.randn(spec.batch, 3, side, side, generator=generator)
    return {"pixel_values": pixels.to(device, dtype), "labels": labels.to(device)}
