// Tensor maps: what TMA knows of a tensor in global memory and of the boxes that it moves. Made on the host, for a
// launch.
#pragma once

#include "device.cuh"
#include "lora_linear.h"

namespace linlora::sm90 {

// A tensor of 16-bit elements, innermost dimension first, in boxes whose rows are 64 elements and swizzled.
struct TensorShape {
  void* data;
  uint64_t columns, rows, layers;
  int64_t row_stride, layer_stride;  // in elements; columns are contiguous
  uint32_t box_rows;
};

}  // namespace linlora::sm90

#ifdef LINLORA_EMULATE
#include "emulator/tensor_map_sm90.h"
#else

#include <cuda.h>

namespace linlora::sm90 {

using TensorMap = CUtensorMap;

// The driver's function, found at run time: nothing links to libcuda. Null where the driver has none.
inline auto encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return encode;
}

static_assert(static_cast<int>(CUDA_ERROR_INVALID_VALUE) == cudaErrorInvalidValue &&
                  static_cast<int>(CUDA_ERROR_INVALID_CONTEXT) == cudaErrorDeviceUninitialized &&
                  static_cast<int>(CUDA_ERROR_NOT_SUPPORTED) == cudaErrorNotSupported,
              "an error of the driver is read as one of the runtime");

inline cudaError_t encode(TensorMap& map, Type type, int dimensions, const TensorShape& shape) {
  if (encoder() == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[3] = {shape.columns, shape.rows, shape.layers};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(2 * shape.row_stride),
                                 static_cast<cuuint64_t>(2 * shape.layer_stride)};
  const cuuint32_t box[3] = {64, shape.box_rows, 1}, element_strides[3] = {1, 1, 1};
  const CUresult result =
      encoder()(&map, type == Type::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                dimensions, shape.data, sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<cudaError_t>(result);  // the driver's own: both number errors alike
}

}  // namespace linlora::sm90
#endif
