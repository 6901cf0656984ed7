// wgmma: products of a warpgroup, asynchronous, with both operands in shared memory and the sum in registers.
//
//   D (64, N) += A (64, 16) Bᵀ     float32 += float16 or bfloat16
//
// Thread t of the warpgroup holds D[16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2)][8 (i / 4) + 2 (t % 4) + i % 2] at d[i].
#pragma once

#include <type_traits>

#include "ptx_sm90.cuh"

namespace linlora::sm90 {

// How wgmma finds an operand, in the layout that TMA writes: "atoms" of 8 rows of 128 bytes, their 16-byte units
// swizzled, aligned to 1024 bytes.
//
//   K-major    (rows of M or N, each 64 elements of K): stride = bytes from 8 rows to the next 8
//   N-major    (rows of K, each 64 elements of N):      stride = bytes from 8 rows to the next 8,
//                                                       leading = bytes from 64 elements of N to the next 64
//
//   bits   0-13  address / 16         bits 32-45  stride / 16        bits 62-63  swizzle; 1: 128 bytes
//   bits  16-29  leading / 16         bits 49-51  address of the atom / 128, mod 8: 0
__host__ __device__ inline uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128Bytes = uint64_t{1} << 62;
  return kSwizzle128Bytes | uint64_t{stride / 16} << 32 | uint64_t{leading / 16} << 16 | (address & 0x3FFFF) / 16;
}

constexpr uint32_t kAtomBytes = 1024;

// Rows of K; the unused leading offset is 1 by convention. Along K, slices of 16 elements are 32 bytes apart, and the
// swizzle, being one of addresses, stays in place.
struct KMajor {
  static constexpr uint32_t kSliceBytes = 16 * 2;
  __host__ __device__ static uint64_t at(uint32_t address) { return descriptor(address, 16, kAtomBytes); }
};

// Rows of N, in boxes of 64 x 64. Slices of 16 elements of K are 16 rows apart.
struct NMajor {
  static constexpr uint32_t kSliceBytes = 16 * 128, kBoxBytes = 64 * 128;
  __host__ __device__ static uint64_t at(uint32_t address) { return descriptor(address, kBoxBytes, kAtomBytes); }
};

// Of the `slice`-th 16 elements of K.
template <class Major>
__host__ __device__ inline uint64_t operand(uint32_t address, int slice) {
  return Major::at(address) + slice * (Major::kSliceBytes / 16);
}

}  // namespace linlora::sm90

#ifdef LINLORA_EMULATE
#include "emulator/wgmma_sm90.h"
#else

namespace linlora::sm90 {

// Before the first product, and before one whose accumulators the thread has touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last commit become the newest group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most the newest kGroupsLeft groups still run.
template <int kGroupsLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
}

// What the thread does with its accumulators stays on this side: the compiler moves registers across the fence and the
// wait, which do not name them.
template <int kAccumulators>
__device__ __forceinline__ void pin(float (&d)[kAccumulators]) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Lists of ten: `decade` is the number without its last digit.
#define LINLORA_TEXT_10(decade)                                                                                        \
  "%" #decade "0, %" #decade "1, %" #decade "2, %" #decade "3, %" #decade "4, %" #decade "5, %" #decade "6, %" #decade \
  "7, %" #decade "8, %" #decade "9, "
#define LINLORA_FLOAT_10(decade)                                                                      \
  "+f"(d[decade##0]), "+f"(d[decade##1]), "+f"(d[decade##2]), "+f"(d[decade##3]), "+f"(d[decade##4]), \
      "+f"(d[decade##5]), "+f"(d[decade##6]), "+f"(d[decade##7]), "+f"(d[decade##8]), "+f"(d[decade##9])

#define LINLORA_TEXT_16 LINLORA_TEXT_10() "%10, %11, %12, %13, %14, %15"
#define LINLORA_FLOAT_16 \
  LINLORA_FLOAT_10(), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])

#define LINLORA_TEXT_32 LINLORA_TEXT_10() LINLORA_TEXT_10(1) LINLORA_TEXT_10(2) "%30, %31"
#define LINLORA_FLOAT_32 LINLORA_FLOAT_10(), LINLORA_FLOAT_10(1), LINLORA_FLOAT_10(2), "+f"(d[30]), "+f"(d[31])

#define LINLORA_TEXT_60 \
  LINLORA_TEXT_10() LINLORA_TEXT_10(1) LINLORA_TEXT_10(2) LINLORA_TEXT_10(3) LINLORA_TEXT_10(4) LINLORA_TEXT_10(5)
#define LINLORA_FLOAT_60                                                                                  \
  LINLORA_FLOAT_10(), LINLORA_FLOAT_10(1), LINLORA_FLOAT_10(2), LINLORA_FLOAT_10(3), LINLORA_FLOAT_10(4), \
      LINLORA_FLOAT_10(5)

#define LINLORA_TEXT_64 LINLORA_TEXT_60 "%60, %61, %62, %63"
#define LINLORA_FLOAT_64 LINLORA_FLOAT_60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

#define LINLORA_TEXT_128                                                                                          \
  LINLORA_TEXT_60 LINLORA_TEXT_10(6) LINLORA_TEXT_10(7) LINLORA_TEXT_10(8) LINLORA_TEXT_10(9) LINLORA_TEXT_10(10) \
      LINLORA_TEXT_10(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define LINLORA_FLOAT_128                                                                                 \
  LINLORA_FLOAT_60, LINLORA_FLOAT_10(6), LINLORA_FLOAT_10(7), LINLORA_FLOAT_10(8), LINLORA_FLOAT_10(9),   \
      LINLORA_FLOAT_10(10), LINLORA_FLOAT_10(11), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), \
      "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// The operands after the N / 2 accumulators are numbered on: a, b, whether B is N-major.
#define LINLORA_WGMMA(N, TYPE, ACCUMULATORS, A, B, N_MAJOR)                                                     \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LINLORA_TEXT_##ACCUMULATORS \
               "}, " A ", " B ", 1, 1, 1, 0, " N_MAJOR ";"                                                      \
               : LINLORA_FLOAT_##ACCUMULATORS                                                                   \
               : "l"(a), "l"(b), "n"(static_cast<int>(std::is_same_v<Major, NMajor>)))

#define LINLORA_WGMMA_OF(TYPE)                                                                 \
  do {                                                                                         \
    if constexpr (kAccumulators == 16) LINLORA_WGMMA(32, TYPE, 16, "%16", "%17", "%18");       \
    if constexpr (kAccumulators == 32) LINLORA_WGMMA(64, TYPE, 32, "%32", "%33", "%34");       \
    if constexpr (kAccumulators == 64) LINLORA_WGMMA(128, TYPE, 64, "%64", "%65", "%66");      \
    if constexpr (kAccumulators == 128) LINLORA_WGMMA(256, TYPE, 128, "%128", "%129", "%130"); \
  } while (false)

// D += A Bᵀ, of the operands that the descriptors a (rows of K) and b (Major) name. N = 2 kAccumulators.
template <class Element, class Major, int kAccumulators>
__device__ __forceinline__ void wgmma(float (&d)[kAccumulators], uint64_t a, uint64_t b) {
  static_assert(kAccumulators == 16 || kAccumulators == 32 || kAccumulators == 64 || kAccumulators == 128,
                "N is 32, 64, 128 or 256");
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    LINLORA_WGMMA_OF("bf16");
  } else {
    LINLORA_WGMMA_OF("f16");
  }
}

}  // namespace linlora::sm90
#endif
