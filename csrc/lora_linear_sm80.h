// The portable kernel: any GPU from sm_80 on, float16 and bfloat16, no dropout.
#pragma once

#ifdef LINLORA_EMULATE
#include "emulator/language.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "lora_linear.h"

namespace linlora {

// Launches `problem` on `stream`, which must belong to the current device. Any strides and alignments that
// lora_linear.h allows, any rank, M, N and K below 2^31 - 1024 (cudaErrorInvalidValue beyond). x, W and y are copied 16
// bytes at a time where their rows are aligned to that and a multiple of it, and element by element, many times slower,
// where not. Returns the error of the launch.
cudaError_t lora_linear_sm80(const LoraLinear& problem, cudaStream_t stream);

}  // namespace linlora
