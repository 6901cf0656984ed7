// Small kernels of sm_90a's instructions, right and wrong ones, for tests of how the machine emulates them.
#include "wgmma_sm90.cuh"

using namespace linlora;
using namespace linlora::sm90;

namespace {

constexpr int kBox = 64, kThreads = 128;
constexpr uint32_t kBoxBytes = kBox * 128;

// What a kernel leaves out, or does too much; each knows some of them.
enum Mistake {
  kNone,
  kNoWait,
  kNoFence,
  kNoBarrier,
  kOneArrivalTooMany,
  kTooFewBytes,
  kMisaligned,
  kLeavesAtOnce,
  kOverwrites,
  kReadsAtOnce,
};

__device__ uint32_t box(int i) { return shared_memory() + i * kBoxBytes; }
__device__ uint32_t arrived() { return box(2); }

// A box from one tensor into another.
__global__ void moves(TensorMap from, TensorMap to, int column, int row, Mistake mistake) {
  if (thread_of_cta() == 0) mbarrier_init(arrived(), 1);
  cluster_sync();
  if (cta_of_cluster() == 0 && thread_of_cta() == 0) {
    mbarrier_arrive_expect(arrived(), mistake == kTooFewBytes ? kBoxBytes / 2 : kBoxBytes);
    if (mistake == kOneArrivalTooMany) mbarrier_arrive(arrived());
    tma_load(box(0) + (mistake == kMisaligned ? 128 : 0), &from, arrived(), column, row);
    if (mistake != kNoWait) mbarrier_wait(arrived(), 0);
    tma_store(&to, box(0), column, row);
    tma_store_commit();
    if (mistake != kLeavesAtOnce) tma_store_wait_read<0>();
  }
  cluster_sync();
}

// The upper half of a box from CTA 0 and the lower half from CTA 1, to both; each stores its copy.
__global__ void shares(TensorMap from, TensorMap to) {
  const uint32_t half = cta_of_cluster() * kBoxBytes / 2;
  if (thread_of_cta() == 0) mbarrier_init(arrived(), 1);
  cluster_sync();
  if (thread_of_cta() == 0) {
    mbarrier_arrive_expect(arrived(), kBoxBytes);
    tma_load_both(box(0) + half, &from, arrived(), 0, cta_of_cluster() * kBox / 2);
    mbarrier_wait(arrived(), 0);
    tma_store(&to, box(0), cta_of_cluster() * kBox, 0);
    tma_store_commit();
    tma_store_wait_read<0>();
  }
  cluster_sync();
}

// Element (i, j) of each 16 x 16 block is the lane and register that held it.
__global__ void writes(TensorMap to, Mistake mistake) {
  const int lane = thread_of_cta() % 32, row = thread_of_cta() / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
  auto write = [&] {
    for (int j = 0; j < kBox; j += 16) {
      uint32_t fragment[4];
      for (int q = 0; q < 4; ++q) fragment[q] = pack<__half>(8.0f * lane + 2 * q, 8.0f * lane + 2 * q + 1);
      stmatrix(emulator::swizzled(box(0) + row * 128 + j * 2 + lane / 16 * 16), fragment);
    }
  };
  if (cta_of_cluster() == 0) {
    write();
    if (mistake != kNoFence) fence_async_shared();
    if (mistake != kNoBarrier) named_barrier(1, kThreads);
    if (thread_of_cta() == 0) {
      tma_store(&to, box(0), 0, 0);
      tma_store_commit();
      if (mistake != kOverwrites) tma_store_wait_read<0>();
    }
    named_barrier(1, kThreads);
    write();
    if (thread_of_cta() == 0) tma_store_wait_read<0>();
  }
  cluster_sync();
}

// d (64, 64) = a bᵀ, where b is (64, 64) by rows of K, or its transpose by rows of N.
template <class Element, class Major>
__global__ void multiplies(TensorMap a, TensorMap b, float* d, Mistake mistake) {
  if (thread_of_cta() == 0) mbarrier_init(arrived(), 1);
  cluster_sync();
  if (cta_of_cluster() == 0) {
    if (thread_of_cta() == 0) {
      mbarrier_arrive_expect(arrived(), 2 * kBoxBytes);
      tma_load(box(0), &a, arrived(), 0, 0);
      tma_load(box(1), &b, arrived(), 0, 0);
    }
    if (mistake != kNoWait) mbarrier_wait(arrived(), 0);
    float sum[32] = {};
    if (mistake != kNoFence) wgmma_fence();
    for (int slice = 0; slice < 4; ++slice) {
      wgmma<Element, Major>(sum, operand<KMajor>(box(0), slice), operand<Major>(box(1), slice));
    }
    wgmma_commit();
    if (mistake == kOverwrites && thread_of_cta() == 0) tma_load(box(1), &a, arrived(), 0, 0);
    if (mistake != kReadsAtOnce) wgmma_wait<0>();
    const int lane = thread_of_cta() % 32, row = thread_of_cta() / 32 * 16 + lane / 4;
    for (int i = 0; i < 32; ++i) {
      store_global(d + (row + i / 2 % 2 * 8) * kBox + i / 4 * 8 + lane % 4 * 2 + i % 2, sum[i]);
    }
    wgmma_wait<0>();
  }
  cluster_sync();
}

TensorMap map_of(uint16_t* data, int rows, int columns, int dimensions = 2, uint32_t box_rows = kBox) {
  TensorMap map{};
  encode(map, Type::kFloat16, dimensions,
         {data, uint64_t(columns), uint64_t(rows), 1, columns, int64_t{columns} * rows, box_rows});
  return map;
}

}  // namespace

// One of the kernels above, from `from` (rows, columns) and `other`, of the same shape, to `to`.
extern "C" const char* run_sm90(const char* name, uint16_t* from, uint16_t* other, void* to, int rows, int columns,
                                int column, int row, int mistake, unsigned seed) {
  emulator::Session session(1, seed);
  const bool floats = std::string(name).rfind("multiplies", 0) == 0;
  session.allocate({"from", reinterpret_cast<char*>(from), rows, columns, columns, 1, 2, false});
  session.allocate({"other", reinterpret_cast<char*>(other), rows, columns, columns, 1, 2, false});
  session.allocate({"to", static_cast<char*>(to), rows, columns, columns, 1, floats ? 4 : 2, true});
  auto* halves = static_cast<uint16_t*>(to);
  auto* sums = static_cast<float*>(to);
  const auto wrong = static_cast<Mistake>(mistake);
  const std::string kernel = name;
  auto run = [&](auto function, auto... arguments) {
    launch_clusters(function, 1, kThreads, 2 * kBoxBytes + 8, nullptr, arguments...);
  };
  const TensorMap a = map_of(from, rows, columns), b = map_of(other, rows, columns);
  if (kernel == "moves") run(moves, a, map_of(halves, rows, columns), column, row, wrong);
  if (kernel == "shares") run(shares, map_of(from, rows, columns, 3, kBox / 2), map_of(halves, rows, columns));
  if (kernel == "writes") run(writes, map_of(halves, rows, columns), wrong);
  if (kernel == "multiplies half K") run(multiplies<__half, KMajor>, a, b, sums, wrong);
  if (kernel == "multiplies half N") run(multiplies<__half, NMajor>, a, b, sums, wrong);
  if (kernel == "multiplies bfloat16 K") run(multiplies<__nv_bfloat16, KMajor>, a, b, sums, wrong);
  if (kernel == "multiplies bfloat16 N") run(multiplies<__nv_bfloat16, NMajor>, a, b, sums, wrong);
  static std::string error;
  error = session.error;
  return error.empty() ? nullptr : error.c_str();
}
