// Tensor maps on the host: what the driver would encode, checked as the driver checks it.
#pragma once

#include "machine.h"

namespace linlora::sm90 {

struct TensorMap {
  TensorShape shape;
  int dimensions;

  int64_t box_rows() const { return shape.box_rows; }
};

inline cudaError_t encode(TensorMap& map, Type, int dimensions, const TensorShape& shape) {
  constexpr int64_t kMaxStride = int64_t{1} << 40;
  const bool strides_fit = shape.row_stride % 8 == 0 && 0 < shape.row_stride && 2 * shape.row_stride < kMaxStride &&
                           (dimensions == 2 || (shape.layer_stride % 8 == 0 && 0 < shape.layer_stride &&
                                                2 * shape.layer_stride < kMaxStride));
  const bool sizes_fit = shape.columns > 0 && shape.rows > 0 && shape.layers > 0 && shape.box_rows > 0 &&
                         shape.box_rows <= 256 && shape.columns <= UINT32_MAX && shape.rows <= UINT32_MAX;
  if (reinterpret_cast<uintptr_t>(shape.data) % 16 != 0 || !strides_fit || !sizes_fit) return cudaErrorInvalidValue;
  map = {shape, dimensions};
  return cudaSuccess;
}

}  // namespace linlora::sm90
