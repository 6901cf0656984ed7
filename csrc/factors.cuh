// Tiles of the low-rank factors: float32 or 16 bits, any strides, 16 bits in shared memory. They are small and few, and
// go through the registers: loaded early, converted and stored when the tile in shared memory is free.
#pragma once

#include "lora_linear.h"
#include "ptx.cuh"
#include "swizzle.cuh"

namespace linlora {

struct Factor {
  const unsigned char* data;
  int rows, columns;
  int64_t row_stride, column_stride;
  bool is_float32, vectors;

  Factor() = default;
  Factor(const Matrix& matrix, Type type)
      : data(static_cast<const unsigned char*>(matrix.data)),
        rows(data == nullptr ? 0 : static_cast<int>(matrix.rows)),
        columns(static_cast<int>(matrix.columns)),
        row_stride(matrix.row_stride),
        column_stride(matrix.column_stride),
        is_float32(type == Type::kFloat32),
        vectors(is_float32 && column_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                (rows <= 1 || row_stride % 4 == 0)) {}

  __device__ int64_t size() const { return is_float32 ? 4 : 2; }
  __device__ const unsigned char* at(int row, int column) const {
    return data + size() * (row * row_stride + column * column_stride);
  }
};

template <class Type>
__device__ __forceinline__ float load_number(const Factor& factor, int row, int column) {
  const unsigned char* element = factor.at(row, column);
  return factor.is_float32 ? load_global<float>(element) : widen<Type>(load_global<uint16_t>(element));
}

// Tiles of a factor on their way, in the registers of the block's threads; zeros outside of the factor. A thread has
// four neighbours (a quad) in every kRowStep-th row, as they are in memory: until `store` nobody waits for them.
template <class Type, int kRows, int kColumns, int kThreads>
class FactorTiles {
 public:
  // Of tiles from (row, column) on.
  __device__ FactorTiles(const Factor& factor, int row, int column)
      : factor_(factor),
        rows_left_(factor.rows - row - my_row()),
        columns_left_(factor.columns - column - my_column()),
        from_(factor.at(row + my_row(), column + my_column())) {
    keep(rows_left_);
    keep(columns_left_);
    keep(from_);
  }

  // The tile `columns` further on.
  __device__ __forceinline__ void load(int columns) {
    const int elements = columns_left_ - columns;
    const unsigned char* from = from_ + factor_.size() * columns * factor_.column_stride;
#pragma unroll
    for (int i = 0; i < kQuads; ++i, from += factor_.size() * kRowStep * factor_.row_stride) {
      uint32_t (&quad)[4] = quads_[i];
      quad[0] = quad[1] = quad[2] = quad[3] = 0;
      if (i * kRowStep >= rows_left_) continue;
      if (factor_.vectors && elements >= 4) {
        const uint4 bits = load_global<uint4>(from);
        quad[0] = bits.x, quad[1] = bits.y, quad[2] = bits.z, quad[3] = bits.w;
        continue;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (e >= elements) continue;
        const unsigned char* element = from + factor_.size() * e * factor_.column_stride;
        quad[e] = factor_.is_float32 ? load_global<uint32_t>(element) : load_global<uint16_t>(element);
      }
    }
  }

  // Into a tile in shared memory, from (first_row, first_column) of it on.
  template <class Tile>
  __device__ __forceinline__ void store(uint32_t tile, int first_row, int first_column) const {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      store_shared(tile + Tile::offset(first_row + my_row() + i * kRowStep, first_column + my_column()),
                   factor_.is_float32 ? rounded(quads_[i]) : packed(quads_[i]));
    }
  }

 private:
  static constexpr int kRowStep = kThreads / (kColumns / 4), kQuads = kRows / kRowStep;
  static_assert(kThreads % (kColumns / 4) == 0 && kRows % kRowStep == 0, "every thread has the same share");

  __device__ static int my_row() { return threadIdx.x / (kColumns / 4); }
  __device__ static int my_column() { return threadIdx.x % (kColumns / 4) * 4; }

  __device__ static uint2 packed(const uint32_t (&quad)[4]) {
    return {quad[0] | quad[1] << 16, quad[2] | quad[3] << 16};
  }
  __device__ static uint2 rounded(const uint32_t (&quad)[4]) {
    return {pack<Type>(__uint_as_float(quad[0]), __uint_as_float(quad[1])),
            pack<Type>(__uint_as_float(quad[2]), __uint_as_float(quad[3]))};
  }

  const Factor& factor_;
  int rows_left_, columns_left_;
  const unsigned char* from_;
  uint32_t quads_[kQuads][4];
};

}  // namespace linlora
