"""How the Hopper kernel divides a problem, over many shapes: integers only, no kernel runs."""

import ctypes
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

PACK, SHRINK, OUTPUT, NONE = range(4)
FIELDS = (
    "block_n", "rank_block", "tiles", "pack_tiles", "cluster_rows", "shrink_tiles", "output_tiles", "rows_of_cta",
    "units", "pack_writers", "pack_readers", "row_writers", "row_readers", "p_columns", "k_stride",
)  # fmt: skip
H200 = 66  # clusters


class Summary(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in FIELDS)


class Plan:
    """The plan of a problem of meta tensors."""

    def __init__(self, library, problem, clusters=H200):
        self.library, self.problem, self.clusters = library, problem, clusters
        self.arguments = problem.arguments(problem.outputs())
        for name in self.arguments.MATRICES[:-2]:  # present, whatever the address
            matrix = getattr(self.arguments, name)
            matrix.data = 16 if matrix.rows else None
        self.summary = Summary()
        library.plan_lora_linear_sm90(ctypes.byref(self.arguments), clusters, ctypes.byref(self.summary))

    def __getattr__(self, name):
        return getattr(self.summary, name)

    def tile(self, ticket):
        """(kind, row, column), the (stream, row) of each half by CTA, first rank or column tile."""
        numbers = (ctypes.c_int32 * 12)()
        self.library.tile_lora_linear_sm90(ctypes.byref(self.arguments), self.clusters, ticket, numbers)
        kind, row, column, *halves, last = numbers
        return kind, row, column, list(zip(halves[::2], halves[1::2], strict=True)), last

    def unit(self, index):
        numbers = (ctypes.c_int32 * 3)()
        self.library.unit_lora_linear_sm90(ctypes.byref(self.arguments), ctypes.c_int64(index), numbers)
        return tuple(numbers)

    def clocks(self, block_n):
        """When all is done, by the plan's formula and tile by tile, and the work of all; no GPU fitted them."""
        clocks = [ctypes.c_int64() for _ in range(3)]
        self.library.makespan_lora_linear_sm90(
            ctypes.byref(self.arguments), self.clusters, block_n, *map(ctypes.byref, clocks)
        )
        return tuple(clock.value for clock in clocks)


@pytest.fixture(scope="session")
def library(build_emulated):
    library = build_emulated("lora_linear_sm90")
    library.operand_sm90.restype = ctypes.c_uint64
    return library


@pytest.fixture(scope="session")
def plan_of(library, make_problem):
    def plan_of(*shape, clusters=H200, **options):
        with torch.device("meta"):
            return Plan(library, make_problem(*shape, **options), clusters)

    return plan_of


shapes = given(
    m=st.integers(65, 3000), n=st.integers(1, 2000), k=st.integers(1, 300), rank=st.integers(1, 256),
    streams=st.sampled_from([1, 2]), tangent=st.booleans(), primal=st.booleans(),
    form=st.sampled_from(["short", "pair"]), clusters=st.integers(1, 70),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@shapes
def test_tiles_cover_every_output_once(plan_of, m, n, k, rank, streams, tangent, primal, form, clusters):
    primal = primal or streams == 1
    plan = plan_of(m, n, k, rank, clusters=clusters, streams=streams, tangent=tangent, primal=primal, form=form)
    places = {SHRINK: [], OUTPUT: []}
    for ticket in range(plan.pack_tiles, plan.tiles):
        kind, _, _, halves, last = plan.tile(ticket)
        places[kind] += [(stream, row, last) for stream, row in halves]

    def wanted(streams, tiles):
        return {(stream, row, tile) for stream in streams for row in range(0, m, 64) for tile in tiles}

    for kind, expected in (
        (OUTPUT, wanted(range(0 if primal else 1, streams), range(-(-n // plan.block_n)))),
        (SHRINK, wanted(range(streams), range(0, rank, plan.rank_block))),
    ):
        assert len(places[kind]) == len(set(places[kind]))
        assert {place for place in places[kind] if place[1] < m} == expected


@settings(max_examples=60, deadline=None)
@shapes
def test_tiles_wait_for_smaller_tickets(plan_of, m, n, k, rank, streams, tangent, primal, form, clusters):
    primal = primal or streams == 1
    plan = plan_of(m, n, k, rank, clusters=clusters, streams=streams, tangent=tangent, primal=primal, form=form)
    tiles = [plan.tile(ticket) for ticket in range(plan.tiles + 1)]
    kinds = [kind for kind, *_ in tiles]
    assert kinds[: plan.pack_tiles] == [PACK] * plan.pack_tiles
    assert PACK not in kinds[plan.pack_tiles :]
    assert kinds.index(NONE) == plan.tiles
    for row in range(plan.cluster_rows):
        of_row = [(kind, halves) for kind, of, _, halves, _ in tiles if of == row and kind in (SHRINK, OUTPUT)]
        writers = [kind for kind, _ in of_row].count(SHRINK)
        assert all(kind == OUTPUT for kind, _ in of_row[writers:])
        updated = {0, 1} if form == "pair" or streams == 1 else {1}
        readers = sum(any(stream in updated for stream, _ in halves) for _, halves in of_row[writers:])
        assert (writers, readers) == (plan.row_writers, plan.row_readers)
    assert kinds.count(SHRINK) * 2 == plan.pack_readers
    assert kinds.count(PACK) * 2 == plan.pack_writers


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60),
    k=st.integers(1, 100),
    rank=st.integers(1, 40),
    form=st.sampled_from(["short", "pair"]),
    transposed=st.booleans(),
)
def test_packed_factors_are_written_once(plan_of, n, k, rank, form, transposed):
    plan = plan_of(100, n, k, rank, form=form, transposed=transposed)
    blocks, stride = 2 if form == "pair" else 1, -(-rank // 8) * 8
    assert (plan.p_columns, plan.k_stride) == (blocks * stride, -(-k // 8) * 8)
    shrink = {(1, row, column) for row in range(blocks * stride) for column in range(0, k, 8)}
    expand = {(0, row, column) for row in range(n) for column in range(0, blocks * stride, 8)}
    units = [plan.unit(index) for index in range(plan.units)]
    assert len(units) == len(set(units))
    assert set(units) == shrink | expand


def test_factors_are_packed_along_their_memory(plan_of):
    along_rank, along_k = (plan_of(100, 16, 64, 16, transposed=transposed) for transposed in (True, False))
    assert [along_rank.unit(i)[1:] for i in range(3)] == [(0, 0), (1, 0), (2, 0)]
    assert [along_k.unit(i)[1:] for i in range(3)] == [(0, 0), (0, 8), (0, 16)]


@pytest.mark.parametrize(
    ("m", "n", "streams", "block_n"),
    [(8192, 4096, 1, 256), (8192, 4096, 2, 256), (8192, 16384, 1, 256), (1024, 1024, 1, 128), (2048, 4096, 1, 128)],
)
def test_tiles_are_narrow_where_wide_ones_leave_multiprocessors_without_work(plan_of, m, n, streams, block_n):
    assert plan_of(m, n, 4096, 16, streams=streams).block_n == block_n


LAYERS = [(1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336)]  # N, K


@pytest.mark.parametrize("clusters", [57, 66], ids=["H100-PCIe", "H200"])
@pytest.mark.parametrize("rank", [16, 64])
def test_the_width_that_is_chosen_ends_first_tile_by_tile(plan_of, clusters, rank):
    for (n, k), m, streams in itertools.product(LAYERS, [128, 512, 2048, 4096, 8192], [1, 2]):
        plan = plan_of(m, n, k, rank, streams=streams, clusters=clusters)
        chosen, best = plan.clocks(plan.block_n)[1], min(plan.clocks(width)[1] for width in (128, 256))
        assert chosen <= 1.05 * best, (m, n, k, streams)


def test_the_formula_of_the_makespan_is_that_of_the_tiles_where_waits_are_hidden(plan_of):
    for (n, k), m, width in itertools.product(LAYERS[1:], [4096, 8192, 16384], [128, 256]):
        formula, simulated, work = plan_of(m, n, k, 16).clocks(width)
        assert 0.95 < formula / simulated < 1.05, (m, n, k, width)
        assert simulated >= work / H200


def test_cliffs_of_the_last_wave(plan_of):
    """Multiprocessors without work, as a share of all: what adding rows costs beyond the rows themselves."""

    def idle(m):
        plan = plan_of(m, 4096, 4096, 16)
        _, simulated, work = plan.clocks(plan.block_n)
        return 1 - work / H200 / simulated

    assert idle(8192) < 0.03  # 512 output and 32 shrink tiles in 8 waves
    assert idle(8192 + 256) > 0.07  # a ninth
    assert idle(1024) > 0.03


def test_rank_blocks(plan_of):
    assert [plan_of(100, 16, 64, rank).rank_block for rank in (1, 32, 33, 256)] == [32, 32, 64, 64]
    assert [plan_of(100, 16, 64, rank).shrink_tiles for rank in (1, 32, 64, 65, 256)] == [1, 1, 1, 2, 4]
    assert plan_of(100, 16, 64, 65, streams=2, primal=False).shrink_tiles == 4  # of 64 rows


def fields(descriptor):
    return {
        "address": (descriptor & 0x3FFF) * 16,
        "leading": (descriptor >> 16 & 0x3FFF) * 16,
        "stride": (descriptor >> 32 & 0x3FFF) * 16,
        "base": descriptor >> 49 & 7,
        "swizzle": descriptor >> 62,
    }


def test_descriptors_name_the_slices_of_a_box(library):
    assert fields(library.operand_sm90(0x8400, 0, False)) == {
        "address": 0x8400, "leading": 16, "stride": 1024, "base": 0, "swizzle": 1,
    }  # fmt: skip
    assert fields(library.operand_sm90(0x8400, 3, False))["address"] == 0x8400 + 3 * 32
    assert fields(library.operand_sm90(0x8400, 3, True)) == {
        "address": 0x8400 + 3 * 16 * 128, "leading": 64 * 128, "stride": 1024, "base": 0, "swizzle": 1,
    }  # fmt: skip


def test_outputs_lie_where_tma_looks_for_them(library):
    offsets = (ctypes.c_uint32 * 2)()
    seen = set()
    for row in range(64):
        for column in range(64):
            library.box_offsets_sm90(row, column, offsets)
            assert offsets[0] == offsets[1]
            seen.add(offsets[0])
    assert seen == set(range(0, 64 * 128, 2))
