// The consumers of lora_linear_sm90: two warpgroups, 64 rows each, pack the factors, compute P, compute y.
#pragma once

#include "producer_sm90.cuh"
#include "swizzle.cuh"

namespace linlora::sm90 {

constexpr int kAllConsumers = 1, kWarpgroup = 2;  // named barriers; kWarpgroup + i for warpgroup i

template <class Element, int kBlockN, class Weight>  // KMajor or NMajor
struct Consumer {
  const Launch& launch;
  const Plan& plan;
  Shared<kBlockN> shared;
  int cta, thread, half;  // thread: of the consumers
  Cursor<Shared<kBlockN>::kStages> cursor;
  int held = -1;  // the stage that the products in flight read

  __device__ Consumer(const Launch& launch, Shared<kBlockN> shared, int cta, int thread)
      : launch(launch),
        plan(launch.plan),
        shared(shared),
        cta(cta),
        thread(thread),
        half(__shfl_sync(0xFFFFFFFF, thread / 128, 0)) {}

  __device__ void run() {
    Tickets<kBlockN> tickets{shared, {}};
    for (;;) {
      const Tile tile = plan.tile(__shfl_sync(0xFFFFFFFF, tickets.wait(), 0));  // the same, as the compiler then sees
      if (lane() == 0)
        tickets.read();
      else
        tickets.cursor.advance();
      if (tile.kind == Tile::kNone) break;
      if (tile.kind == Tile::kPack) pack_factors(tile);
      if (tile.kind == Tile::kShrink) shrink(tile);
      if (tile.kind == Tile::kOutput) output(tile);
    }
    if (thread % 128 == 0) tma_store_wait_read<0>();  // before the CTA, and its shared memory, goes
  }

 private:
  __device__ int lane() const { return thread % 32; }
  __device__ int row_in_half() const { return thread % 128 / 32 * 16 + lane() / 4; }  // and 8 below

  // ---- stages

  __device__ int wait_stage() {
    const int stage = cursor.place;
    mbarrier_wait(shared.full(stage), cursor.parity);
    cursor.advance();
    return stage;
  }

  // All products but the newest group are over; those of the stage before this one among them.
  __device__ void pass(int stage) {
    wgmma_wait<1>();
    release();
    held = stage;
  }

  __device__ void finish() {
    wgmma_wait<0>();
    release();
    held = -1;
  }

  // To the producers of both CTAs, which fill it together.
  __device__ void release() {
    if (held >= 0 && lane() < kClusterSize) mbarrier_arrive(in_cta(shared.empty(held), lane()));
  }

  // ---- tiles

  // What all consumers of this CTA have stored for TMA, they publish.
  __device__ void publish(uint32_t* flag) {
    fence_async_global();
    named_barrier(kAllConsumers, kConsumers);
    if (thread == 0) count_release(flag);
  }

  // S and E in 16 bits, rows contiguous and padded with zeros, so that TMA can read them.
  __device__ void pack_factors(const Tile& tile) {
    const int64_t first = (int64_t{kClusterSize} * tile.row + cta) * kConsumers * kUnitsPerThread;
    for (int i = 0; i < kUnitsPerThread; ++i) {
      const int64_t index = first + i * kConsumers + thread;
      if (index >= plan.units()) break;
      const Unit unit = unit_of(plan, index);
      const int along = unit.shrink ? unit.row : unit.column;  // blocks of rank_stride: one factor each
      const int block = along / plan.rank_stride, rank = along % plan.rank_stride;
      const Factor& factor = unit.shrink ? launch.factors_shrink[block] : launch.factors_expand[block];
      const int row = unit.shrink ? rank : unit.row, column = unit.shrink ? unit.column : rank;
      float values[kUnit];
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        const bool inside = row < factor.rows && column + e < factor.columns;
        values[e] = inside ? load_number<Element>(factor, row, column + e) : 0.0f;
      }
      const int64_t place = int64_t{unit.row} * (unit.shrink ? plan.k_stride() : plan.p_columns()) + unit.column;
      store_for_tma((unit.shrink ? launch.shrink_scratch : launch.expand_scratch) + 2 * place,
                    uint4{pack<Element>(values[0], values[1]), pack<Element>(values[2], values[3]),
                          pack<Element>(values[4], values[5]), pack<Element>(values[6], values[7])});
    }
    publish(launch.pack_flag);
  }

  // 64 rows of P = s [c u] (s: what `Scaling` says) for kRanks ranks.
  //   one stream     each half its rows:        u = x S0ᵀ              c = u + x dSᵀ
  //   two streams    both the same 64 rows:     u = x S0ᵀ (upper)      c = x_t S0ᵀ + x dSᵀ (lower)
  // So a half multiplies its own rows by S0, and those of the primal by dS; the upper one of two streams in vain.
  __device__ void shrink(const Tile& tile) {
    if (plan.rank_block == 32) {
      plan.has_d_shrink ? shrink<32, true>(tile) : shrink<32, false>(tile);
    } else {
      plan.has_d_shrink ? shrink<64, true>(tile) : shrink<64, false>(tile);
    }
    publish(launch.row_flags + plan.cta_row(tile, cta));
  }

  template <int kRanks, bool kHasDShrink>
  __device__ void shrink(const Tile& tile) {
    float by_shrink[kRanks / 2] = {}, by_d_shrink[kRanks / 2] = {};
    pin(by_shrink);
    pin(by_d_shrink);
    constexpr int kRows = kHasDShrink ? 2 * kRanks : kRanks, kBlocks = blocks_of_stage(kBlockN, kRows);
    const int k_steps = static_cast<int>(ceil_div(plan.k_steps(0), kBlocks));
    int step = 0;
#pragma unroll 1
    do {
      const int stage = wait_stage();
      wgmma_fence();
#pragma unroll
      for (int slice = 0; slice < kBlocks * kBlockK / 16; ++slice) {
        const int block = slice / (kBlockK / 16), in_block = slice % (kBlockK / 16);
        const uint32_t upper = shared.a(stage, block), own = upper + half * kHalfBytes,
                       primal = plan.two_streams ? upper : own,
                       b = shared.a(stage, kBlocks) + block * kRows * kRowBytes;
        wgmma<Element, KMajor>(by_shrink, operand<KMajor>(own, in_block), operand<KMajor>(b, in_block));
        if constexpr (kHasDShrink) {
          wgmma<Element, KMajor>(by_d_shrink, operand<KMajor>(primal, in_block),
                                 operand<KMajor>(b + kRanks * kRowBytes, in_block));
        }
      }
      wgmma_commit();
      pass(stage);
    } while (++step < k_steps);
    finish();
    pin(by_shrink);
    pin(by_d_shrink);
    store_p<kRanks, kHasDShrink>(tile, by_shrink, by_d_shrink);
  }

  template <int kRanks, bool kHasDShrink>
  __device__ void store_p(const Tile& tile, const float (&by_shrink)[kRanks / 2],
                          const float (&by_d_shrink)[kRanks / 2]) {
    const bool stores_u = !plan.two_streams || half == 0, stores_c = plan.has_c && (!plan.two_streams || half == 1);
    const int first_row = plan.shrink_half(tile, cta, half).row + row_in_half();
#pragma unroll
    for (int i = 0; i < kRanks / 2; i += 2) {
      const int64_t row = first_row + i / 2 % 2 * 8;
      const int rank = plan.first_rank(tile) + i / 4 * 8 + lane() % 4 * 2;
      if (row >= plan.m || rank >= plan.rank_stride) continue;
      const float u[2] = {by_shrink[i], by_shrink[i + 1]};
      const float c[2] = {u[0] + (kHasDShrink ? by_d_shrink[i] : 0.0f),
                          u[1] + (kHasDShrink ? by_d_shrink[i + 1] : 0.0f)};
      unsigned char* p = launch.p_scratch + 2 * (row * plan.p_columns() + rank);
      if (stores_u) {
        store_for_tma(p + 2 * plan.u_column(), pack<Element>(launch.scaling.of_p * u[0], launch.scaling.of_p * u[1]));
        store_ranks(launch.u, row * launch.u_stride, rank, u);
      }
      if (stores_c) {
        store_for_tma(p, pack<Element>(launch.scaling.of_p * c[0], launch.scaling.of_p * c[1]));
        store_ranks(launch.c, row * launch.c_stride, rank, c);
      }
    }
  }

  // Two neighbours of a row of u or c, where it is wanted.
  __device__ void store_ranks(unsigned char* matrix, int64_t row_start, int rank, const float (&values)[2]) {
    if (matrix == nullptr) return;
    const uint32_t pair = pack<Element>(values[0], values[1]);
    unsigned char* address = matrix + 2 * (row_start + rank);
    if (rank < plan.rank) store_global(address, static_cast<uint16_t>(pair));
    if (rank + 1 < plan.rank) store_global(address + 2, static_cast<uint16_t>(pair >> 16));
  }

  // 64 rows of y: the steps along K, then along the columns of P, which are no different.
  __device__ void output(const Tile& tile) {
    const Half rows = plan.output_half(tile, cta, half);
    const int stream = plan.output_half(tile, cta, 1).stream, first_column = plan.i_n(tile) * kBlockN;
    float y[kBlockN / 2];
    start_from_bias(y, rows.stream, first_column);
    pin(y);
    const int k_steps = plan.k_steps(stream), p_slices = plan.updates(stream) ? plan.p_slices() : 0;
    int step = 0;
#pragma unroll 1
    do {  // at least once: else the compiler keeps no products in flight
      multiply<4, Weight>(y);
    } while (++step < k_steps);
    const bool rescales = std::is_same_v<Element, __half> && launch.scaling.of_sum != 1.0f && p_slices > 0;
    if (rescales) rescale(y, 1.0f / launch.scaling.of_sum);
#pragma unroll 1
    for (step = 4; step < p_slices; step += 4) multiply<4, KMajor>(y);
    switch (p_slices - (step - 4)) {
      case 4:
        multiply<4, KMajor>(y);
        break;
      case 3:
        multiply<3, KMajor>(y);
        break;
      case 2:
        multiply<2, KMajor>(y);
        break;
      case 1:
        multiply<1, KMajor>(y);
        break;
    }
    if (rescales) {
      rescale(y, launch.scaling.of_sum);
    } else {
      finish();
      pin(y);
    }
    store_y(rows, first_column, y);
  }

  // The sums of all products so far, times a power of two.
  __device__ void rescale(float (&y)[kBlockN / 2], float power) {
    finish();
    pin(y);
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) y[i] *= power;
    pin(y);
  }

  // The first kSlices of 16 columns of the next stage.
  template <int kSlices, class Major>
  __device__ __forceinline__ void multiply(float (&y)[kBlockN / 2]) {
    const int stage = wait_stage();
    const uint32_t a = shared.a(stage) + half * kHalfBytes, b = shared.b(stage);
    wgmma_fence();
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      wgmma<Element, Major>(y, operand<KMajor>(a, slice), operand<Major>(b, slice));
    }
    wgmma_commit();
    pass(stage);
  }

  __device__ void start_from_bias(float (&y)[kBlockN / 2], int stream, int first_column) {
    const Factor& bias = launch.bias;
    auto fill = [&](auto number) {
#pragma unroll
      for (int i = 0; i < kBlockN / 2; i += 4) {  // two columns, and the same 8 rows below
        const int column = first_column + 2 * i + lane() % 4 * 2;
        y[i] = y[i + 2] = column < plan.n ? number(column) : 0.0f;
        y[i + 1] = y[i + 3] = column + 1 < plan.n ? number(column + 1) : 0.0f;
      }
    };
    if (bias.data == nullptr || stream == 1) {
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) y[i] = 0.0f;
    } else if (bias.is_float32) {
      fill([&](int column) { return load_global<float>(bias.at(0, column)); });
    } else {
      fill([&](int column) { return widen<Element>(load_global<uint16_t>(bias.at(0, column))); });
    }
  }

  // Through shared memory, 64 columns at a time, with two such boxes under way.
  __device__ void store_y(const Half& rows, int first_column, const float (&y)[kBlockN / 2]) {
    const bool elected = thread % 128 == 0;
    const int matrix = lane() / 8;  // whose rows this lane addresses: 0, 1 the left, 1, 3 the lower ones
    const int row = thread % 128 / 32 * 16 + matrix % 2 * 8 + lane() % 8;
#pragma unroll
    for (int chunk = 0; chunk < kBlockN / 64; ++chunk) {
      if (elected) tma_store_wait_read<1>();
      named_barrier(kWarpgroup + half, 128);
      const uint32_t box = shared.staging(half, chunk);
#pragma unroll
      for (int j = 0; j < 64; j += 16) {
        uint32_t fragment[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int i = (chunk * 64 + j) / 2 + 2 * q;
          fragment[q] = pack<Element>(y[i], y[i + 1]);
        }
        stmatrix(box + SharedTile<64, 64>::offset(row, j + matrix / 2 * 8), fragment);
      }
      fence_async_shared();
      named_barrier(kWarpgroup + half, 128);
      if (elected) {
        tma_store(&launch.y[rows.stream], box, first_column + chunk * 64, rows.row);
        tma_store_commit();
      }
    }
  }
};

}  // namespace linlora::sm90
