// The operator of the `cuda` backend, linlora_cuda::lora_linear: one stream or two, with the schema of the Triton
// operator (kernels/problem.py: the tensors of the problem in one list, in the order of `Place`, then its numbers) and
// two arguments more:
//
//   counters   a zeroed int32 buffer for kernels whose blocks talk to each other; they leave it zeroed. Without one a
//              launch zeroes its own, which is one more operation on the stream.
//   kernel     80 or 90 asks for the kernel of that architecture; 0 chooses.
//
// Only torch's stable ABI is included. Tensors come from its allocator and launches go to its current stream, so a CUDA
// graph captures a call; nothing is kept between calls.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "dispatch.h"

// Defined by CUDA builds of torch alone: weak, so that the library also loads beside a CPU build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace linlora {
namespace {

using Optional = std::optional<Tensor>;

// The tensors of kernels/problem.py's LoraLinear, in the order of its fields.
enum Place { kX, kWeight, kBias, kShrink, kExpand, kDShrink, kDExpand, kXTangent, kSeed, kTensors };

const Tensor& given(const std::vector<Optional>& tensors, Place place, const char* name) {
  if (!tensors[place]) throw std::runtime_error(std::string("linlora_cuda::lora_linear: ") + name + " is missing");
  return *tensors[place];
}

// Checks the arguments and fills the problem, but for the outputs.
LoraLinear problem_of(Arguments& arguments, const std::vector<Optional>& tensors, double scaling, bool two_streams) {
  const Tensor& x = given(tensors, kX, "x");
  const Tensor& weight = given(tensors, kWeight, "weight");
  const Tensor& shrink = given(tensors, kShrink, "shrink");
  if (weight.dim() != 2 || shrink.dim() != 2) {
    arguments.refuse("weight (N, K) and shrink (r, K) are matrices, got ", described(weight), " and ",
                     described(shrink));
  }
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), rank = shrink.size(0);
  if (rank < 1 || rank > kMaxRank) arguments.refuse("the rank is in 1..", kMaxRank, ", got ", rank);
  if (tensors[kDShrink].has_value() != tensors[kExpand].has_value()) {
    arguments.refuse("d_shrink and expand come together, or neither does (the short form, B0 = 0)");
  }
  arguments.note_factor("shrink", shrink, rank, K);
  arguments.note_factor("expand", tensors[kExpand], N, rank);
  arguments.note_factor("d_shrink", tensors[kDShrink], rank, K);
  arguments.note_factor("d_expand", given(tensors, kDExpand, "d_expand"), N, rank);

  LoraLinear problem{};
  problem.type = arguments.type();
  problem.factor_type = arguments.factor_type();
  problem.x = arguments.activation("x", x, M, K);
  if (two_streams) problem.x_tangent = arguments.activation("x_tangent", tensors[kXTangent], M, K);
  problem.weight = arguments.weight(weight, N, K);
  problem.bias = arguments.bias(tensors[kBias], N, problem.bias_type);
  problem.shrink = arguments.factor(shrink);
  problem.expand = arguments.factor(tensors[kExpand]);
  problem.d_shrink = arguments.factor(tensors[kDShrink]);
  problem.d_expand = arguments.factor(tensors[kDExpand]);
  problem.scaling = static_cast<float>(scaling);
  problem.two_streams = two_streams;
  return problem;
}

// Queues the problem on the current stream of x's device.
void run(const Arguments& arguments, const LoraLinear& problem, const Optional& counters, int64_t kernel) {
  if (problem.x.rows == 0) return;
  torch::stable::accelerator::DeviceGuard guard(arguments.device());
  // The guard sets nothing where the device is current by default, as in a thread that autograd has just started: no
  // context is bound there yet, and the driver encodes tensor maps only in one.
  check(arguments, cudaSetDevice(arguments.device()));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(arguments.device(), &stream));
  launch_lora_linear(arguments, problem, counters, kernel, static_cast<cudaStream_t>(stream));
}

// What there is of (y, y_tangent, u, c), as LoraLinear.outputs of kernels/problem.py says.
std::vector<Tensor> lora_linear(std::vector<Optional> tensors, double scaling, double dropout_p, bool two_streams,
                                bool /*masks_update*/, bool save, bool primal, Optional counters, int64_t kernel) {
  if (tensors.size() != kTensors) throw std::runtime_error("linlora_cuda::lora_linear: not the tensors of a problem");
  Arguments arguments("lora_linear", given(tensors, kX, "x"));
  if (dropout_p != 0.0) {
    arguments.refuse("dropout_p is ", dropout_p, ": the CUDA kernels have no dropout, use the 'triton' backend");
  }
  LoraLinear problem = problem_of(arguments, tensors, scaling, two_streams);
  const int64_t M = problem.x.rows, N = problem.weight.rows, rank = problem.shrink.rows;
  std::vector<Tensor> outputs;
  if (primal || !two_streams) outputs.push_back(arguments.output(problem.y, M, N));
  if (two_streams) outputs.push_back(arguments.output(problem.y_tangent, M, N));
  if (save) outputs.push_back(arguments.output(problem.u, M, rank));
  if (save && tensors[kExpand]) outputs.push_back(arguments.output(problem.c, M, rank));
  run(arguments, problem, counters, kernel);
  return outputs;
}

}  // namespace
}  // namespace linlora

// The CUDA runtime that is linked in, and the newest that the driver serves: 1000 * major + 10 * minor; 0 without driver.
extern "C" __attribute__((visibility("default"))) void linlora_cuda_versions(int* runtime, int* driver) {
  if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
}

STABLE_TORCH_LIBRARY(linlora_cuda, library) {
  library.def(
      "lora_linear(Tensor?[] tensors, float scaling, float dropout_p, bool two_streams, bool masks_update, bool save, "
      "bool primal, *, Tensor? counters=None, int kernel=0) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(linlora_cuda, CUDA, library) {
  library.impl("lora_linear", TORCH_BOX(&linlora::lora_linear));
}
