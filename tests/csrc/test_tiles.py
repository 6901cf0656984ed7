"""What the portable kernel decides with integers alone: tile shapes, the order of tiles, where elements lie."""

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

COLUMNS = (16, 32, 64, 128)  # of tiles in shared memory


@pytest.fixture(scope="module")
def library(build_emulated):
    return build_emulated("lora_linear_sm80")


@pytest.fixture(scope="module")
def tile_at(library):
    """The row and column of a tile, by its number."""

    def tile_at(row_tiles, column_tiles, tile):
        place = (ctypes.c_int64 * 2)()
        library.tile_at(*map(ctypes.c_int64, (row_tiles, column_tiles, tile)), place)
        return tuple(place)

    return tile_at


@pytest.fixture(scope="module")
def choose_tile(library):
    """The rows of a tile (of both streams), for a problem."""

    def choose_tile(m, n, streams, multiprocessors):
        return library.choose_tile(ctypes.c_int64(m), ctypes.c_int64(n), streams, multiprocessors)

    return choose_tile


def offsets(library, columns, by_rows=0, by_columns=0):
    """Where the elements of a tile of 128 rows lie, and where `move` goes from each."""
    at, moved = np.empty((128, columns), np.uint32), np.empty((128, columns), np.uint32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (at, moved)]
    library.tile_offsets(columns, *pointers, by_rows, by_columns)
    return at, moved


@given(st.integers(1, 60), st.integers(1, 60))
def test_every_tile_is_computed_once(tile_at, row_tiles, column_tiles):
    places = {tile_at(row_tiles, column_tiles, tile) for tile in range(row_tiles * column_tiles)}
    assert places == {(row, column) for row in range(row_tiles) for column in range(column_tiles)}


@given(st.integers(1, 2**20), st.integers(1, 2**20), st.data())
def test_the_order_of_very_many_tiles(tile_at, row_tiles, column_tiles, data):
    tile = data.draw(st.integers(0, row_tiles * column_tiles - 1))
    row, column = tile_at(row_tiles, column_tiles, tile)
    assert 0 <= row < row_tiles
    assert 0 <= column < column_tiles
    band = min(8, row_tiles - row // 8 * 8)
    assert tile == row // 8 * 8 * column_tiles + column * band + row % 8


def test_tiles_in_flight_share_rows_and_columns(tile_at):
    places = [tile_at(64, 32, tile) for tile in range(132)]
    rows, columns = ({place[i] for place in places} for i in (0, 1))
    assert len(rows) + len(columns) <= 8 + 17, "a wave reads 8 rows of tiles of x and 17 of W, not 5 and 32"


@pytest.mark.parametrize("columns", COLUMNS)
def test_elements_of_a_tile_lie_in_places_of_their_own(library, columns):
    at, _ = offsets(library, columns)
    assert sorted(at.flatten()) == list(range(0, 128 * columns * 2, 2))


@pytest.mark.parametrize("columns", COLUMNS)
def test_chunks_stay_whole_and_rows_in_place(library, columns):
    at, _ = offsets(library, columns)
    chunks = at.reshape(128, columns // 8, 8)
    assert (chunks - chunks[..., :1] == 2 * np.arange(8)).all()
    assert (chunks[..., 0] % 16 == 0).all()
    assert (at // (2 * columns) == np.arange(128)[:, None]).all()


@pytest.mark.parametrize("columns", COLUMNS)
def test_ldmatrix_reads_every_bank_once(library, columns):
    at, _ = offsets(library, columns)
    for first in range(0, 128, 8):
        for chunk in range(0, columns, 8):
            sixteenths = at[first : first + 8, chunk] // 16 % 8
            assert sorted(sixteenths) == list(range(8)), f"rows from {first}, column {chunk}"


@pytest.mark.parametrize("columns", COLUMNS)
def test_fragments_are_written_to_every_bank_once(library, columns):
    at, _ = offsets(library, columns)
    lanes = np.arange(32)
    for row in range(0, 128, 8):
        for column in range(0, columns, 8):
            banks = at[row + lanes // 4, column + lanes % 4 * 2] // 4 % 32
            assert sorted(banks) == list(range(32)), f"rows from {row}, columns from {column}"


@pytest.mark.parametrize("columns", COLUMNS)
def test_move_goes_where_offset_says(library, columns):
    for rows in (0, 8, 16, 64):
        for by in (0, 8, 16, 32, 64):
            at, moved = offsets(library, columns, rows, by)
            from_rows = np.arange(128 - rows)
            from_columns = np.array([c for c in range(columns) if by == 0 or (not c & by and c + by < columns)], int)
            if from_columns.size:
                there = at[np.ix_(from_rows + rows, from_columns + by)]
                assert (moved[np.ix_(from_rows, from_columns)] == there).all(), f"{rows} rows and {by} columns further"


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([1, 2]), st.sampled_from([1, 46, 108, 132]))
def test_tiles_fit_the_problem(choose_tile, m, n, streams, multiprocessors):
    rows = choose_tile(m, n, streams, multiprocessors)
    assert rows in (16, 64, 128)
    assert (rows == 16) == (m <= 16)
    if rows == 128:
        assert -(-m * streams // 128) * -(-n // 128) >= multiprocessors, "some would have no work"


@given(st.integers(1, 64), st.integers(1, 20_000), st.sampled_from([1, 108, 132]))
def test_few_rows_read_the_weight_once(choose_tile, m, n, multiprocessors):
    assert m <= choose_tile(m, n, 1, multiprocessors)
