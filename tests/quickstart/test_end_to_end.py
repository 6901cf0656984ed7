"""One miniature run writes everything it says it writes, and the numbers agree with the adapters on disk."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from matplotlib.image import imread

import linlora
from linlora import TaskVector
from linlora.quickstart.backbone import features, load_backbone, load_heads
from linlora.quickstart.data import load_digits
from linlora.quickstart.results import METHODS
from linlora.quickstart.settings import FAMILIES
from linlora.quickstart.tasks import select_tasks
from linlora.quickstart.train import accuracy, adapted, of_family

TASKS = ("rotated-digit", "mirrored-odd")


def test_the_json_holds_every_number_of_the_table(finished):
    out, results, printed = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    table = (out / "table.txt").read_text(encoding="utf-8")
    for family in FAMILIES:
        entry = results["families"][family]
        for value in (
            entry["single"],
            *(entry[method][part] for method in METHODS for part in ("absolute", "normalised")),
        ):
            assert f"{100 * value['mean']:.1f}" in table
            assert f"{100 * value['mean']:.1f}" in printed
    for milliseconds in results["step_time"]["median_ms"].values():
        assert milliseconds > 0
        assert f"{milliseconds:.1f}" in table
    assert results["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize("picture", ["scaling_curve.png", "cosine_matrices.png"])
def test_the_pictures_show_something(finished, picture):
    pixels = imread(finished[0] / picture)
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.02


@pytest.mark.parametrize("family", ["lora", "layer"])
@pytest.mark.parametrize("task", TASKS)
def test_stock_peft_loads_an_exported_adapter_with_the_same_logits(finished, miniature, family, task):
    out = finished[0]
    directory = out / "adapters" / family / task / "seed0"
    vector = TaskVector.load(directory / "task_vector.safetensors")
    assert vector.norm() > 0
    images = load_digits().images[:50]
    backbone = load_backbone(out / "backbone")
    ours = of_family(adapted(backbone, miniature, seed=0), family)
    linlora.apply(ours, vector)
    stock = peft.PeftModel.from_pretrained(load_backbone(out / "backbone"), directory).eval()
    assert not any(type(module).__module__.startswith("linlora") for module in stock.modules())
    torch.testing.assert_close(features(stock, images), features(ours, images), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(features(stock, images), features(backbone, images), atol=1e-3)


@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
@pytest.mark.parametrize(
    ("family", "form"), [("lora", "adapter"), ("layer", "adapter"), *((family, "vector") for family in FAMILIES)]
)
def test_a_fused_adapter_or_vector_on_disk_has_the_accuracy_of_the_table(finished, miniature, family, form, method):
    out, results, _ = finished
    directory = out / "fused" / family / "seed0" / method
    backbone = load_backbone(out / "backbone")
    if form == "adapter":
        model = peft.PeftModel.from_pretrained(backbone, directory).eval()
    else:
        model = of_family(adapted(backbone, miniature, seed=0), family)
        linlora.apply(model, TaskVector.load(directory / "task_vector.safetensors"))
    heads = load_heads(out / "backbone" / "heads.safetensors", "cpu")
    digits = load_digits()
    measured = [accuracy(model, heads[task.name], task.splits(digits)["test"]) for task in select_tasks(TASKS)]
    assert measured == pytest.approx(results["families"][family][method]["by_task"], abs=0.0041)  # two of 500


def test_model_scope_leaves_no_adapter_that_would_not_have_its_function(finished):
    assert {path.name for path in finished[0].glob("adapters/model/*/seed0/*")} == {
        "task_vector.safetensors",
        "training.json",
    }
    assert not list(finished[0].glob("fused/model/**/adapter_*"))


@torch.no_grad()
def test_at_model_scope_alone_the_changes_of_the_features_add(finished, miniature):
    """F(δ1 + δ2) − F(0) = (F(δ1) − F(0)) + (F(δ2) − F(0)), for vectors large enough to tell."""
    out, images = finished[0], load_digits().images[:50]
    backbone = load_backbone(out / "backbone")
    error = {}
    for family in FAMILIES:
        files = [out / "adapters" / family / task / "seed0" / "task_vector.safetensors" for task in TASKS]
        vectors = [10 * TaskVector.load(file) for file in files]
        model = of_family(adapted(backbone, miniature, seed=0), family)
        changes = []
        for vector in (*vectors, vectors[0] + vectors[1]):
            linlora.apply(model, vector)
            changes.append(features(model, images) - features(backbone, images))
        error[family] = ((changes[0] + changes[1] - changes[2]).norm() / changes[2].norm()).item()
    assert error["model"] < 1e-4
    assert min(error["lora"], error["layer"]) > 1e-2


def test_all_vectors_of_a_seed_share_their_point_in_every_family(finished):
    out = finished[0]
    points = []
    for family in FAMILIES:
        files = [out / "adapters" / family / task / "seed0" / "task_vector.safetensors" for task in TASKS]
        vectors = [TaskVector.load(file) for file in files]
        assert vectors[0].point_hash == vectors[1].point_hash
        points.append({name: A0 for name, A0 in vectors[0].point.items() if name.endswith(".A0")})
    for other in points[1:]:
        assert other.keys() == points[0].keys()
        assert all(torch.equal(points[0][name], other[name]) for name in other)


def test_plain_lora_trains_both_factors_and_linearized_lora_only_b(finished):
    out = finished[0]
    moved = {}
    for family in FAMILIES:
        vector = TaskVector.load(out / "adapters" / family / TASKS[0] / "seed0" / "task_vector.safetensors")
        moved[family] = {name.rsplit(".", 1)[1] for name, delta in vector.deltas.items() if delta.any()}
    assert moved == {"lora": {"dA", "dB"}, "layer": {"dB"}, "model": {"dB"}}
