// The operators of the `cuda` backend: linlora_cuda::linearized_lora_linear and linlora_cuda::lora_linear, with the
// schemas of the Triton operators (kernels/library.py) and two arguments more:
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
#include <tuple>

#include "checks.h"
#include "dispatch.h"

// Defined by CUDA builds of torch alone: weak, so that the library also loads beside a CPU build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace linlora {
namespace {

using Optional = std::optional<Tensor>;

// Checks what the operators have in common and fills the problem, but for the second stream and the outputs.
LoraLinear common(Arguments& arguments, const Tensor& x, const Tensor& weight, const Optional& bias,
                  const Tensor& shrink, const Optional& d_shrink, const Optional& expand, const Tensor& d_expand,
                  double scaling, double dropout_p) {
  if (dropout_p != 0.0) {
    arguments.refuse("dropout_p is ", dropout_p, ": the CUDA kernels have no dropout, use the 'triton' backend");
  }
  if (weight.dim() != 2 || shrink.dim() != 2) {
    arguments.refuse("weight (N, K) and shrink (r, K) are matrices, got ", described(weight), " and ",
                     described(shrink));
  }
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), rank = shrink.size(0);
  if (rank < 1 || rank > kMaxRank) arguments.refuse("the rank is in 1..", kMaxRank, ", got ", rank);
  if (d_shrink.has_value() != expand.has_value()) {
    arguments.refuse("d_shrink and expand come together, or neither does (the short form, B0 = 0)");
  }
  arguments.note_factor("shrink", shrink, rank, K);
  arguments.note_factor("d_shrink", d_shrink, rank, K);
  arguments.note_factor("expand", expand, N, rank);
  arguments.note_factor("d_expand", d_expand, N, rank);

  LoraLinear problem{};
  problem.type = arguments.type();
  problem.factor_type = arguments.factor_type();
  problem.x = arguments.activation("x", x, M, K);
  problem.weight = arguments.weight(weight, N, K);
  problem.bias = arguments.bias(bias, N, problem.bias_type);
  problem.shrink = arguments.factor(shrink);
  problem.d_shrink = arguments.factor(d_shrink);
  problem.expand = arguments.factor(expand);
  problem.d_expand = arguments.factor(d_expand);
  problem.scaling = static_cast<float>(scaling);
  return problem;
}

// Queues the problem on the current stream of x's device.
void run(const Arguments& arguments, const LoraLinear& problem, const Optional& counters, int64_t kernel) {
  if (problem.x.rows == 0) return;
  torch::stable::accelerator::DeviceGuard guard(arguments.device());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(arguments.device(), &stream));
  launch_lora_linear(arguments, problem, counters, kernel, static_cast<cudaStream_t>(stream));
}

std::tuple<Tensor, Tensor, Tensor> linearized_lora_linear(Tensor x, Tensor weight, Optional bias, Tensor shrink,
                                                          Optional d_shrink, Optional expand, Tensor d_expand,
                                                          double scaling, double dropout_p, Optional /*seed*/,
                                                          bool /*adjoint*/, bool save, Optional counters,
                                                          int64_t kernel) {
  Arguments arguments("linearized_lora_linear", x);
  LoraLinear problem = common(arguments, x, weight, bias, shrink, d_shrink, expand, d_expand, scaling, dropout_p);
  const int64_t M = x.size(0), rank = shrink.size(0);
  Tensor y = arguments.output(problem.y, M, weight.size(0));
  Tensor u = arguments.output(problem.u, M, save ? rank : 0);
  Tensor c = arguments.output(problem.c, M, save && d_shrink ? rank : 0);
  run(arguments, problem, counters, kernel);
  return {y, u, c};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear(Tensor x, Optional x_tangent, Tensor weight, Optional bias,
                                                       Tensor shrink, Optional d_shrink, Optional expand,
                                                       Tensor d_expand, double scaling, double dropout_p,
                                                       Optional /*seed*/, bool /*adjoint*/, bool primal,
                                                       Optional counters, int64_t kernel) {
  Arguments arguments("lora_linear", x);
  LoraLinear problem = common(arguments, x, weight, bias, shrink, d_shrink, expand, d_expand, scaling, dropout_p);
  const int64_t M = x.size(0), N = weight.size(0), rank = shrink.size(0);
  problem.two_streams = true;
  problem.x_tangent = arguments.activation("x_tangent", x_tangent, M, x.size(1));
  Tensor y = primal ? arguments.output(problem.y, M, N) : arguments.buffer(arguments.x_dtype(), 0);
  Tensor y_tangent = arguments.output(problem.y_tangent, M, N);
  Tensor u = arguments.output(problem.u, M, rank);
  Tensor c = arguments.output(problem.c, M, expand ? rank : 0);
  run(arguments, problem, counters, kernel);
  return {y, y_tangent, u, c};
}

}  // namespace
}  // namespace linlora

STABLE_TORCH_LIBRARY(linlora_cuda, library) {
  library.def(
      "linearized_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor shrink, Tensor? d_shrink, Tensor? expand, "
      "Tensor d_expand, float scaling, float dropout_p=0., Tensor? seed=None, bool adjoint=False, bool save=True, "
      "Tensor? counters=None, int kernel=0) -> (Tensor, Tensor, Tensor)");
  library.def(
      "lora_linear(Tensor x, Tensor? x_tangent, Tensor weight, Tensor? bias, Tensor shrink, Tensor? d_shrink, "
      "Tensor? expand, Tensor d_expand, float scaling, float dropout_p=0., Tensor? seed=None, bool adjoint=False, "
      "bool primal=True, Tensor? counters=None, int kernel=0) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(linlora_cuda, CUDA, library) {
  library.impl("linearized_lora_linear", TORCH_BOX(&linlora::linearized_lora_linear));
  library.impl("lora_linear", TORCH_BOX(&linlora::lora_linear));
}
