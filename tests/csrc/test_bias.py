"""The bias has a dtype of its own: that of x, as models keep it, beside factors in float32, or the other way round."""

import pytest
import torch

DTYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("kernel", ["lora_linear_sm80", "lora_linear_sm90"])
@pytest.mark.parametrize(("factors", "bias"), [DTYPES, DTYPES[::-1]], ids=["fp32-bias", "bf16-bias"])
def test_the_bias_and_the_factors_may_differ(build_emulated, make_problem, assert_right, kernel, factors, bias):
    problem = make_problem(72, 64, 72, 8, factor_dtype=factors, bias_dtype=bias)
    assert_right(problem, problem.emulate(build_emulated(kernel), f"emulate_{kernel}", 2))
