// Which kernel computes a problem, and what it borrows for that.
#pragma once

#include <cuda_runtime_api.h>

#include "checks.h"
#include "lora_linear_sm80.h"
#include "lora_linear_sm90.h"

namespace linlora {

inline void check(const Arguments& arguments, cudaError_t error) {
  if (error != cudaSuccess) arguments.refuse(cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

#ifdef LINLORA_SM90
// Why Hopper's own kernel does not compute the problem; null: it does.
inline const char* hopper_obstacle(const Arguments& arguments, const LoraLinear& problem) {
  int major = 0;
  check(arguments, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, arguments.device()));
  return major == 9 ? lora_linear_sm90_obstacle(problem) : "this GPU is not of compute capability 9.0";
}

inline cudaError_t launch_hopper(const Arguments& arguments, const LoraLinear& problem,
                                 const std::optional<Tensor>& counters, cudaStream_t stream) {
  const int64_t count = lora_linear_sm90_counters(problem), bytes = lora_linear_sm90_scratch(problem);
  const Tensor scratch = arguments.buffer(aoti_torch_dtype_uint8(), bytes);
  const Tensor zeros = counters ? *counters : arguments.buffer(aoti_torch_dtype_int32(), count);
  if (!counters) {
    check(arguments, cudaMemsetAsync(zeros.data_ptr(), 0, count * sizeof(int32_t), stream));
  } else if (zeros.scalar_type() != ScalarType::Int || zeros.numel() < count || !zeros.is_contiguous()) {
    arguments.refuse("counters is int32, contiguous, of at least ", count, " elements, got ", described(zeros));
  }
  return lora_linear_sm90(problem, {static_cast<uint32_t*>(zeros.data_ptr()), scratch.data_ptr()}, stream);
}
#else
inline const char* hopper_obstacle(const Arguments&, const LoraLinear&) {
  return "it is not compiled in: LINLORA_CUDA_ARCHITECTURES lacked 90a";
}

inline cudaError_t launch_hopper(const Arguments&, const LoraLinear&, const std::optional<Tensor>&, cudaStream_t) {
  return cudaErrorInvalidDeviceFunction;
}
#endif

// Hopper's own kernel where it can, else the portable one; `kernel` (80 or 90) insists.
inline void launch_lora_linear(const Arguments& arguments, const LoraLinear& problem,
                               const std::optional<Tensor>& counters, int64_t kernel, cudaStream_t stream) {
  if (kernel != 0 && kernel != 80 && kernel != 90) arguments.refuse("kernel is 0, 80 or 90, got ", kernel);
  const char* obstacle = kernel == 80 ? "" : hopper_obstacle(arguments, problem);
  if (kernel == 90 && obstacle != nullptr) arguments.refuse("kernel 90 cannot compute this: ", obstacle);
  check(arguments,
        obstacle == nullptr ? launch_hopper(arguments, problem, counters, stream) : lora_linear_sm80(problem, stream));
}

}  // namespace linlora
