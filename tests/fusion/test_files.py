"""Fusing vectors that lie in files: the same numbers as in memory, a few tensors at a time."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linlora
from linlora import TaskVector
from linlora.fusion.quantiles import cut_below
from linlora.fusion.registry import FROM_VECTORS, IN_WEIGHT_SPACE
from linlora.storage.tensor_files import TensorFile
from linlora.storage.tensors import StoredTensors

OPTIONS = [
    *((method, {}) for method in FROM_VECTORS if method not in IN_WEIGHT_SPACE),
    ("task_arithmetic", {"scaling": [0.3, -1.0, 0.5]}),
    ("ties", {"keep": 0.3}),
    ("dare", {"drop": 0.5, "combine": "ties", "keep": 0.5}),
]
NAMES = [" ".join([method, *map(str, options.values())]) for method, options in OPTIONS]


@pytest.fixture
def files(vectors, tmp_path):
    for index, vector in enumerate(vectors):
        vector.save(tmp_path / f"{index}.safetensors")
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=NAMES)
def test_from_files_is_from_memory_bit_for_bit(vectors, files, tmp_path, method, options):
    expected = linlora.fuse(vectors, method, **options)
    fused = linlora.fuse([TaskVector.open(file) for file in files], method, **options)
    assert isinstance(fused.deltas, StoredTensors)
    fused.save(tmp_path / "fused")
    loaded = TaskVector.load(tmp_path / "fused")
    loaded.check_same_point(expected)
    assert all(torch.equal(loaded.deltas[name], delta) for name, delta in expected.deltas.items())
    assert all(torch.equal(loaded.point[name], start) for name, start in vectors[0].point.items())


def test_ties_in_files_elects_the_majority_where_values_cancel(made, tmp_path):
    """+2 and -2 cancel, in the first tensor of two; the sign of most elements is in the second."""
    rows = [{"a.dB": [2.0, 1.0], "b.dB": [-1.0, -1.0]}, {"a.dB": [-2.0, 1.0], "b.dB": [-1.0, -1.0]}]
    vectors = []
    for index, row in enumerate(rows):
        deltas = {name: torch.tensor(values).unsqueeze(1) for name, values in row.items()}
        vectors.append(TaskVector(deltas, None, "", {"a": 1.0, "b": 1.0}, "layer"))
        vectors[-1].save(tmp_path / str(index))
    fused = linlora.fuse([TaskVector.open(tmp_path / str(index)) for index in range(2)], "ties", keep=1.0)
    assert fused.deltas["a.dB"].flatten().tolist() == [-2.0, 1.0]
    assert all(
        torch.equal(fused.deltas[name], linlora.fuse(vectors, "ties", keep=1.0).deltas[name]) for name in rows[0]
    )


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=NAMES)
def test_a_few_tensors_are_alive_however_many_files_there_are(files, tmp_path, monkeypatch, method, options):
    alive, peak = set(), 0
    original = TensorFile.read

    def read(file, name):
        nonlocal peak
        tensor = original(file, name)
        key = object()
        alive.add(key)
        weakref.finalize(tensor, alive.discard, key)
        peak = max(peak, len(alive))
        return tensor

    options = {key: value if not isinstance(value, list) else 0.3 for key, value in options.items()}
    monkeypatch.setattr(TensorFile, "read", read)
    gc.collect()
    linlora.fuse([TaskVector.open(file) for file in files * 4], method, **options).save(tmp_path / "fused")
    assert peak <= 3


def test_fused_files_can_be_fused_put_into_models_and_measured(vectors, files, flat):
    stored = [TaskVector.open(file) for file in files]
    half = linlora.fuse([linlora.fuse(stored[:2], scaling=1.0), stored[2]], "average")
    a, b, c = map(flat, vectors)
    torch.testing.assert_close(flat(half), (a + b + c) / 2, rtol=1e-5, atol=1e-6)
    assert half.norm() == pytest.approx(float((a + b + c).norm() / 2), rel=1e-5)
    assert (stored[0] - vectors[0]).norm() == 0.0


@given(
    rows=st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20), min_size=1),
    keep=st.floats(0.01, 1.0),
    wide=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_exceeds_the_cut_are_the_largest(rows, keep, wide):
    dtype = torch.float64 if wide else torch.float32
    streams = [torch.tensor(row, dtype=dtype) for row in rows]
    halves = {str(part): [{i: half for i, row in enumerate(streams) if len(half := row[part::2])}] for part in (0, 1)}
    cuts = cut_below(halves, halves.__getitem__, len(rows), keep)
    for row, cut in zip(streams, cuts, strict=True):
        order = row.abs().sort(descending=True).values
        smallest = order[max(1, int(keep * len(row))) - 1] if len(row) else torch.tensor(torch.inf)
        assert torch.equal(row.abs() > cut, row.abs() >= smallest)


def test_an_interrupted_fusion_leaves_nothing(files, tmp_path, monkeypatch):
    fused = linlora.fuse([TaskVector.open(file) for file in files])
    asked = []

    def interrupted(stored, name):
        asked.append(name)
        if len(asked) == 10:
            raise KeyboardInterrupt
        return stored._read(name)

    monkeypatch.setattr(StoredTensors, "__getitem__", interrupted)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        fused.save(tmp_path / "fused")
    assert sorted(tmp_path.iterdir()) == before
