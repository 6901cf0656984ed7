// What csrc/register.cpp calls of the CUDA runtime, on the host: a device of compute capability 9.0, whose context a
// thread has bound once it has set the device.
#pragma once

#include <cstddef>
#include <cstring>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDeviceFunction = 98 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t) { return "as the emulated runtime says"; }
inline thread_local bool has_context = false;
inline cudaError_t cudaSetDevice(int) { return has_context = true, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 9, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return std::memset(memory, value, bytes), cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
