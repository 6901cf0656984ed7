"""LoRA-Soups: the weights of each layer are learnt, and the fused vector is what was learnt."""

import pytest
import torch
from peft import PeftModel

import linlora
from linlora import formats
from linlora.fusion.soup import own_loss, soup_weights
from linlora.testing import randomize, tiny_base, tiny_batch, tiny_model


@pytest.fixture
def adapters(tmp_path):
    for index, targets in enumerate((["query", "dense"], ["query"])):
        model = tiny_model("bert", r=2 + index, target_modules=targets)
        randomize(model, index + 1)
        model.save_pretrained(tmp_path / str(index))
    return [formats.read(tmp_path / str(index)) for index in range(2)]


BATCHES = [{**tiny_batch("bert", seed=seed), "labels": torch.tensor([0, 1, 2])} for seed in range(2)]


def mean_loss(vector, tmp_path):
    linlora.export(vector, tmp_path / "out")
    model = PeftModel.from_pretrained(tiny_base("bert"), tmp_path / "out").eval()
    return sum(float(own_loss(model, batch)) for batch in BATCHES) / len(BATCHES)


def test_the_weights_lower_the_loss_of_the_exported_adapter(adapters, tmp_path):
    base = tiny_base("bert")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    fused = linlora.fuse(adapters, "soup", model=base, batches=BATCHES, learning_rate=0.1, epochs=15)
    assert mean_loss(fused, tmp_path) < mean_loss(linlora.fuse(adapters, "average"), tmp_path) - 1e-3
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(module._forward_hooks for module in base.modules())
    assert all(parameter.grad is None for parameter in base.parameters())


def test_weights_are_shares_by_layer_and_what_the_loss_saw_is_the_vector(adapters, tmp_path):
    seen = []

    def loss(model, batch):
        value = own_loss(model, batch)
        seen.append(float(value.detach()))
        return value

    shares = soup_weights(adapters, tiny_base("bert"), BATCHES, loss, learning_rate=0.0)
    assert all(torch.equal(found, torch.tensor([0.5, 0.5]).double()) for found in shares.values())
    assert mean_loss(linlora.fuse(adapters, "average"), tmp_path) == pytest.approx(sum(seen) / 2, rel=1e-5)
    learnt = soup_weights(adapters, tiny_base("bert"), BATCHES, learning_rate=0.1)
    assert all(float(found.sum()) == pytest.approx(1.0) for found in learnt.values())
    assert len({tuple(found.tolist()) for found in learnt.values()}) == len(learnt) > 2
    turned = soup_weights(adapters[::-1], tiny_base("bert"), BATCHES, learning_rate=0.1)
    assert all(torch.equal(turned[name].flip(0), found) for name, found in learnt.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "there is no batch"),
        ({"epochs": 0}, "epochs has to be a whole number"),
        ({"model": tiny_model("bert")}, "has no layer .* without an adapter"),
        ({"loss": lambda model, batch: torch.tensor(float("nan"))}, "the loss is nan"),
    ],
)
def test_what_cannot_be_learnt(adapters, options, message):
    with pytest.raises(ValueError, match=message):
        linlora.fuse(adapters, "soup", **{"model": tiny_base("bert"), "batches": BATCHES, **options})
