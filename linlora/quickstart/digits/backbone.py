"""The pre-trained backbone: a small transformers ViT, and one frozen linear head for each task."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from transformers import ViTConfig, ViTModel

from linlora.experiments.image_suite import ImageSuite, Split, accuracy, features
from linlora.quickstart.digits.data import load_digits
from linlora.quickstart.digits.tasks import select_tasks
from linlora.storage.run_directory import staged, write_json
from linlora.storage.tensor_files import load_tensors, save_tensors

PARTIAL_FILE = "pretraining.pt"
_FILES = ("config.json", "model.safetensors", "heads.safetensors", "pretraining.json")


@dataclass(frozen=True)
class Digits:
    """`linlora.experiments.image_suite.ImageData` of handwritten digits: a ViT of 8 x 8 pixels in 2 x 2 patches,
    pre-trained on upright digits, slightly moved.

    Attributes:
        head_images: the heads are logistic regressions on the pre-trained features of so many labelled images.
        tasks: some of `linlora.quickstart.digits.tasks.TASKS`; all of them for None.
    """

    hidden_size: int = 64
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 128
    pretraining_epochs: int = 80
    pretraining_batch: int = 64
    pretraining_learning_rate: float = 1e-3
    head_images: int = 100
    tasks: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in select_tasks(self.tasks))

    @property
    def files(self) -> tuple[str, ...]:
        return _FILES

    def prepare(self, folder: Path, device: str) -> None:
        """Pre-train the backbone and fit the heads; an interrupted call goes on after its last epoch."""
        digits = load_digits()
        upright = {name: split.to(device) for name, split in digits.split(digits.images, digits.digits).items()}
        partial = folder.with_name("backbone.partial")
        partial.mkdir(parents=True, exist_ok=True)
        backbone = pretrain(self, upright["train"], partial, device)
        heads = {
            task.name: fit_head(backbone, task.splits(digits)["train"].to(device).first(self.head_images), task.labels)
            for task in select_tasks(self.tasks)
        }
        own_head = fit_head(backbone, upright["train"], 10)
        with staged(folder) as staging:
            backbone.save_pretrained(staging)
            save_heads(staging / "heads.safetensors", heads)
            record = {"upright_test_accuracy": accuracy(backbone, own_head, upright["test"])}
            write_json(staging / "pretraining.json", record)
        shutil.rmtree(partial)

    def open(self, folder: Path) -> ImageSuite:
        digits, heads = load_digits(), load_heads(folder / "heads.safetensors", "cpu")
        splits = {task.name: task.splits(digits) for task in select_tasks(self.tasks)}
        return ImageSuite(load_backbone(folder), splits, {name: heads[name] for name in splits})


def new_backbone(settings: Digits) -> ViTModel:
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
        intermediate_size=settings.intermediate_size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return ViTModel(config, add_pooling_layer=False)


def load_backbone(directory: Path) -> ViTModel:
    return ViTModel.from_pretrained(directory, add_pooling_layer=False).eval().requires_grad_(False)


def pretrain(settings: Digits, train: Split, workplace: Path, device: str) -> ViTModel:
    """Train a backbone to read upright digits, slightly moved and with noise.

    After every epoch the whole state goes to a file in `workplace`, and a later call goes on from there. Each epoch
    draws from its own seed, so the interrupted training and the uninterrupted one are the same.
    """
    backbone = new_backbone(settings)
    model = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(settings.hidden_size, 10)}).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    partial = workplace / PARTIAL_FILE
    first_epoch = 0
    if partial.exists():
        state = torch.load(partial, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epochs"]
    for epoch in range(first_epoch, settings.pretraining_epochs):
        generator = torch.Generator().manual_seed(epoch)
        learning_rate = settings.pretraining_learning_rate * (1 - epoch / settings.pretraining_epochs)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        for batch in torch.randperm(len(train), generator=generator).split(settings.pretraining_batch):
            batch = batch.to(train.labels.device)
            logits = model["head"](features(backbone, moved(train.images[batch], generator)))
            loss = cross_entropy(logits, train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
        unfinished = partial.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(partial)
    return backbone.eval().requires_grad_(False)


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images turned by up to 15 degrees, shifted by up to a pixel, scaled by up to 15 %, with a little noise."""
    n = len(images)
    turn, scale, shift_x, shift_y = (2 * torch.rand(4, n, generator=generator) - 1).unbind()
    angle, scale = turn * torch.pi / 12, 1 + 0.15 * scale
    first = torch.stack([scale * angle.cos(), -scale * angle.sin(), 0.25 * shift_x], dim=1)
    second = torch.stack([scale * angle.sin(), scale * angle.cos(), 0.25 * shift_y], dim=1)
    grid = affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
    noise = 0.1 * torch.randn(images.shape, generator=generator)
    return grid_sample(images, grid.to(images.device), padding_mode="border", align_corners=False) + noise.to(images)


@torch.no_grad()
def fit_head(backbone: nn.Module, train: Split, labels: int) -> nn.Linear:
    """A linear head for one task, by logistic regression on the pre-trained features, then frozen.

    Fine-tuning may not move it: a fused adapter meets the head of every task as it was before training.
    """
    read = features(backbone, train.images)
    regression = LogisticRegression(C=1.0, max_iter=5000).fit(read.double().cpu().numpy(), train.labels.cpu().numpy())
    weight, bias = torch.tensor(regression.coef_), torch.tensor(regression.intercept_)
    if labels == 2:  # scikit-learn keeps the logit of the second label alone
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    head = nn.Linear(read.shape[1], labels)
    head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return head.requires_grad_(False).to(read.device)


def save_heads(path: Path, heads: dict[str, nn.Linear]) -> None:
    tensors = {f"{name}.{kind}": tensor for name, head in heads.items() for kind, tensor in head.state_dict().items()}
    save_tensors(path, tensors, {})


def load_heads(path: Path, device: str) -> dict[str, nn.Linear]:
    tensors, _ = load_tensors(path)
    heads = {}
    for name in sorted({key.rsplit(".", 1)[0] for key in tensors}):
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        head = nn.Linear(weight.shape[1], weight.shape[0])
        head.load_state_dict({"weight": weight, "bias": bias})
        heads[name] = head.requires_grad_(False).to(device)
    return heads
