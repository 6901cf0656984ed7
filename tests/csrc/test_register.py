"""The operator's own source, csrc/register.cpp, on the CPU: its checks, allocations and choice, over emulated kernels.

In a process of its own: the operator stays registered for the CPU in it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled import csrc

PROGRAM = """
import ctypes, json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import conftest, emulated
from emulator import build
from linlora.kernels.packing import pack

class Entries(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("sm80", "sm90", "obstacle", "counters", "scratch")]

operator = ctypes.CDLL(str(build.build_operator(Path(torch.__file__).parent, sys.argv[2])))
kernels = {name: ctypes.CDLL(str(build.build(f"lora_linear_{name}"))) for name in ("sm80", "sm90")}
entries = Entries(*(ctypes.cast(getattr(kernels[of], name), ctypes.c_void_p).value for of, name in (
    ("sm80", "emulate_lora_linear_sm80"), ("sm90", "emulate_lora_linear_sm90_in"),
    *(("sm90", f"lora_linear_sm90_{name}") for name in ("obstacle", "counters", "scratch")))))
operator.set_entries(ctypes.byref(entries))
run = torch.ops.linlora_cuda.lora_linear
torch.manual_seed(0)

def call(launch, save=True, primal=True, **options):
    tensors, numbers = pack(launch.problem)
    return run(tensors, *numbers, save, primal, **options)

for m, kernel in ((100, 90), (100, 80), (100, 0), (9, 0)):
    for form in ("pair", "short"):
        for streams in (1, 2):
            for save, primal in ((True, True), (False, streams == 1)):
                launch = conftest.random_problem(m, 72, 40, 5, form=form, streams=streams, primal=primal, saves=save,
                                                 factor_dtype=torch.float32 if primal else torch.bfloat16)
                found = call(launch, save, primal, kernel=kernel)
                names = [name for name, output in emulated.poisoned(launch.problem, save, primal)._asdict().items()
                         if output is not None]
                assert len(found) == len(names)
                conftest.check_outputs(launch, dict(zip(names, found)))
                assert all(output.is_contiguous() for output in found)

plain = conftest.random_problem(100, 72, 40, 5)
mixed = plain.with_changes(shrink=plain.problem.shrink.to(torch.bfloat16))  # float32 where any factor is
conftest.check_outputs(mixed, dict(zip(("y", "u", "c"), call(mixed))))
counters = torch.zeros(64, dtype=torch.int32)
assert torch.equal(call(plain, counters=counters, kernel=90)[0], call(plain, kernel=90)[0])
assert not counters.any()
empty = conftest.random_problem(0, 72, 40, 5)
assert [tuple(output.shape) for output in call(empty)] == [(0, 72), (0, 5), (0, 5)]

def refusal(launch, **options):
    try:
        call(launch, **options)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "not refused"

x, weight = plain.problem.x, plain.problem.weight
print(json.dumps({
    "dtype": refusal(plain.with_changes(x=x.float())),
    "weight dtype": refusal(plain.with_changes(weight=weight.half())),
    "weight strides": refusal(plain.with_changes(weight=torch.zeros(144, 80, dtype=x.dtype)[::2, ::2])),
    "shape": refusal(plain.with_changes(d_expand=plain.problem.d_expand[:70])),
    "bias": refusal(plain.with_changes(bias=plain.problem.bias[:3])),
    "half a pair": refusal(plain.with_changes(expand=None)),
    "missing": refusal(plain.with_changes(shrink=None)),
    "rank": refusal(conftest.random_problem(100, 72, 40, 257)),
    "dropout": refusal(plain.with_changes(dropout_p=0.1)),
    "kernel": refusal(plain, kernel=70),
    "kernel 90": refusal(conftest.random_problem(9, 72, 40, 5), kernel=90),
    "counters": refusal(plain, counters=torch.zeros(1, dtype=torch.int32), kernel=90),
    "counters' dtype": refusal(plain, counters=torch.zeros(64), kernel=90),
}))
"""


@pytest.fixture(scope="module")
def refusals(builder):
    """What the operator says of arguments that are wrong, once it has been right about all others."""
    if not (Path(torch.__file__).parent / "include/torch/csrc/stable/library.h").exists():
        pytest.skip("torch's headers are not installed")
    version = f"-DTORCH_TARGET_VERSION={csrc.target_version()}"
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), version]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("dtype", "x is float16 or bfloat16, got Float (100, 40)"),
        ("weight dtype", "weight is BFloat16 like x, got Half (72, 40)"),
        ("weight strides", "weight is contiguous along a dimension, got strides "),
        ("shape", "d_expand is (72, 5) on cuda:"),
        ("bias", "bias is (72,) on cuda:"),
        ("half a pair", "d_shrink and expand come together, or neither does"),
        ("missing", "shrink is missing"),
        ("rank", "the rank is in 1..256, got 257"),
        ("dropout", "dropout_p is 0.1: the CUDA kernels have no dropout"),
        ("kernel", "kernel is 0, 80 or 90, got 70"),
        ("kernel 90", "kernel 90 cannot compute this: up to 64 rows"),
        ("counters", "counters is int32, contiguous, of at least "),
        ("counters' dtype", "counters is int32, contiguous, of at least "),
    ],
)
def test_an_argument_that_is_wrong_is_refused_by_name(refusals, case, said):
    assert f"linlora_cuda::lora_linear: {said}" in refusals[case]
