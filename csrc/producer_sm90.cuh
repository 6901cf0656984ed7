// The producer of lora_linear_sm90: one thread of each CTA draws tiles and has TMA fill the stages for them.
#pragma once

#include <cmath>

#include "factors.cuh"
#include "pipeline_sm90.cuh"
#include "plan_sm90.cuh"

namespace linlora::sm90 {

// s = of_p * of_sum. P = s [c u] is rounded to 16 bits, where composed ops multiply a sum in float32 by s: so P holds
// no more of s than leaves its range that of u. bfloat16 has the range of float32, and takes all of it. float16 takes
// what is in 1/8..1; else a power of two is left, by which the sums are divided before the steps along P, and
// multiplied after.
struct Scaling {
  float of_p, of_sum;

  Scaling() = default;
  Scaling(float s, Type type) : of_p(s), of_sum(1.0f) {
    const float size = std::fabs(s);
    if (type != Type::kFloat16 || s == 0.0f || !std::isfinite(s) || (0.125f <= size && size <= 1.0f)) return;
    int exponent;
    of_p = std::frexp(s, &exponent);
    of_sum = std::ldexp(1.0f, exponent);
  }
};

// The parameter of the kernel.
struct Launch {
  TensorMap x[2], y[2], p[2];  // of the streams; p: what multiplies E
  TensorMap weight, shrink, expand;
  Plan plan;
  Factor bias, factors_shrink[2], factors_expand[2];  // S0, dS; in the order of the blocks of E
  unsigned char *p_scratch, *shrink_scratch, *expand_scratch, *u, *c;
  int64_t u_stride, c_stride;
  uint32_t *ticket, *pack_flag, *row_flags;
  Scaling scaling;
};

// Waits until `writers` have counted themselves, and counts itself; the last of `readers` leaves zero behind.
__device__ __forceinline__ void observe(uint32_t* flag, uint32_t writers, uint32_t readers) {
  wait_count(flag, writers);
  fence_async_global();  // what they wrote is read by TMA
  if (count(flag) == writers + readers - 1) reset(flag);
}

template <int kBlockN, class Weight>  // KMajor or NMajor
struct Producer {
  const Launch& launch;
  const Plan& plan;
  Shared<kBlockN> shared;
  int cta;
  Cursor<Shared<kBlockN>::kStages> cursor;

  __device__ Producer(const Launch& launch, Shared<kBlockN> shared, int cta)
      : launch(launch), plan(launch.plan), shared(shared), cta(cta) {}

  __device__ void run() {
    Tickets<kBlockN> tickets{shared, {}};
    int ticket = cta == 0 ? draw() : 0;
    for (;;) {
      if (cta == 0) {
        tickets.write(ticket);
      } else {
        ticket = tickets.wait();
        tickets.read();
      }
      const Tile tile = plan.tile(ticket);
      if (tile.kind == Tile::kNone) break;
      if (cta == 0) ticket = draw();  // arrives while this tile is loaded
      if (tile.kind == Tile::kShrink) load_shrink(tile);
      if (tile.kind == Tile::kOutput) load_output(tile);
    }
    // Of all draws the last: every cluster has drawn one ticket beyond the tiles.
    if (cta == 0 && ticket == plan.tiles() + clusters() - 1) reset(launch.ticket);
  }

 private:
  __device__ int draw() { return static_cast<int>(count(launch.ticket)); }

  // The next stage, announced to receive so many blocks of A with `b_rows` rows of B each.
  __device__ int open(int b_rows, int blocks = 1) {
    const int stage = cursor.place;
    mbarrier_wait(shared.empty(stage), cursor.parity ^ 1);
    mbarrier_arrive_expect(shared.full(stage), blocks * (kABytes + b_rows * kRowBytes));
    cursor.advance();
    return stage;
  }

  __device__ void load_a(int stage, const TensorMap* upper, int upper_row, const TensorMap* lower, int lower_row,
                         int column, int block = 0) {
    tma_load(shared.a(stage, block), upper, shared.full(stage), column, upper_row);
    tma_load(shared.a(stage, block) + kHalfBytes, lower, shared.full(stage), column, lower_row);
  }

  // This CTA's half of `rows` rows of B, for both.
  __device__ void load_b(int stage, uint32_t destination, const TensorMap* map, int rows, int column, int row,
                         int layer = 0) {
    const int first = cta * rows / 2;
    tma_load_both(destination + first * kRowBytes, map, shared.full(stage), column, row + first, layer);
  }

  __device__ void load_weight(int stage, int i_n, int k) {
    if constexpr (std::is_same_v<Weight, NMajor>) {  // boxes of 64 elements of N, below each other
      constexpr int kBoxes = kBlockN / 64 / 2;
      for (int box = cta * kBoxes; box < (cta + 1) * kBoxes; ++box) {
        tma_load_both(shared.b(stage) + box * kBoxBytes, &launch.weight, shared.full(stage), i_n * kBlockN + box * 64,
                      k);
      }
    } else {
      load_b(stage, shared.b(stage), &launch.weight, kBlockN, k, i_n * kBlockN);
    }
  }

  // Where there is no x_t, its rows are zeros: rows that x does not have.
  __device__ int x_row(const Half& half) const { return plan.has_input(half.stream) ? half.row : plan.m; }

  __device__ void load_shrink(const Tile& tile) {
    observe(launch.pack_flag, plan.pack_writers(), plan.pack_readers());
    const Half upper = plan.shrink_half(tile, cta, 0), lower = plan.shrink_half(tile, cta, 1);
    const int b_rows = plan.factors() * plan.rank_block, blocks = plan.shrink_blocks;
    for (int first_k = 0; first_k < plan.k; first_k += blocks * kBlockK) {
      const int stage = open(b_rows, blocks);
      for (int block = 0; block < blocks; ++block) {  // beyond K: zeros
        const int k = first_k + block * kBlockK;
        load_a(stage, &launch.x[upper.stream], x_row(upper), &launch.x[lower.stream], x_row(lower), k, block);
        for (int factor = 0; factor < plan.factors(); ++factor) {
          load_b(stage, shared.a(stage, blocks) + (block * b_rows + factor * plan.rank_block) * kRowBytes,
                 &launch.shrink, plan.rank_block, k, plan.first_rank(tile), factor);
        }
      }
    }
  }

  __device__ void load_output(const Tile& tile) {
    const Half upper = plan.output_half(tile, cta, 0), lower = plan.output_half(tile, cta, 1);
    const int i_n = plan.i_n(tile);
    for (int step = 0; step < plan.k_steps(lower.stream); ++step) {
      const int stage = open(kBlockN), k = plan.first_k(lower.stream) + step * kBlockK;
      load_a(stage, &launch.x[upper.stream], upper.row, &launch.x[lower.stream], lower.row, k);
      load_weight(stage, i_n, k);
    }
    if (!plan.updates(lower.stream)) return;
    observe(launch.row_flags + plan.cta_row(tile, cta), plan.row_writers(), plan.row_readers());
    const int upper_row = plan.updates(upper.stream) ? upper.row : plan.m;  // rows that P does not have: zeros
    for (int step = 0; step < plan.p_steps(); ++step) {
      const int stage = open(kBlockN), column = step * kBlockK;
      load_a(stage, &launch.p[upper.stream], upper_row, &launch.p[lower.stream], lower.row, column);
      load_b(stage, shared.b(stage), &launch.expand, kBlockN, column, i_n * kBlockN);
    }
  }
};

}  // namespace linlora::sm90
