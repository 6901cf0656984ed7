"""The pre-trained backbone: a small transformers ViT, and one frozen linear head for each task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from transformers import ViTConfig, ViTModel

from linlora.quickstart.data import Split
from linlora.quickstart.settings import Settings
from linlora.storage.tensor_files import load_tensors, save_tensors

PARTIAL_FILE = "pretraining.pt"


def new_backbone(settings: Settings) -> ViTModel:
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
        intermediate_size=settings.intermediate_size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return ViTModel(config, add_pooling_layer=False)


def load_backbone(directory: Path) -> ViTModel:
    return ViTModel.from_pretrained(directory, add_pooling_layer=False).eval().requires_grad_(False)


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the heads read, (n, hidden_size): the class token after the last layer norm."""
    output = model(pixel_values=images)
    tokens = output if isinstance(output, Tensor) else output.last_hidden_state  # a tensor of baselines.FunctorchModel
    return tokens[:, 0]


def pretrain(
    settings: Settings,
    train: Split,
    workplace: Path,
    device: str,
    on_epoch: Callable[[], None] = lambda: None,
    on_found: Callable[[], None] = lambda: None,
) -> ViTModel:
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
        for _ in range(first_epoch):
            on_found()
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
        on_epoch()
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
