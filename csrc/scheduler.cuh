// Which shape of tile serves a problem, and which tile a block computes.
#pragma once

#include "device.cuh"

namespace linlora {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// All tiles of an output, in bands of kBand rows of tiles; in a band column by column. Blocks that run at the same time
// then share their rows of x, and the columns of W, in the second-level cache.
struct TileOrder {
  static constexpr int64_t kBand = 8;
  int64_t row_tiles, column_tiles;

  struct Place {
    int64_t row, column;
  };

  __host__ __device__ int64_t tiles() const { return row_tiles * column_tiles; }

  __host__ __device__ Place at(int64_t tile) const {
    const int64_t band = tile / (kBand * column_tiles), first = band * kBand, within = tile - first * column_tiles,
                  rows = row_tiles - first < kBand ? row_tiles - first : kBand;
    return {first + within % rows, within / rows};
  }
};

// Rows of x in a tile; with two streams kPanel and kSquare have half as many of x and of its tangent each.
enum class TileShape { kRow = 16, kPanel = 64, kSquare = 128 };

// kRow and kPanel take 64 columns, kSquare 128. Up to 16 and 64 rows, x is one row of tiles, W is read once, and
// reading it is what takes the time. Beyond, the square reads least, unless it leaves multiprocessors without work.
constexpr TileShape choose_tile(int64_t m, int64_t n, int streams, int multiprocessors) {
  if (m <= 16) return TileShape::kRow;
  if (m * streams <= 64) return TileShape::kPanel;
  const int64_t squares = ceil_div(m * streams, 128) * ceil_div(n, 128);
  return squares < multiprocessors ? TileShape::kPanel : TileShape::kSquare;
}

}  // namespace linlora
