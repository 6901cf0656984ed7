// The portable kernel: any GPU from sm_80 on, float16 and bfloat16, no dropout.
#pragma once

#ifdef LINLORA_EMULATE
#include "emulator/language.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "lora_linear.h"

namespace linlora {

// Launches `problem` on `stream`, which must belong to the current device; any shapes, strides and alignments that
// lora_linear.h allows, ranks from 1 on. Returns the error of the launch.
cudaError_t lora_linear_sm80(const LoraLinear& problem, cudaStream_t stream);

}  // namespace linlora
