"""The training that is run in one process, under DDP and under FSDP2: same batches, same losses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import linlora
from linlora.testing import tiny_batch, tiny_model

ROWS, STEPS = 4, 4
CASES = {
    "-".join(case): case for case in itertools.product(("bert", "llama"), ("layer", "model"), ("zero", "trained"))
}  # architecture, scope, B0


def linearized(architecture: str, scope: str, start: str) -> PeftModel:
    model = tiny_model(architecture, trained=start == "trained")
    linlora.linearize(model, scope=scope)
    return model


def batches(architecture: str, steps: range = range(STEPS)) -> Iterator[dict[str, Tensor]]:
    for step in steps:
        batch = tiny_batch(architecture, ROWS, seed=step)
        tokens = batch["input_ids"]
        yield {**batch, "labels": tokens[:, 0] % 3 if architecture == "bert" else tokens}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Tensor:
    loss = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def trainer_of(scope: str, directory: str, rows_per_process: int) -> Trainer:
    """A Trainer of four steps on 16 rows each, over all processes; it saves every two."""
    tokens = np.random.default_rng(0).integers(1, 64, (48, 7))
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": (tokens[:, 0] % 3).tolist()})
    arguments = TrainingArguments(
        output_dir=directory, max_steps=STEPS, per_device_train_batch_size=rows_per_process, learning_rate=1e-2,
        save_steps=2, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
        lr_scheduler_type="constant", ddp_backend="gloo" if torch.distributed.is_initialized() else None,
        average_tokens_across_devices=False,  # else stock BERT's loss, a mean already, is logged times the processes
    )  # fmt: skip
    model = linearized("bert", scope, "trained")
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # the Trainer trains with it, and two processes draw other masks than one
            module.p = 0.0
    return InOrder(model, arguments, train_dataset=rows)


class InOrder(Trainer):
    """Two processes shuffle otherwise than one."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def logged_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
