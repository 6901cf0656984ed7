"""One fine-tuning: a PEFT adapter on the backbone, of one family, trained for one task. Ordinary PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import linlora
from linlora.quickstart.backbone import features
from linlora.quickstart.data import Split
from linlora.quickstart.settings import Family, Settings


def adapted(backbone: nn.Module, settings: Settings, seed: int) -> PeftModel:
    """A copy of the backbone with a new LoRA adapter on every linear layer.

    Equal seeds give equal adapters: all tasks and all families of one seed start at one point, which is what lets
    their task vectors be added. The adapter is drawn on the CPU, so it is the same on every device.
    """
    device = next(backbone.parameters()).device
    torch.manual_seed(seed)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear")
    return get_peft_model(copy.deepcopy(backbone).cpu(), config).to(device).eval()


def of_family(model: PeftModel, family: Family) -> PeftModel:
    """The model as it is for plain LoRA, linearized in place at the scope of the family otherwise.

    PEFT starts at B0 = 0. There both linearizations are functions of dB alone: A stays frozen, B trains.
    """
    if family != "lora":
        linlora.linearize(model, scope=family)
    return model


def training_steps(
    model: nn.Module, head: nn.Linear, train: Split, settings: Settings, learning_rate: float, seed: int
) -> Iterator[Tensor]:
    """Train the adapter; yields the loss of each step, after the step. AdamW, the learning rate falling to zero.

    The batches depend on the seed alone, so models given the same seed see the same images in the same order.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    for batch in batches(len(train), settings.batch, settings.steps, seed):
        batch = batch.to(train.labels.device)
        loss = cross_entropy(head(features(model, train.images[batch])), train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.detach()


def batches(images: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of `steps` full batches, reshuffled each time the images are used up."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, images)
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(queue) < batch:
            queue = torch.randperm(images, generator=generator)
        yield queue[:batch]
        queue = queue[batch:]


@torch.no_grad()
def accuracy(model: nn.Module, head: nn.Linear, split: Split) -> float:
    predicted = head(features(model, split.images)).argmax(dim=-1)
    return (predicted == split.labels).double().mean().item()
