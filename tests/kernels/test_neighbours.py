"""The neighbours of a row: few, each another, each with room on its architecture."""

from dataclasses import asdict

import pytest
from linlora.kernels.configs import SHARED_LIMIT, TABLE, Config
from linlora.kernels.neighbours import CHANGES, changed, neighbours

ROWS = [(row, architecture) for row in TABLE for architecture in row.architectures]
WITH_PRODUCTS = ("recompute", "flags", "tiles", "online")


@pytest.mark.parametrize(("row", "architecture"), ROWS, ids=lambda of: str(getattr(of, "config", of)))
def test_neighbours_of_a_row_differ_from_it_in_what_their_change_says(row, architecture):
    near = neighbours(row.config, row.itemsize, architecture)
    assert near == neighbours(row.config, row.itemsize, architecture)
    assert len(set(near.values())) == len(near) <= 6
    assert row.config not in near.values()
    assert bool(near) <= (row.config.design in WITH_PRODUCTS)
    for change, config in near.items():
        before, after = asdict(row.config), asdict(config)
        assert {field for field in before if before[field] != after[field]} == set(CHANGES[change])
        assert changed(row.config, change, row.itemsize, architecture) == config
        assert config.num_warps in (4, 8)
        assert min(config.block_n, config.num_stages) > 0


def test_every_row_with_16_bit_products_has_a_neighbour():
    served = [(row, on) for row, on in ROWS if row.config.design in WITH_PRODUCTS and row.itemsize == 2]
    assert all(neighbours(row.config, 2, architecture) for row, architecture in served)


def test_a_change_for_which_there_is_no_room_is_none():
    wide = Config("flags", 128, 256, 64, 64, num_warps=8, num_stages=4)  # 96 KiB of operands and 128 registers of y
    assert set(neighbours(wide, 2, 90)) == {"num_stages-1", "block_n/2", "group_m/2"}
    with_room = Config("flags", 128, 128, 64, 64, num_warps=8, num_stages=4)
    assert {"num_stages+1", "block_n*2"} <= set(neighbours(with_room, 2, 90))
    assert SHARED_LIMIT[80] < 5 * (128 + 128) * 64 * 2
    assert "num_stages+1" not in neighbours(with_room, 2, 80)


def test_what_a_design_does_not_read_is_not_changed():
    few_rows = Config("recompute", 16, 64, 64, 64, num_warps=4, num_stages=3)
    assert "group_m/2" not in neighbours(few_rows, 2, 90)  # one row of tiles is one group
    assert "halves" not in neighbours(few_rows, 2, 90)
    attention = Config("online", 64, 64, 64, 64, num_warps=8, num_stages=2)
    assert "group_m/2" not in neighbours(attention, 2, 90)
    attention = Config("online", 128, 32, 128, 128, num_warps=8, num_stages=2)
    assert neighbours(attention, 2, 90)["halves"] == Config("online", 64, 32, 128, 128, num_warps=4, num_stages=2)
    for design in ("split", "rows", "elements", "gather"):
        assert neighbours(Config(design, 64, 64, 64, 64, num_warps=4, num_stages=3), 2, 90) == {}


def test_no_change_is_the_row_and_an_unknown_one_an_error():
    row = Config("tiles", 64, 128, 64, 0, num_warps=4, num_stages=3)
    assert changed(row, "", 2, 90) == row
    with pytest.raises(KeyError):
        changed(row, "block_k*2", 2, 90)
