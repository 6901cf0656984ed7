// The instructions of sm_80 that the kernels are made of. Shared memory is named by 32-bit addresses throughout. The
// emulated twins, with the same names and meanings, are in tests/csrc/emulator/ptx.h.
#pragma once

#include "device.cuh"

#ifdef LINLORA_EMULATE
#include "emulator/ptx.h"
#else

namespace linlora {

// The address of the block's dynamic shared memory.
__device__ __forceinline__ uint32_t shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
}

// Hides where a value comes from: the compiler keeps it in a register instead of computing it again in every loop.
__device__ __forceinline__ void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void keep(int& value) { asm volatile("" : "+r"(value)); }
template <class Value>
__device__ __forceinline__ void keep(Value*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// ---- global and shared memory; Value is a type of 2, 4, 8 or 16 bytes, to which the address is aligned

template <class Value>
__device__ __forceinline__ Value load_global(const void* address) {
  __builtin_assume(__isGlobal(address));
  return *static_cast<const Value*>(address);
}

template <class Value>
__device__ __forceinline__ void store_global(void* address, Value value) {
  *static_cast<Value*>(address) = value;
}

template <class Value>
__device__ __forceinline__ Value load_shared(uint32_t address) {
  return *static_cast<const Value*>(__cvta_shared_to_generic(address));
}

template <class Value>
__device__ __forceinline__ void store_shared(uint32_t address, Value value) {
  *static_cast<Value*>(__cvta_shared_to_generic(address)) = value;
}

// ---- flags in global memory, seen by the whole device

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void wait_at_least(const uint32_t* flag, uint32_t value) {
  while (load_acquire(flag) < value) __nanosleep(20);
}

// ---- asynchronous copies of 16 bytes from global to shared memory, past the registers and the first-level cache

// Copies the 16 bytes at `source` if they exist, else writes zeros.
__device__ __forceinline__ void cp_async(uint32_t destination, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(exists ? 16 : 0)
               : "memory");
}

// The thread's copies since the last commit become its newest group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the newest kGroupsLeft groups of the thread are in flight.
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// ---- matrices in registers

// Four 8 x 8 matrices of 16-bit elements; lanes 8i to 8i + 7 give the addresses of the 16-byte rows of matrix i. Lane l
// gets, of each, elements (l / 4, 2 (l % 4)) and the next in the row.
__device__ __forceinline__ void ldmatrix(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

// d (16 x 8, float32) += a (16 x 16) b (16 x 8). With i = lane / 4, j = 2 (lane % 4), two elements to a register:
//   a[0..3]  rows i, i + 8, i, i + 8 at columns j, j, j + 8, j + 8 and the next
//   b0, b1   rows j, j + 8 and the next, at column i
//   d[0..3]  row i at columns j, j + 1, row i + 8 at columns j, j + 1
template <class Type>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define LINLORA_MMA(TYPE, PTX_TYPE)                                                                      \
  template <>                                                                                            \
  __device__ __forceinline__ void mma_m16n8k16<TYPE>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, \
                                                     uint32_t b1) {                                      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." PTX_TYPE "." PTX_TYPE                                   \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                           \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                 \
  }
LINLORA_MMA(__half, "f16")
LINLORA_MMA(__nv_bfloat16, "bf16")
#undef LINLORA_MMA

// ---- numbers

// Two 16-bit numbers in a register, the first in the low half, each rounded to nearest even.
template <class Type>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class Type>
__device__ __forceinline__ float widen(uint16_t bits);

template <>
__device__ __forceinline__ float widen<__half>(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

template <>
__device__ __forceinline__ float widen<__nv_bfloat16>(uint16_t bits) {
  return __bfloat162float(__ushort_as_bfloat16(bits));
}

}  // namespace linlora
#endif
