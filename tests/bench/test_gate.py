"""Every provider passes the gate; a wrong one is caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linlora.bench import gate, layers
from linlora.bench.cases import Case, model_case
from linlora.bench.data import random_data
from linlora.bench.job import Layer
from linlora.bench.providers import EAGER, PROVIDERS, Provider, providers
from linlora.bench.runner import run_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = Case("layer", "test", M=6, K=24, N=16, rank=4, bias=True)
PAIR = replace(TINY, form="pair")
DUAL = replace(PAIR, op="lora_linear")
LAYERS = [replace(case, phase=phase) for case in (TINY, PAIR, DUAL) for phase in ("forward", "forward_backward")]
MODELS = [model_case("bert-2x32", form, 4, scope) for form in ("short", "pair") for scope in ("layer", "model")]
MODELS += [model_case("llama-1x64", rank=4, scope="model")]


def every_provider(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrize over the cases and, for each, the providers that serve it on this machine."""
    return pytest.mark.parametrize(
        ("case", "provider"),
        [
            pytest.param(case, provider, id=f"{case.id.replace(' ', '-')}-{provider.name}")
            for case in cases
            for provider in EAGER
            if provider.obstacle(case, DEVICE) is None
        ],
    )


def errors_of(provider: Provider, case: Case) -> gate.Errors:
    data = random_data(case, DEVICE)
    results = provider.job(case, DEVICE, data).results()
    return gate.errors(results, gate.expected(case, provider.function, data, DEVICE))


def test_a_model_scope_case_compares_both_scopes_with_jvp_over_the_whole_model() -> None:
    result = run_case(MODELS[-1], providers(), DEVICE, seconds=0.1)
    timed = {name for name, outcome in result.outcomes.items() if outcome.median_ms is not None}
    assert {"frozen", "peft", "linlora-torch", "linlora-model-torch", "functorch"} <= timed
    assert not {"functorch-all", "addmm"} & result.outcomes.keys()
    assert result.memory("linlora-model-torch", "functorch") is not None


def test_the_gate_tells_layer_scope_from_model_scope() -> None:
    case = model_case("bert-2x32", "pair", 4, "model")
    pretender = replace(PROVIDERS["linlora-torch"], function="network")
    assert gate.verdict(case, errors_of(pretender, case)) is not None


@every_provider(LAYERS)
def test_every_provider_computes_its_layer(case: Case, provider: Provider) -> None:
    errors = errors_of(provider, case)
    assert gate.verdict(case, errors) is None
    assert {"y", "grad_x"} <= errors.keys() or case.phase == "forward"


@every_provider(MODELS)
def test_every_provider_trains_the_same_model(case: Case, provider: Provider) -> None:
    assert gate.verdict(case, errors_of(provider, case)) is None


@pytest.mark.parametrize("name", ["linlora-torch", "peft", "addmm", "functorch-ab", "functorch-all"])
def test_bfloat16_passes_too(name: str) -> None:
    case = replace(PAIR, dtype="bfloat16", M=32, K=64, N=48)
    assert gate.verdict(case, errors_of(PROVIDERS[name], case)) is None


def _doubled_update(data) -> Layer:
    problem = data.problem._replace(scaling=1.01 * data.problem.scaling)
    return layers.addmm(replace(data, problem=problem))


def _forgotten_gradient(data) -> Layer:
    layer = layers.addmm(data)
    frozen = layer.trainable["A"].detach()
    module = layers.peft(data).forward.base_layer
    forward = lambda x: torch.addmm(module(x), x @ frozen.t(), layer.trainable["B"].t(), alpha=data.problem.scaling)  # noqa: E731
    return Layer(forward, {"B": layer.trainable["B"]}, layer.tensors)


@pytest.mark.parametrize("build", [_doubled_update, _forgotten_gradient])
def test_a_wrong_provider_is_caught_and_not_timed(build) -> None:
    wrong = replace(PROVIDERS["addmm"], name="wrong", layer=build)
    result = run_case(PAIR, [PROVIDERS["frozen"], PROVIDERS["linlora-torch"], wrong], DEVICE, seconds=0.1)
    assert result.outcomes["wrong"].status == "wrong"
    assert "rel err" in result.outcomes["wrong"].detail
    assert result.outcomes["wrong"].median_ms is None
    assert result.outcomes["linlora-torch"].status == "green"
    assert result.outcomes["linlora-torch"].median_ms is not None


def test_a_provider_that_goes_wrong_later_loses_its_time() -> None:
    def drifting(data) -> Layer:
        layer, calls = layers.frozen(data), iter(range(10**9))
        return Layer(lambda x: layer.forward(x) * (1 if next(calls) < 2 else 1.1), {}, layer.tensors)

    providers = [PROVIDERS["frozen"], replace(PROVIDERS["frozen"], name="drifting", layer=drifting)]
    result = run_case(TINY, providers, DEVICE, seconds=0.1)
    outcome = result.outcomes["drifting"]
    assert outcome.status == "wrong"
    assert outcome.detail.startswith("after timing")
    assert outcome.median_ms is None


def test_a_provider_that_breaks_is_a_line_of_the_report() -> None:
    def broken(data) -> Layer:
        raise RuntimeError("no such kernel")

    result = run_case(
        TINY, [PROVIDERS["frozen"], replace(PROVIDERS["addmm"], name="broken", layer=broken)], DEVICE, 0.1
    )
    assert result.outcomes["broken"].status == "failed"
    assert "no such kernel" in result.outcomes["broken"].detail


def test_a_missing_gradient_is_infinitely_wrong_unless_it_is_zero() -> None:
    errors = gate.errors({}, {"grad_A": torch.zeros(2), "grad_B": torch.ones(2)})
    assert errors == {"grad_A": 0.0, "grad_B": float("inf")}


def test_nan_is_red() -> None:
    errors = gate.errors({"y": torch.tensor([float("nan")])}, {"y": torch.ones(1, dtype=torch.float64)})
    assert "y" in str(gate.verdict(TINY, errors))


def test_the_composed_path_widens_the_limit() -> None:
    case = replace(TINY, dtype="bfloat16")
    assert gate.verdict(case, {"y": 0.011}, composed={"y": 0.010}) is None
    assert gate.verdict(case, {"y": 0.013}, composed={"y": 0.010}) is not None


def test_an_unknown_provider_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match="linlora-torch"):
        providers(("unsloth",))
    assert [p.name for p in providers(("peft",))] == ["frozen", "peft"]
