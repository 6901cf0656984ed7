"""TIES on the values of ΔW into a merged model, against dense matrices."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from linlora import formats
from linlora.merging import merge_files
from linlora.testing import randomize, tiny_base, tiny_model


def adapters(tmp_path, architecture):
    names = []
    for index, options in enumerate([{}, {"r": 2, "lora_alpha": 3}, {"r": 6}]):
        model = tiny_model(architecture, **options)
        randomize(model, index + 1)
        model.save_pretrained(tmp_path / str(index))
        names.append(str(tmp_path / str(index)))
    return names


def expected(vectors, keep, scaling):
    """λ times the disjoint mean, by the definition: trim each whole vector, elect, average."""
    dense = [
        {n: v.scalings[n] * v.deltas[f"{n}.dB"].double() @ v.deltas[f"{n}.dA"].double() for n in v.scalings}
        for v in vectors
    ]
    for task in dense:
        flat = torch.cat([dW.abs().flatten() for dW in task.values()]).sort(descending=True).values
        smallest = flat[int(keep * len(flat)) - 1]
        for dW in task.values():
            dW[dW.abs() < smallest * (1 - 1e-6)] = 0.0
    merged = {}
    for layer in dense[0]:
        stacked = torch.stack([task[layer] for task in dense])
        agree = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
        merged[layer] = scaling * (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged


@pytest.mark.parametrize("weights", [None, [1.0, -0.5, 2.0]], ids=["plain", "weighted"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_merged_model_holds_ties_of_the_dense_matrices(architecture, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("linlora.layers.weights.BLOCK", 300)  # several blocks of a tiny weight
    names = adapters(tmp_path, architecture)
    tiny_base(architecture).save_pretrained(tmp_path / "base")
    merge_files(
        tmp_path / "base",
        names,
        tmp_path / "out",
        method="ties",
        weights=weights,
        options={"keep": 0.3, "scaling": 0.8},
    )
    vectors = [w * formats.read(name) for w, name in zip(weights or [1.0] * 3, names, strict=True)]
    found, before = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "base"))
    for layer, dW in expected(vectors, 0.3, 0.8).items():
        key = next(key for key in before if f"{key}".endswith(f"{layer}.weight") or f"{layer}.weight".endswith(key))
        change = found[key].double() - before[key].double()
        change = change.T if architecture == "gpt2" else change
        torch.testing.assert_close(change, dW, rtol=1e-4, atol=1e-6)


def test_one_adapter_with_all_values_kept_is_that_adapter(tmp_path):
    names = adapters(tmp_path, "bert")[:1]
    tiny_base("bert").save_pretrained(tmp_path / "base")
    merge_files(tmp_path / "base", names, tmp_path / "ties", method="ties", options={"keep": 1.0})
    merge_files(tmp_path / "base", names, tmp_path / "sum")
    ties, whole = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ties", "sum"))
    torch.testing.assert_close(ties, whole)


@pytest.mark.parametrize("method", [None, "ties", "tsv"])
def test_the_order_of_the_adapters_changes_no_bit(method, tmp_path):
    names = adapters(tmp_path, "bert")
    tiny_base("bert").save_pretrained(tmp_path / "base")
    merge_files(tmp_path / "base", names, tmp_path / "one", method=method)
    merge_files(tmp_path / "base", [names[2], names[0], names[1]], tmp_path / "other", method=method)
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_adapters_that_cancel_in_other_factors_leave_the_base(tmp_path):
    """A and B of the second are of the same ΔW, negated, up to rounding."""
    name = adapters(tmp_path, "bert")[0]
    vector = formats.read(name)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    deltas = {
        n: (turn @ delta.double() if n.endswith("dA") else -delta.double() @ turn.T).float()
        for n, delta in vector.deltas.items()
    }
    replace(vector, deltas=deltas).save(tmp_path / "turned.safetensors")
    tiny_base("bert").save_pretrained(tmp_path / "base")
    merge_files(tmp_path / "base", [name, tmp_path / "turned.safetensors"], tmp_path / "out", method="ties")
    found, before = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "base"))
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep": 0.0}, "keep is the part of the values kept"), ({"drop": 0.5}, "ties takes no option 'drop'")],
)
def test_options_are_checked_before_anything_is_written(options, message, tmp_path):
    names = adapters(tmp_path, "bert")
    tiny_base("bert").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        merge_files(tmp_path / "base", names, tmp_path / "out", method="ties", options=options)
    assert not (tmp_path / "out").exists()
