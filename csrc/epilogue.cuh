// The end of a tile: the low-rank update, and the way of the sums to memory.
#pragma once

#include "copy.cuh"
#include "mma.cuh"

namespace linlora {

// y += s p eᵀ in a warp's fragments (kM of 16 rows by kN of 8 columns, from (row, column) of the tile on), for `ranks`
// columns of p (rows by ranks) and of e (columns by ranks), from p_column and e_column on. What lies beyond, up to a
// multiple of 16, is zero. The product is scaled as a sum of float32.
template <class PTile, class ETile, class Type, int kM, int kN>
__device__ __forceinline__ void add_product(float (&y)[kM][kN][4], float scaling, int ranks, uint32_t p, int p_column,
                                            uint32_t e, int e_column, int row, int column) {
  p += rows_offset<PTile>(row);
  e += columns_offset<ETile>(column, column + 8);
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    float sum[kM][2][4] = {};
#pragma unroll 1
    for (int k = 0; k < ranks; k += 16) {
      uint32_t p_fragment[4], e_fragment[4];
      ldmatrix(e_fragment, ETile::move(e, 8 * n, e_column + k));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ldmatrix(p_fragment, PTile::move(p, 16 * m, p_column + k));
        mma_m16n8k16<Type>(sum[m][0], p_fragment, e_fragment[0], e_fragment[1]);
        mma_m16n8k16<Type>(sum[m][1], p_fragment, e_fragment[2], e_fragment[3]);
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) y[m][n + i / 4][i % 4] += scaling * sum[m][i / 4][i % 4];
    }
  }
}

// Rounds d to rows `row` to row + 15, columns `column` to column + 7 of a tile.
template <class Tile, class Type>
__device__ __forceinline__ void store_fragment(const float (&d)[4], uint32_t tile, int row, int column) {
  const int lane = lane_index(), i = row + lane / 4, j = column + lane % 4 * 2;
  store_shared(tile + Tile::offset(i, j), pack<Type>(d[0], d[1]));
  store_shared(tile + Tile::offset(i + 8, j), pack<Type>(d[2], d[3]));
}

// Columns first_column to first_column + kColumns of a tile in shared memory become the block of `destination` from
// (row, column) on; what lies outside is dropped.
template <class Tile, int kColumns, int kThreads>
__device__ __forceinline__ void store_tile(uint32_t tile, int first_column, const Operand& destination, int row,
                                           int column) {
  constexpr int kChunks = kColumns / 8;
#pragma unroll 1
  for (int chunk = threadIdx.x; chunk < Tile::kRows * kChunks; chunk += kThreads) {
    const int i = chunk / kChunks, j = chunk % kChunks * 8;
    const int elements = destination.columns - column - j;
    if (row + i >= destination.rows || elements <= 0) continue;
    const uint4 bits = load_shared<uint4>(tile + Tile::offset(i, first_column + j));
    unsigned char* to = destination.at(row + i, column + j);
    if (destination.vectors) {
      store_global(to, bits);
      continue;
    }
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const auto element = static_cast<uint16_t>(words[e / 2] >> e % 2 * 16);
      if (e < elements) store_global(to + 2 * e * destination.column_stride, element);
    }
  }
}

}  // namespace linlora
