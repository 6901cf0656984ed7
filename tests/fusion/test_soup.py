"""LoRA-Soups: the weights of each layer are learnt, and the fused vector is what was learnt."""

import pytest
import torch
from peft import PeftModel

import linlora
from linlora import formats
from linlora.fusion.soup import own_loss
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


def test_weights_are_shares_by_layer_and_what_the_loss_saw_is_the_vector(adapters, tmp_path, weights_in):
    seen = []

    def loss(model, batch):
        value = own_loss(model, batch)
        seen.append(float(value.detach()))
        return value

    options = {"model": tiny_base("bert"), "batches": BATCHES}
    average = linlora.fuse(adapters, "soup", loss=loss, learning_rate=0.0, **options)
    assert (average - linlora.fuse(adapters, "average")).norm() == 0.0
    assert mean_loss(average, tmp_path) == pytest.approx(sum(seen) / 2, rel=1e-5)
    learnt = weights_in(linlora.fuse(adapters, "soup", learning_rate=0.1, **options), adapters)
    both = [found for layer, found in learnt.items() if layer in adapters[1].scalings]
    assert all(float(found.sum()) == pytest.approx(1.0, abs=1e-5) for found in both)
    assert len({round(float(found[0]), 7) for found in learnt.values()}) == len(learnt) > len(both) >= 2


def test_the_order_of_the_adapters_changes_no_bit(adapters):
    options = {"model": tiny_base("bert"), "batches": BATCHES, "learning_rate": 0.1}
    adapters = [*adapters, 0.5 * adapters[1], -1.5 * adapters[0]]
    fused, turned = (linlora.fuse(given, "soup", **options) for given in (adapters, adapters[::-1]))
    assert all(torch.equal(turned.deltas[name], delta) for name, delta in fused.deltas.items())


def test_a_layer_that_the_loss_does_not_reach_is_averaged(adapters):
    def loss(model, batch):
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        return model.bert(**inputs).last_hidden_state.square().mean()

    fused = linlora.fuse(adapters, "soup", model=tiny_base("bert"), batches=BATCHES, loss=loss, learning_rate=0.1)
    found, average = (vector.update("bert.pooler.dense") for vector in (fused, linlora.fuse(adapters, "average")))
    torch.testing.assert_close(found.B @ found.A, average.B @ average.A)


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
