// Tiles of activations and of the weight, from global to shared memory and back.
#pragma once

#include "lora_linear.h"
#include "ptx.cuh"
#include "swizzle.cuh"

namespace linlora {

// A matrix of 16-bit elements as the copies see it. `vectors`: its rows are made of aligned chunks of 16 bytes.
struct Operand {
  unsigned char* data;
  int rows, columns;
  int64_t row_stride, column_stride;
  bool vectors;

  Operand() = default;
  explicit Operand(const Matrix& matrix)
      : data(static_cast<unsigned char*>(matrix.data)),
        rows(data == nullptr ? 0 : static_cast<int>(matrix.rows)),
        columns(static_cast<int>(matrix.columns)),
        row_stride(matrix.row_stride),
        column_stride(matrix.column_stride),
        vectors(column_stride == 1 && columns % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                (rows <= 1 || row_stride % 8 == 0)) {}

  __device__ unsigned char* at(int row, int column) const {
    return data + 2 * (row * row_stride + column * column_stride);
  }
};

inline Operand transposed(Matrix matrix) {
  return Operand({matrix.data, matrix.columns, matrix.rows, matrix.column_stride, matrix.row_stride});
}

// Where a thread begins, of its share in copying tiles of `source`: what is left of the matrix from there on, its
// address and that in the tile.
struct CopyStart {
  int rows_left, columns_left;
  const unsigned char* from;
  uint32_t to;

  CopyStart() = default;
  __device__ CopyStart(const Operand& source, int row, int column, uint32_t to)
      : rows_left(source.rows - row), columns_left(source.columns - column), from(source.at(row, column)), to(to) {
    keep(rows_left);
    keep(columns_left);
    keep(from);
    keep(this->to);
  }
};

// Copies tiles to shared memory; every thread the same chunk of each kRowStep-th row.
template <class Tile, int kThreads>
struct TileCopy {
  // For tiles from (row, column) on.
  __device__ static CopyStart start(const Operand& source, int row, int column) {
    const int my_row = threadIdx.x / Tile::kChunks, my_column = threadIdx.x % Tile::kChunks * 8;
    return CopyStart(source, row + my_row, column + my_column, Tile::offset(my_row, my_column));
  }

  // The tile `rows` and `columns` further on; zeros outside of the matrix. It is there when the thread's cp.async are
  // (without `vectors`, at once) and all threads have met.
  __device__ __forceinline__ static void copy(const Operand& source, const CopyStart& start, uint32_t tile, int rows,
                                              int columns) {
    const int rows_left = start.rows_left - rows, elements = start.columns_left - columns;
    uint32_t to = tile + start.to;
    if (source.vectors) {
      const unsigned char* from = start.from + 2 * (rows * source.row_stride + columns);
#pragma unroll
      for (int i = 0; i < kCopies; ++i, from += 2 * kRowStep * source.row_stride) {
        cp_async(to + i * kRowStep * Tile::kRowBytes, from, elements > 0 && i * kRowStep < rows_left);
      }
      return;
    }
    const unsigned char* from = start.from + 2 * (rows * source.row_stride + columns * source.column_stride);
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      uint32_t bits[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const bool exists = e < elements && i * kRowStep < rows_left;
        bits[e] = exists ? load_global<uint16_t>(from + 2 * e * source.column_stride) : 0;
      }
      store_shared(to, uint4{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16,
                             bits[6] | bits[7] << 16});
      from += 2 * kRowStep * source.row_stride;
      to += kRowStep * Tile::kRowBytes;
    }
  }

 private:
  static constexpr int kRowStep = kThreads / Tile::kChunks, kCopies = Tile::kRows / kRowStep;
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kRowStep == 0, "every thread has the same share");
  static_assert(kRowStep % Tile::kPeriod == 0, "all its rows are permuted alike");
};

}  // namespace linlora
