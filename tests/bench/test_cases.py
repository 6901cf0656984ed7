"""The tables of cases and the floors derived from them."""

from __future__ import annotations

import pytest
from linlora.bench.cases import layer_case
from linlora.bench.floors import flops, least_bytes, roofline_seconds
from linlora.bench.suites import SUITES, select, suite


@pytest.mark.parametrize("name", SUITES)
def test_no_case_is_twice_in_a_suite(name: str) -> None:
    ids = [case.id for case in suite(name)]
    assert ids
    assert len(ids) == len(set(ids))


def test_the_suites_cover_the_models_rows_and_ranks_that_were_asked_for() -> None:
    cases = suite("full")
    models = {"clip-vit-b16", "flan-t5-base", "flan-t5-xl", "llama-3-8b", "qwen-2.5-7b"}
    assert models <= {case.model for case in cases}
    assert {1, 16384} <= {case.M for case in cases}
    assert {4, 128} <= {case.rank for case in cases}


def test_select_replaces_dtype_and_rank_and_filters_by_id() -> None:
    chosen = select(suite("default"), "bfloat16", ranks=[8], filters=["flan-t5-large", "short"])
    assert chosen
    assert {(case.model, case.form, case.rank, case.dtype) for case in chosen} == {
        ("flan-t5-large", "short", 8, "bfloat16")
    }


def test_a_rank_is_given_only_to_what_has_one() -> None:
    chosen = select(suite("default"), ranks=[8], filters=["attention"])
    assert {case.rank for case in chosen} == {0}
    assert "t5-small attention 2x8x512x64 causal dual forward_backward float32" in [case.id for case in chosen]


def test_the_default_suite_trains_a_bert_and_a_llama_at_model_scope() -> None:
    ids = [case.id for case in select(suite("default"), filters=["model-scope"])]
    assert ids == [
        f"{model} r16 short training_step model-scope float32"
        for model in ("llama-2x512 512 tokens", "bert-6x384 2048 tokens")
    ]


def test_an_unknown_suite_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match="default"):
        suite("nightly")


def test_flops_of_the_main_shape() -> None:
    M, K, N, r = 2048, 1024, 1024, 16
    short = layer_case("flan-t5-large", "q", M, "short")
    assert flops(short) == 4 * M * N * K + 4 * M * r * (K + N) + 2 * M * N * r
    pair = layer_case("flan-t5-large", "q", M, "pair")
    assert flops(pair) == 4 * M * N * K + 8 * M * r * (K + N) + 2 * M * r * (K + N)


def test_roofline_is_bound_by_memory_at_one_row_and_by_arithmetic_at_many() -> None:
    one = select([layer_case("llama-3-8b", "q", 1, "short", "forward")], "bfloat16")[0]
    many = select([layer_case("llama-3-8b", "q", 8192, "short", "forward")], "bfloat16")[0]
    assert roofline_seconds(one, "NVIDIA H200") == pytest.approx(least_bytes(one) / 4.8e12)
    assert roofline_seconds(many, "NVIDIA H200") == pytest.approx(flops(many) / 989e12)
    assert roofline_seconds(many, "a GPU of the future") is None
