// The instructions of sm_90a around the products: clusters, mbarriers, TMA, fences between proxies. Emulated twins,
// with the same names and meanings: tests/csrc/emulator/ptx_sm90.h. Shared memory is named by 32-bit addresses of the
// CTA's own window; an address of `in_cta` may lie in the other CTA of the cluster.
#pragma once

#include "ptx.cuh"
#include "tensor_map_sm90.cuh"

#ifdef LINLORA_EMULATE
#include "emulator/ptx_sm90.h"
#else

namespace linlora::sm90 {

// How many clusters of two CTAs, one to a multiprocessor, the device runs at a time.
inline cudaError_t cluster_count(int& count) {
  const cudaError_t error = multiprocessor_count(count);
  count /= 2;
  return error;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int clusters, int threads, size_t shared_bytes,
                            cudaStream_t stream, const Arguments&... arguments) {
  return launch(kernel, dim3(2 * clusters), dim3(threads), shared_bytes, stream, arguments...);
}

// ---- clusters

__device__ __forceinline__ int thread_of_cta() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int clusters() { return static_cast<int>(gridDim.x) / 2; }

__device__ __forceinline__ int cta_of_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Every thread of both CTAs, whole warps at a time; orders all of their accesses to shared memory.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What `address` of this CTA is in CTA `cta`.
__device__ __forceinline__ uint32_t in_cta(uint32_t address, int cta) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(cta));
  return mapped;
}

__device__ __forceinline__ int load_own(uint32_t address) {
  int value;
  asm volatile("ld.shared::cta.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// ---- mbarriers: a phase is over when `count` arrivals and all announced bytes have come

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes them known to the other CTA and to TMA; before a cluster_sync.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Of either CTA. It orders the accesses of TMA and wgmma that the thread has waited for, and loads whose values it has
// used; a release to the cluster would cost a fence of all memory.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, at that of either CTA, and announces `bytes`.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity is over: the first phase has parity 0, and the one before it, 1, counts as over.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra WAIT;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The same for what threads of the other CTA have sent.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra WAIT;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Stores to a CTA's shared memory and then counts 4 of the bytes announced at its mbarrier; asynchronous.
__device__ __forceinline__ void send(uint32_t address, int value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [%0], %1, [%2];" ::"r"(address), "r"(value),
               "r"(barrier)
               : "memory");
}

// ---- TMA: boxes of a tensor, in shared memory rows of 128 bytes, whose 16-byte units are swizzled (swizzle_sm90.cuh).
// What lies outside of the tensor is read as zeros and not written.

__device__ __forceinline__ void tma_load(uint32_t destination, const TensorMap* map, uint32_t barrier, int column,
                                         int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(destination),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// To the same address, announced at the same mbarrier, of both CTAs.
__device__ __forceinline__ void tma_load_both(uint32_t destination, const TensorMap* map, uint32_t barrier, int column,
                                              int row, int layer = 0) {
  constexpr uint16_t kBoth = 3;
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(layer), "h"(kBoth)
      : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t source, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(source), "r"(column), "r"(row)
               : "memory");
}

// The thread's stores since the last commit become its newest group.
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most the newest kGroupsLeft groups of the thread still read shared memory.
template <int kGroupsLeft>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroupsLeft) : "memory");
}

// ---- between the generic proxy (loads and stores of threads) and the async proxy (TMA, wgmma)

__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// A store to global memory that TMA will read: fence_async_global, then release, come after it.
template <class Value>
__device__ __forceinline__ void store_for_tma(void* address, Value value) {
  store_global(address, value);
}

// ---- flags in global memory

// Counts at `flag`, after everything that the thread has seen happen; who waits for the count sees it too.
__device__ __forceinline__ void count_release(uint32_t* flag) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flag) : "memory");
}

__device__ __forceinline__ void wait_count(const uint32_t* flag, uint32_t writers) { wait_at_least(flag, writers); }

__device__ __forceinline__ uint32_t count(uint32_t* counter) { return atomicAdd(counter, 1u); }
__device__ __forceinline__ void reset(uint32_t* counter) { atomicExch(counter, 0u); }

// ---- registers and warps

// Four 8 x 8 matrices of 16-bit elements into shared memory: the fragments as ldmatrix loads them, lanes 8i to 8i + 7
// give the addresses of the rows of matrix i.
__device__ __forceinline__ void stmatrix(uint32_t address, const uint32_t (&registers)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(registers[0]),
               "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The warpgroup's registers per thread, out of the pool of the CTA.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace linlora::sm90
#endif
