"""A miniature experiment: its numbers follow from its files, and it writes what it says."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import peft
import pytest
import torch
from matplotlib.image import imread

import linlora
from linlora import TaskVector, quickstart
from linlora.experiments.controls import BY_KEY, space
from linlora.experiments.image_suite import features
from linlora.experiments.images import ImageExperiment, training_steps
from linlora.experiments.options import ROWS, fusion_method
from linlora.experiments.report import markdown
from linlora.experiments.step_time import model_of

TASKS = ("rotated-digit", "mirrored-odd")
CONTROLS = {
    "zero": ["factors", "delta_weight", "layer", "model"],
    "warm": ["factors", "delta_weight", "lora_fa", "layer", "model"],
}
CASES = [(start, key) for start, keys in CONTROLS.items() for key in keys]


@pytest.fixture
def experiment(finished, miniature):
    return ImageExperiment(miniature, finished[0])


def test_every_control_has_every_method_that_fits(finished):
    starts = finished[1]["starts"]
    assert {start: list(starts[start]["controls"]) for start in starts} == CONTROLS
    for start, key in CASES:
        fitting = [method for method in ROWS if BY_KEY[key].fits(method)]
        assert list(starts[start]["controls"][key]["methods"]) == fitting


def test_the_table_holds_the_numbers_of_the_json_and_those_follow_from_the_scores_by_task(finished):
    out, results, printed = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    table = (out / "table.txt").read_text(encoding="utf-8")
    for start, key in CASES:
        entry = results["starts"][start]["controls"][key]
        (single,) = entry["single_by_seed_and_task"]
        assert entry["single"]["mean"] == pytest.approx(statistics.fmean(single))
        for method in entry["methods"].values():
            (fused,) = method["by_seed_and_task"]
            assert method["absolute"]["mean"] == pytest.approx(statistics.fmean(fused))
            ratio = statistics.fmean(f / s for f, s in zip(fused, single, strict=True))
            assert method["normalised"]["mean"] == pytest.approx(ratio)
            for value in (method["absolute"], method["normalised"]):
                for text in (table, printed, markdown(results)):
                    assert f"{100 * value['mean']:.1f}" in text
    for milliseconds in results["step_time"]["median_ms"].values():
        assert milliseconds > 0
        assert f"{milliseconds:.1f}" in table
    assert results["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize(("start", "key"), CASES)
@pytest.mark.parametrize("method", ["sum", "task_arithmetic", "ties", "iso_c"])
def test_a_score_is_what_the_vectors_on_disk_give_with_the_chosen_options(finished, experiment, start, key, method):
    control = BY_KEY[key]
    if not control.fits(method):
        return
    vectors = experiment.vectors(start, control.trained, seed=0)
    found = finished[1]["starts"][start]["controls"][key]["methods"][method]
    at = space(control, experiment.base("lora"), vectors, fusion_method(method))
    at.put(linlora.fuse(at.vectors, fusion_method(method), **found["options_by_seed"][0]))
    assert experiment.suite.scores(at.model, "test") == pytest.approx(found["by_seed_and_task"][0], abs=0.0041)
    if method != "sum":
        (chosen,) = found["options_by_seed"]
        best = max(point["mean"] for point in found["validation"])
        assert next(p["mean"] for p in found["validation"] if p["options"] == chosen) == pytest.approx(best)


def test_all_kinds_of_training_start_from_one_adapter_which_is_zero_or_not(finished):
    out = finished[0]
    for start, is_warm in (("zero", False), ("warm", True)):
        files = out.glob(f"adapters/{start}/*/*/seed0/task_vector.safetensors")
        vectors = [TaskVector.load(file) for file in files]
        assert len(vectors) == len(TASKS) * (4 if is_warm else 3)
        assert any(B0.any() for v in vectors for n, B0 in v.point.items() if n.endswith(".B0")) == is_warm
        for name, A0 in vectors[0].point.items():
            if name.endswith(".A0"):
                assert all(torch.equal(A0, vector.point[name]) for vector in vectors)


def test_before_fine_tuning_all_controls_of_a_start_are_one_model(finished):
    for start in finished[1]["starts"].values():
        assert len({entry["before"]["mean"] for entry in start["controls"].values()}) == 1


def test_single_scores_are_those_of_the_kind_of_training(finished):
    controls = finished[1]["starts"]["warm"]["controls"]
    assert controls["factors"]["single"] == controls["delta_weight"]["single"]


def test_plain_lora_trains_both_factors_and_linearized_lora_only_b(experiment):
    moved = {}
    for trained in ("lora", "layer", "model"):
        vector = experiment.vectors("zero", trained, 0)[0]
        moved[trained] = {name.rsplit(".", 1)[1] for name, delta in vector.deltas.items() if delta.any()}
    assert moved == {"lora": {"dA", "dB"}, "layer": {"dB"}, "model": {"dB"}}


@torch.no_grad()
def test_at_model_scope_alone_the_changes_of_the_features_add(experiment):
    """F(δ1 + δ2) − F(0) = (F(δ1) − F(0)) + (F(δ2) − F(0)), for vectors large enough to tell."""
    some = experiment.suite.splits[TASKS[0]]["test"].images[:50]
    before, error = features(experiment.base("lora"), some), {}
    for trained in ("lora", "layer", "model"):
        vectors = [10 * vector for vector in experiment.vectors("zero", trained, 0)]
        model = experiment.at_start("zero", trained, 0)
        changes = []
        for vector in (*vectors, vectors[0] + vectors[1]):
            linlora.apply(model, vector)
            changes.append(features(model, some) - before)
        error[trained] = ((changes[0] + changes[1] - changes[2]).norm() / changes[2].norm()).item()
    assert error["model"] < 1e-4
    assert min(error["lora"], error["layer"]) > 1e-2


ADAPTERS = [
    *((f"adapters/zero/{trained}/{TASKS[0]}/seed0", trained) for trained in ("lora", "layer")),
    ("adapters/warm/layer/mirrored-odd/seed0", "layer"),
    ("fused/zero/layer/seed0/average", "layer"),
    ("fused/zero/factors/seed0/task_arithmetic", "lora"),
]


@pytest.mark.parametrize(("folder", "trained"), ADAPTERS, ids=[folder for folder, _ in ADAPTERS])
@torch.no_grad()
def test_stock_peft_loads_an_adapter_with_the_same_features(finished, experiment, folder, trained):
    vector = TaskVector.load(finished[0] / folder / "task_vector.safetensors")
    ours = experiment.at_start("warm" if "warm" in folder else "zero", trained, 0)
    linlora.apply(ours, vector)
    backbone = experiment.settings.data.open(finished[0] / "backbone").network
    some = experiment.suite.splits[TASKS[0]]["test"].images[:50]
    before = features(backbone, some)
    stock = peft.PeftModel.from_pretrained(backbone, finished[0] / folder).eval()
    assert not any(type(module).__module__.startswith("linlora") for module in stock.modules())
    torch.testing.assert_close(features(stock, some), features(ours, some), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(features(stock, some), before, atol=1e-4)


def test_a_fused_sum_of_weights_is_an_adapter_with_the_score_of_the_table(finished, experiment):
    backbone = experiment.settings.data.open(finished[0] / "backbone").network
    stock = peft.PeftModel.from_pretrained(backbone, finished[0] / "fused/zero/delta_weight/seed0/average").eval()
    (expected,) = finished[1]["starts"]["zero"]["controls"]["delta_weight"]["methods"]["average"]["by_seed_and_task"]
    assert experiment.suite.scores(stock, "test") == pytest.approx(expected, abs=0.0041)  # two of 500


def test_model_scope_leaves_no_adapter_that_would_not_have_its_function(finished):
    files = {path.name for path in finished[0].glob("adapters/zero/model/*/seed0/*")}
    assert files == {"task_vector.safetensors", "training.json"}
    assert not list(finished[0].glob("fused/*/model/**/adapter_*"))


@pytest.mark.parametrize("picture", ["scores", "scalings", "cosines", "disentanglement"])
def test_the_pictures_show_something(finished, picture):
    pixels = imread(finished[0] / f"{picture}.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.02


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_linlora_and_torch_func_are_the_same_training(experiment, scope):
    settings, suite = replace(experiment.settings, steps=50), experiment.suite
    train, head = suite.splits[TASKS[0]]["train"], suite.heads[TASKS[0]]
    losses = [
        torch.stack(list(training_steps(model_of(version, suite.network, settings), head, train, settings, 0.05, 0)))
        for version in (scope, f"{scope}_torch_func", "lora")
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert (losses[0] - losses[2]).abs().max() > 1e-3, "plain LoRA is another training"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"seeds": 0}, "seeds has to be 1 or more"),
        ({"workers": 0}, "workers has to be 1 or more"),
        ({"workers": "ray"}, "dask://HOST:PORT"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, miniature, console, arguments, message):
    with pytest.raises(ValueError, match=message):
        quickstart.run(tmp_path / "run", settings=miniature, console=console, **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_with_a_remedy(tmp_path, miniature, console):
    with pytest.raises(ValueError, match=r"'cuda' is not available.*--device cpu"):
        quickstart.run(tmp_path / "run", device="cuda", settings=miniature, console=console)
    assert not (tmp_path / "run").exists()
