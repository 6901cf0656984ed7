// The host's side: launching a kernel on the emulated machine, on tensors that it may touch and no others.
#pragma once

#include "lora_linear.h"
#include "machine.h"

namespace linlora {

inline cudaError_t multiprocessor_count(int& count) {
  count = emulator::Session::current().multiprocessors;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  return emulator::run(grid, block, shared_bytes, [=] { kernel(arguments...); }) ? cudaSuccess : cudaErrorLaunchFailure;
}

namespace emulator {

inline void allocate(Session& session, const char* name, const Matrix& matrix, Type type, bool writable) {
  if (matrix.data == nullptr || matrix.rows == 0 || matrix.columns == 0) return;
  session.allocate({name, static_cast<char*>(matrix.data), matrix.rows, matrix.columns, matrix.row_stride,
                    matrix.column_stride, type == Type::kFloat32 ? 4 : 2, writable});
}

inline void allocate(Session& session, const LoraLinear& problem) {
  allocate(session, "x", problem.x, problem.type, false);
  allocate(session, "x_tangent", problem.x_tangent, problem.type, false);
  allocate(session, "weight", problem.weight, problem.type, false);
  allocate(session, "bias", problem.bias, problem.bias_type, false);
  allocate(session, "shrink", problem.shrink, problem.factor_type, false);
  allocate(session, "d_shrink", problem.d_shrink, problem.factor_type, false);
  allocate(session, "expand", problem.expand, problem.factor_type, false);
  allocate(session, "d_expand", problem.d_expand, problem.factor_type, false);
  allocate(session, "y", problem.y, problem.type, true);
  allocate(session, "y_tangent", problem.y_tangent, problem.type, true);
  allocate(session, "u", problem.u, problem.type, true);
  allocate(session, "c", problem.c, problem.type, true);
}

// Runs `body` in a session on the tensors of `problem`. Null when all went well, else what went wrong.
template <class Body>
const char* emulate(const LoraLinear& problem, int multiprocessors, unsigned seed, Body body) {
  static thread_local std::string error;
  Session session(multiprocessors, seed);
  allocate(session, problem);
  const cudaError_t status = body();
  error = session.error;
  if (error.empty() && status != cudaSuccess) error = "CUDA error " + std::to_string(status);
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace emulator
}  // namespace linlora
