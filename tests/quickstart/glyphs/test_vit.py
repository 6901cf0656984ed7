"""The shipped backbone, and the script that makes such a one."""

import shutil

import pytest
import torch

from linlora.quickstart.glyphs import pretrain
from linlora.quickstart.glyphs.vit import FOLDER, backbone, new_backbone


def test_the_backbone_is_the_architecture_in_fp32_and_frozen():
    model = backbone()
    fresh = new_backbone().state_dict()
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in fresh.items()
    }
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_damaged_backbone_is_refused(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "data")
    content = bytearray((tmp_path / "data" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "data" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors has SHA-256 .*: it is damaged; install linlora again"):
        backbone(tmp_path / "data")


def test_an_interrupted_pretraining_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    options = {"characters": "ABCD", "steps": 3, "every": 1}
    whole = pretrain.pretrain(tmp_path / "whole", **options)

    def interrupted(step, steps, rate=pretrain.learning_rate):
        if step == 2:
            raise KeyboardInterrupt
        return rate(step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "learning_rate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(tmp_path / "parts", **options)
    parts = pretrain.pretrain(tmp_path / "parts", **options)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_learning_rate_falls_to_zero_by_steps():
    rates = [pretrain.learning_rate(step, 1000) for step in range(1000)]
    assert max(rates) == rates[pretrain.WARM_UP] == pretrain.LEARNING_RATE
    assert rates[pretrain.WARM_UP :] == sorted(rates[pretrain.WARM_UP :], reverse=True)
    assert rates[-1] < 1e-5 * pretrain.LEARNING_RATE
