"""Numbers that callers hand to the kernels: of any kind that is a number, and beside a default device of torch's."""

import numpy as np
import pytest
import torch
from kernel_oracles import layer
from linlora.kernels.attention_problem import Attention
from linlora.kernels.factor_gradients import host as factor_gradients
from linlora.kernels.grouped_gradients import grouped_gradients
from linlora.kernels.grouped_problem import GroupedGradients, GroupedLoraLinear
from linlora.kernels.norm_problem import Norm
from linlora.kernels.problem import FactorGradients
from linlora.kernels.stacks import group_rows
from linlora.kernels.uploads import upload

from linlora import kernels

FP32 = torch.float32


def rows(device, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def of_groups(device):
    return group_rows(torch.tensor([0, 1, 1, 0, 0], device=device), 2, 1, True)


def grouped(device, s):
    x, weight, dS, dE = (rows(device, *shape) for shape in ((5, 16), (8, 16), (2, 16, 4), (2, 4, 8)))
    return kernels.grouped_lora_linear(GroupedLoraLinear(x, weight, None, None, None, dS, dE, of_groups(device), s))


OPS = {
    "one stream": lambda device, s: kernels.lora_linear(layer(5, 8, 16, 4, FP32, device)._replace(scaling=s)),
    "two streams": lambda device, s: kernels.lora_linear(
        layer(5, 8, 16, 4, FP32, device, two_streams=True)._replace(scaling=s)
    ),
    "grouped": grouped,
    "factor gradients": lambda device, s: factor_gradients(
        FactorGradients(rows(device, 5, 4), rows(device, 5, 8), None, None, s, FP32)
    ),
    "grouped gradients": lambda device, s: grouped_gradients(
        GroupedGradients(rows(device, 5, 4), rows(device, 5, 8), None, None, of_groups(device), 2, s, FP32)
    ),
    "attention": lambda device, s: kernels.attention(Attention(*(rows(device, 1, 1, 4, 16),) * 3, scale=s)),
    "norm": lambda device, s: kernels.norm(Norm(rows(device, 5, 8), None, None, None, s, True)),
}


@pytest.mark.parametrize("number", [torch.tensor(0.5), torch.tensor(3.0), 1, 2, np.float32(0.5)], ids=repr)
@pytest.mark.parametrize("op", OPS)
def test_a_number_of_any_kind_is_the_float_that_it_equals(device, op, number):
    results = []
    for of in (number, float(number)):
        torch.manual_seed(0)
        results.append([tensor for tensor in OPS[op](device, of) if tensor is not None])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_numbers_are_uploaded_from_the_host_whatever_the_default_device_is(device):
    with torch.device("meta"):
        uploaded = upload([3, 4], torch.int64, torch.device(device))
    assert (uploaded.tolist(), uploaded.device.type) == ([3, 4], device)
