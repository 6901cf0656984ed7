"""Launches that are repeated: the compiled kernel is handed what a launch made afresh would hand it."""

import pytest
import torch
from kernel_oracles import FLAGS, RECOMPUTE, dropped, layer
from linlora.kernels import repeated
from linlora.kernels.linearized_lora_linear_flags import launch as launch_flags
from linlora.kernels.lora_linear import launch as launch_recompute
from linlora.kernels.packing import empty
from triton.tools.tensor_descriptor import TensorDescriptor

FP16, FP32 = torch.float16, torch.float32


class Recorded:
    """Stands in for the compiled kernel: keeps the grid and the arguments of its launch."""

    def __getitem__(self, grid):
        self.grid = grid
        return self.launch

    def launch(self, *arguments):
        self.arguments = arguments


def seen(argument):
    """An argument as a kernel sees it: addresses for tensors."""
    if isinstance(argument, TensorDescriptor):
        return seen(argument.base), *map(tuple, (argument.shape, argument.strides, argument.block_shape))
    if isinstance(argument, tuple) and not hasattr(argument, "data_ptr"):
        return tuple(map(seen, argument))
    return argument.data_ptr() if hasattr(argument, "data_ptr") else argument


def tensors_in(kept):
    """The tensors with memory that an object holds, however deep."""
    if isinstance(kept, dict | list | tuple):
        return [found for part in (kept.values() if isinstance(kept, dict) else kept) for found in tensors_in(part)]
    kept = kept.base if isinstance(kept, TensorDescriptor) else kept
    return [kept] if isinstance(kept, torch.Tensor) and not kept.is_meta else []


def clones(problem):
    """The problem with other tensors of the same strides."""
    copies = [x.clone(memory_format=torch.preserve_format) if isinstance(x, torch.Tensor) else x for x in problem]
    return type(problem)(*copies)


PROBLEMS = {
    "pair": lambda device: layer(20, 40, 64, 8, FP16, device, factor_dtype=FP32),
    "short": lambda device: layer(20, 40, 64, 8, FP16, device, short=True),
    "without bias": lambda device: layer(20, 40, 64, 8, FP16, device)._replace(bias=None),
    "dropout": lambda device: dropped(layer(20, 40, 64, 8, FP16, device), seed=7, adjoint=False),
    "adjoint": lambda device: dropped(layer(20, 40, 64, 8, FP16, device), seed=7, adjoint=True),
}


@pytest.mark.parametrize("save", [True, False], ids=["saves", "forgets"])
@pytest.mark.parametrize("design", ["recompute", "flags", "two streams"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_kept_launch_passes_the_arguments_of_a_new_one(device, name, design, save):
    first, second = (PROBLEMS[name](device) for _ in range(2))
    if design == "two streams":
        first, second = (x._replace(two_streams=True, x_tangent=torch.randn_like(x.x)) for x in (first, second))
    build = launch_flags if design == "flags" else launch_recompute
    config = FLAGS if design == "flags" else RECOMPUTE
    result = empty(first.outputs(save), first.x)
    launch, compiled = build(first, result, config), Recorded()
    kept = repeated.Repeated(launch, compiled, first, result, build)
    assert not tensors_in(vars(kept)), "memory of the first call, which may be that of a CUDA graph, is kept"
    for problem in (second, first, clones(second)):
        made = kept.run(problem)
        assert [None if x is None else (x.shape, x.dtype) for x in made] == [
            None if x is None else (x.shape, x.dtype) for x in result
        ]
        expected = build(problem, made, config).arguments
        assert compiled.grid == (*launch.grid, 1, 1)
        scratch = set()
        for argument, given in zip(launch.kernel.arg_names, compiled.arguments, strict=True):
            if argument in repeated.SCRATCH and given is not None:
                scratch.add(given[0])
                assert given[1:] == tuple(expected[argument])[1:]
            else:
                assert seen(given) == seen(expected[argument]), argument
        assert len(scratch) == (0 if design != "flags" else 2 if problem.is_pair else 1)


def test_the_key_tells_problems_apart_that_need_another_launch(device):
    problem = layer(20, 40, 64, 8, FP16, device)
    key = repeated.key(problem, True, None)
    assert repeated.key(clones(problem), True, None) == key
    rows = torch.zeros(21, 64, dtype=FP16, device=device)
    shifted = torch.zeros(20 * 64 + 1, dtype=FP16, device=device)[1:].view(20, 64)
    others = [
        problem._replace(x=rows), problem._replace(x=shifted), problem._replace(x=problem.x.t().contiguous().t()),
        problem._replace(x=problem.x.bfloat16()), problem._replace(x=problem.x.to("meta")),
        problem._replace(scaling=3.0), problem._replace(bias=None), problem._replace(d_shrink=problem.d_shrink.float()),
        problem._replace(dropout_p=0.5, seed=torch.tensor(1)), problem._replace(masks_update=True),
    ]  # fmt: skip
    keys = {key, repeated.key(problem, False, None), repeated.key(problem, True, FLAGS)}
    keys |= {repeated.key(other, True, None) for other in others}
    assert len(keys) == len(others) + 3
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision != "high" else "highest")
    try:
        assert repeated.key(problem, True, None) not in keys
    finally:
        torch.set_float32_matmul_precision(precision)
