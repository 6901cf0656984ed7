// Fragments: what a warp's mma instructions take from tiles in shared memory, and give back to them.
#pragma once

#include "ptx.cuh"
#include "swizzle.cuh"

namespace linlora {

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// What this lane tells ldmatrix: addresses, relative to their tile, of the rows of four 8 x 8 matrices.
// SharedTile::move takes them to other fragments.

// For a: rows `row` to row + 15, the first 16 columns.
template <class Tile>
__device__ __forceinline__ uint32_t rows_offset(int row) {
  const int lane = lane_index();
  return Tile::offset(row + lane % 16, lane / 16 * 8);
}

// For two b, (b[0], b[1]) and (b[2], b[3]), from a tile whose rows are columns of the product: 8 rows from `first` and
// 8 from `second`, the first 16 columns.
template <class Tile>
__device__ __forceinline__ uint32_t columns_offset(int first, int second) {
  const int lane = lane_index();
  return Tile::offset((lane < 16 ? first : second) + lane % 8, lane / 8 % 2 * 8);
}

// For two b, by ldmatrix_transposed, from a tile whose columns are columns of the product: 16 from `column`, the first
// 16 rows.
template <class Tile>
__device__ __forceinline__ uint32_t transposed_columns_offset(int column) {
  const int lane = lane_index();
  return Tile::offset(lane % 16, column + lane / 16 * 8);
}

}  // namespace linlora
