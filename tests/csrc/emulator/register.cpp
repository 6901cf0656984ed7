// The kernels that csrc/register.cpp launches, from libraries of the emulated machine: the test hands over their
// entries.
#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>
#include <string>

#include "lora_linear_sm80.h"
#include "lora_linear_sm90.h"

using linlora::LoraLinear;

namespace {

struct Entries {
  const char* (*sm80)(const LoraLinear*, int multiprocessors, unsigned seed);
  const char* (*sm90)(const LoraLinear*, uint32_t* counters, void* scratch, int clusters, int resident, unsigned seed);
  const char* (*obstacle)(const LoraLinear*);
  int64_t (*counters)(const LoraLinear*);
  int64_t (*scratch)(const LoraLinear*);
} entries;

template <class Launch>
cudaError_t checked(Launch launch) {
  if (!has_context) throw std::runtime_error("emulated: a launch in a thread without a context");
  if (const char* error = launch()) throw std::runtime_error(std::string("emulated: ") + error);
  return cudaSuccess;
}

}  // namespace

extern "C" void set_entries(const Entries* given) { entries = *given; }

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }

namespace linlora {

cudaError_t lora_linear_sm80(const LoraLinear& problem, cudaStream_t) {
  return checked([&] { return entries.sm80(&problem, 2, 0); });
}
cudaError_t lora_linear_sm90(const LoraLinear& problem, Workspace workspace, cudaStream_t) {
  return checked([&] { return entries.sm90(&problem, workspace.counters, workspace.scratch, 1, 1, 0); });
}
const char* lora_linear_sm90_obstacle(const LoraLinear& problem) { return entries.obstacle(&problem); }
int64_t lora_linear_sm90_counters(const LoraLinear& problem) { return entries.counters(&problem); }
int64_t lora_linear_sm90_scratch(const LoraLinear& problem) { return entries.scratch(&problem); }

}  // namespace linlora
