"""The configuration table and the function that picks from it."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from linlora.kernels import aot_cases
from linlora.kernels.configs import TABLE, Config, select, select_by_size, split
from linlora.kernels.linearized_lora_linear_flags import describable

from linlora import kernels

H100 = {"architecture": 90, "multiprocessors": 132}


@pytest.mark.parametrize("dropout", [False, True], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("op", ["linearized_lora_linear", "lora_linear", "factor_gradients"])
def test_every_rank_and_shape_is_served(op, architecture, itemsize, dropout):
    for rank in (1, 16, 17, 64, 65, 128, 256):
        for m in (1, 16, 17, 512, 100_000):
            select(
                op, m=m, n=4096, rank=rank, itemsize=itemsize, architecture=architecture, multiprocessors=132,
                dropout=dropout,
            )  # fmt: skip


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(
    "op", ["grouped_lora_linear", "dual_grouped_lora_linear", "grouped_shrink", "grouped_gradients"]
)
def test_every_rank_and_shape_of_a_mixed_batch_is_served(op, architecture, itemsize):
    for rank in (1, 16, 17, 64, 65, 256):
        for m in (1, 16, 17, 512, 100_000):
            on = {"itemsize": itemsize, "architecture": architecture, "multiprocessors": 132}
            select(op, m=m, n=4096, rank=rank, **on)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_op_without_a_rank_is_served(architecture, itemsize):
    on = {"itemsize": itemsize, "architecture": architecture}
    for m in (1, 16, 17, 512, 100_000):
        select("linear", m=m, n=4096, rank=0, multiprocessors=132, **on)
    for width in (1, 2, 256, 257, 8192, 100_000):
        select_by_size("norm", size=width, **on)
    select_by_size("activation", size=0, **on)
    select_by_size("mix_inventories", size=0, **on)


def test_every_row_can_be_picked():
    picked = set()
    for row in TABLE:
        for architecture in row.architectures:
            for dropout in {False, row.dropout}:
                for m in (1, 100, 100_000):
                    for descriptors in (False, True):
                        picked.add(
                            select(
                                row.op, m=m, n=4096, rank=row.size, itemsize=row.itemsize, dropout=dropout,
                                architecture=architecture, multiprocessors=132, descriptors=descriptors,
                            )
                        )  # fmt: skip
    assert {row.config for row in TABLE} == picked


def test_flags_serve_what_descriptors_can_read_beyond_the_small_shapes():
    large = {"m": 8192, "n": 4096, "rank": 16, "itemsize": 2}
    assert select("linearized_lora_linear", **large, **H100, descriptors=True).design == "flags"
    assert select("linearized_lora_linear", **large, **H100, descriptors=False).design == "recompute"
    assert select("linearized_lora_linear", **{**large, "m": 16}, **H100, descriptors=True).design == "recompute"
    assert select("linearized_lora_linear", **large, architecture=80, multiprocessors=108).design == "recompute"


def test_describable_asks_for_16_byte_rows():
    x, weight = torch.zeros(8, 64, dtype=torch.float16), torch.zeros(32, 64, dtype=torch.float16)
    assert describable(x, weight)
    assert describable(x, weight.t().contiguous().t())
    assert not describable(x[:, 1:], weight[:, 1:])
    assert not describable(x, weight[:29])
    assert not describable(x[:, ::2], weight[:, ::2])
    assert not describable(x[:, :0], weight[:, :0])
    assert not describable(x[:1].expand(8, 64), weight)
    assert not describable(torch.zeros(120, dtype=torch.float16).as_strided((8, 64), (8, 1)), weight)  # rows overlap


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TABLE[0].config.block_m = 1


def test_no_row_serves_an_unknown_op():
    with pytest.raises(ValueError, match="no configuration of conv"):
        select("conv", m=1, n=1, rank=1, itemsize=2, **H100)
    with pytest.raises(ValueError, match="no configuration of norm serves size 1, itemsize 8"):
        select_by_size("norm", size=1, itemsize=8, architecture=90)


def test_availability_names_the_remedy(device):
    assert kernels.availability(device) is None


def test_the_package_imports_without_triton_and_says_so():
    program = """
import sys
sys.modules["triton"] = None
from linlora import kernels
print(kernels.availability("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Triton is not installed" in done.stdout


def test_k_is_split_where_multiprocessors_have_no_tile():
    row = Config("recompute", 16, 64, 128, 64, num_warps=4, num_stages=3)

    def splits(m, n, k, config=row, **on):
        return split(config, m=m, n=n, k=k, **{"itemsize": 2, "multiprocessors": 132, **on}).splits

    assert [splits(16, n, 4096) for n in (512, 1024, 2048, 4096, 8192)] == [8, 8, 4, 2, 1]
    assert splits(16, 4096, 4096, multiprocessors=64) == 1
    assert [splits(16, 1024, k) for k in (256, 1024, 2048)] == [1, 2, 4]  # four steps of K each
    assert splits(17, 1024, 4096) == splits(16, 1024, 4096, itemsize=4) == 1
    assert splits(0, 1024, 4096) == splits(16, 0, 4096) == 1


def test_every_row_is_of_an_op_that_is_compiled_ahead():
    assert {row.op for row in TABLE} == set(aot_cases.OPS)
