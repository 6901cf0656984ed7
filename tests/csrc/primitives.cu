// Small kernels, right and wrong ones, for tests of the emulated machine itself.
#include "ptx.cuh"

using namespace linlora;

namespace {

// (16, 16) by (16, 8): a row by row and b column by column, or row by row and transposed on the way to the registers.
template <class Type>
__global__ void product(const uint16_t* a, const uint16_t* b, float* d, bool b_by_rows) {
  const int lane = threadIdx.x;
  const uint32_t a_tile = shared_memory(), b_tile = a_tile + 512;
  for (int i = lane; i < 256; i += 32) store_shared(a_tile + 2 * i, load_global<uint16_t>(a + i));
  for (int i = lane; i < 128; i += 32) {
    const int k = i / 8, n = i % 8;
    store_shared(b_tile + 2 * (b_by_rows ? 16 * k + n : 16 * n + k), load_global<uint16_t>(b + i));
  }
  __syncthreads();
  uint32_t a_fragment[4], b_fragment[4];
  ldmatrix(a_fragment, a_tile + 32 * (lane % 16) + lane / 16 * 16);
  if (b_by_rows) {
    ldmatrix_transposed(b_fragment, b_tile + 32 * (lane % 16));
  } else {
    ldmatrix(b_fragment, b_tile + 32 * (lane % 8) + lane / 8 % 2 * 16);
  }
  float sum[4] = {};
  mma_m16n8k16<Type>(sum, a_fragment, b_fragment[0], b_fragment[1]);
  for (int e = 0; e < 4; ++e) store_global(d + 8 * (lane / 4 + e / 2 * 8) + lane % 4 * 2 + e % 2, sum[e]);
}

// Every thread passes its number to the next one, through shared memory.
__global__ void neighbours(float* d, bool meets) {
  store_shared(shared_memory() + 4 * threadIdx.x, static_cast<float>(threadIdx.x));
  if (meets) __syncthreads();
  store_global(d + threadIdx.x, load_shared<float>(shared_memory() + 4 * ((threadIdx.x + 1) % blockDim.x)));
}

__global__ void copies(const float* from, float* d, bool waits) {
  const uint32_t place = shared_memory() + 16 * threadIdx.x;
  cp_async(place, from + 4 * threadIdx.x, threadIdx.x % 2 == 0);
  cp_async_commit();
  if (waits) cp_async_wait<0>();
  __syncthreads();
  store_global(d + threadIdx.x, load_shared<float>(place));
}

// A copy into a place that the next warp may still be reading.
__global__ void copies_too_early(const float* from, float* d) {
  const uint32_t place = shared_memory() + 16 * threadIdx.x;
  store_shared(place, 1.0f);
  __syncthreads();
  store_global(d + threadIdx.x, load_shared<float>(shared_memory() + 16 * ((threadIdx.x + 32) % 64)));
  cp_async(place, from, true);
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_collectives(float* d) {
  const float value = threadIdx.x < 7 ? __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1) : __shfl_sync(0xFFFFFFFFu, 1.0f, 0);
  store_global(d + threadIdx.x, value);
}

__global__ void one_lane_leaves() {
  if (threadIdx.x != 31) __syncwarp();
}

__global__ void reads(const float* from, float* d, int element) { store_global(d, load_global<float>(from + element)); }

__global__ void writes(float* to) { store_global(to, 1.0f); }

__global__ void reads_shared(float* d, uint32_t address) { store_global(d, load_shared<float>(address)); }

// The first block waits for the second.
__global__ void waits_for_a_later_block(uint32_t* flag) {
  if (blockIdx.x == 0) wait_at_least(flag, 1);
  if (blockIdx.x == 1) store_release(flag, 1);
}

__global__ void only_looks(uint32_t* flag) {
  while (load_acquire(flag) != 0xFFFFFFFFu) continue;
}

__global__ void strided(int words) { store_shared(shared_memory() + 4 * words * threadIdx.x, 1.0f), __syncwarp(); }

const char* finish(const emulator::Session& session) {
  static std::string error;
  error = session.error;
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace

extern "C" const char* run_product(bool is_half, const uint16_t* a, const uint16_t* b, float* d, bool b_by_rows) {
  emulator::Session session(1, 0);
  session.allocate({"a", reinterpret_cast<char*>(const_cast<uint16_t*>(a)), 16, 16, 16, 1, 2, false});
  session.allocate({"b", reinterpret_cast<char*>(const_cast<uint16_t*>(b)), 16, 8, 8, 1, 2, false});
  session.allocate({"d", reinterpret_cast<char*>(d), 16, 8, 8, 1, 4, true});
  launch(is_half ? product<__half> : product<__nv_bfloat16>, dim3{1}, dim3{32}, 1024, nullptr, a, b, d, b_by_rows);
  return finish(session);
}

// One of the kernels above, on `from` (inputs) and `d` (outputs), 256 floats each.
extern "C" const char* run_kernel(const char* name, float* from, float* d, int argument, int multiprocessors,
                                  unsigned seed) {
  emulator::Session session(multiprocessors, seed);
  session.allocate({"from", reinterpret_cast<char*>(from), 4, 64, 64, 1, 4, false});
  session.allocate({"d", reinterpret_cast<char*>(d), 4, 64, 64, 1, 4, true});
  auto* flag = reinterpret_cast<uint32_t*>(d);
  const std::string kernel = name;
  const dim3 one{1}, two{2}, warp{32}, warps{64};
  if (kernel == "neighbours") launch(neighbours, one, warps, 1024, nullptr, d, argument != 0);
  if (kernel == "copies") launch(copies, one, warps, 1024, nullptr, from, d, argument != 0);
  if (kernel == "copies_too_early") launch(copies_too_early, one, warps, 1024, nullptr, from, d);
  if (kernel == "half_a_barrier") launch(half_a_barrier, one, warps, 0, nullptr);
  if (kernel == "two_collectives") launch(two_collectives, one, warp, 0, nullptr, d);
  if (kernel == "one_lane_leaves") launch(one_lane_leaves, one, warp, 0, nullptr);
  if (kernel == "reads") launch(reads, one, warp, 0, nullptr, from, d, argument);
  if (kernel == "writes") launch(writes, one, warp, 0, nullptr, from);
  if (kernel == "reads_shared") launch(reads_shared, one, warp, 256, nullptr, d, static_cast<uint32_t>(argument));
  if (kernel == "waits_for_a_later_block") launch(waits_for_a_later_block, two, warp, 0, nullptr, flag);
  if (kernel == "only_looks") launch(only_looks, one, warp, 0, nullptr, flag);
  if (kernel == "strided") launch(strided, one, warp, 8192, nullptr, argument);
  return finish(session);
}

extern "C" void round_to_16_bits(const float* values, uint16_t* half, uint16_t* bfloat16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    half[i] = __float2half_rn(values[i]).bits;
    bfloat16[i] = __float2bfloat16_rn(values[i]).bits;
  }
}

extern "C" void widen_16_bits(float* half, float* bfloat16) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    half[bits] = widen<__half>(static_cast<uint16_t>(bits));
    bfloat16[bits] = widen<__nv_bfloat16>(static_cast<uint16_t>(bits));
  }
}
