// CUDA's language on the host: keywords, built-in variables and the few runtime types that the kernels mention.
#pragma once

#include <cstddef>
#include <cstdint>

#include "numbers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
};

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

using cudaStream_t = struct CUstream_st*;

inline float __uint_as_float(unsigned bits) { return linlora::emulator::float_of(bits); }

// Of the thread that runs; the machine sets them whenever it resumes one.
extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;
