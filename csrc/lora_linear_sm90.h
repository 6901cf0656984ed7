// lora_linear on Hopper (sm_90a): float16 or bfloat16, more than 64 rows.
#pragma once

#ifdef LINLORA_EMULATE
#include "emulator/language.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <cstddef>

#include "lora_linear.h"

namespace linlora {

// What a launch borrows from its caller, who sees to it that no two launches use it at the same time.
struct Workspace {
  uint32_t* counters;  // zeros before the first launch; every launch leaves them zero again
  void* scratch;       // any contents, aligned to 128 bytes
};

// Why this kernel does not compute `problem` (a sentence without its full stop), or null: it does.
const char* lora_linear_sm90_obstacle(const LoraLinear& problem);

// The number of counters, and the bytes of scratch. For problems without an obstacle.
int64_t lora_linear_sm90_counters(const LoraLinear& problem);
int64_t lora_linear_sm90_scratch(const LoraLinear& problem);

// One launch on `stream` of the current device, of compute capability 9.0. For problems without an obstacle.
cudaError_t lora_linear_sm90(const LoraLinear& problem, Workspace workspace, cudaStream_t stream);

}  // namespace linlora
