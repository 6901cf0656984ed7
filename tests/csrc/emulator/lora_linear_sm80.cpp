#include "lora_linear_sm80.h"

#include "scheduler.cuh"
#include "swizzle.cuh"
#include "launch.h"

// Null when all went well, else what went wrong; the text lasts until the next call.
extern "C" const char* emulate_lora_linear_sm80(const linlora::LoraLinear* problem, int multiprocessors,
                                                unsigned seed) {
  return linlora::emulator::emulate(*problem, multiprocessors, seed,
                                    [&] { return linlora::lora_linear_sm80(*problem, nullptr); });
}

// What the kernel decides with integers alone, for tests over many shapes.

extern "C" int choose_tile(int64_t m, int64_t n, int streams, int multiprocessors) {
  return static_cast<int>(linlora::choose_tile(m, n, streams, multiprocessors));
}

extern "C" void tile_at(int64_t row_tiles, int64_t column_tiles, int64_t tile, int64_t* row_and_column) {
  const linlora::TileOrder::Place place = linlora::TileOrder{row_tiles, column_tiles}.at(tile);
  row_and_column[0] = place.row;
  row_and_column[1] = place.column;
}

namespace {

template <int kColumns>
using Rows128 = linlora::SharedTile<128, kColumns>;

template <int kColumns>
void offsets(uint32_t* offsets, uint32_t* moved, int rows, int columns) {
  for (int row = 0; row < 128; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      *offsets++ = Rows128<kColumns>::offset(row, column);
      *moved++ = Rows128<kColumns>::move(Rows128<kColumns>::offset(row, column), rows, columns);
    }
  }
}

}  // namespace

// Of every element of a tile of 128 rows, and of the elements that SharedTile::move goes to from there.
extern "C" void tile_offsets(int tile_columns, uint32_t* at, uint32_t* moved, int rows, int columns) {
  switch (tile_columns) {
    case 16:
      return offsets<16>(at, moved, rows, columns);
    case 32:
      return offsets<32>(at, moved, rows, columns);
    case 64:
      return offsets<64>(at, moved, rows, columns);
    case 128:
      return offsets<128>(at, moved, rows, columns);
  }
}
