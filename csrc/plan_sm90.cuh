// How lora_linear_sm90 divides a problem: tiles, their order, and what each reads and writes. Integers only; the same
// functions run on the host, on the device and in tests.
//
//                    shrink     output tiles, column after column
//                   ┌──────┐  ┌─────────┬─────────┬───      a row of tiles is a cluster's: the upper half CTA 0's
//     group   row 0 │  0   │  │    2    │    4    │  …      one stream    2 x 128 rows of x
//             row 1 │  1   │  │    3    │    5    │         two streams   2 x (64 rows of x and the same 64 of x_t)
//                   └──────┘  └─────────┴─────────┴───      numbers: tickets, after those that pack the factors
//
// The rows of a CTA's tile are two halves of 64, one for each warpgroup: of one stream below each other, or paired,
// primal above tangent. Streams are paired where both are wanted and both have an input; else each has tiles of its
// own.
#pragma once

#include "lora_linear.h"
#include "scheduler.cuh"

namespace linlora::sm90 {

constexpr int kClusterSize = 2;
constexpr int kHalfRows = 64;    // rows of x of one warpgroup: M of wgmma
constexpr int kBlockK = 64;      // elements of a row of a stage: 128 bytes, the width of the swizzle
constexpr int kGroupRows = 8;    // rows of tiles that go through all columns together, for the sake of L2
constexpr int kConsumers = 256;  // threads that compute
constexpr int kUnit = 8;         // elements of a packed factor that a thread writes at once: 16 bytes
constexpr int kUnitsPerThread = 4;

__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Tile {
  enum Kind { kPack, kShrink, kOutput, kNone } kind;
  int row, column;  // of clusters' tiles; kPack: row counts the tiles
};

// 64 rows of one stream.
struct Half {
  int stream, row;
};

struct Plan {
  int m, n, k, rank;
  int block_n;      // columns of an output tile
  int rank_block;   // ranks of a shrink tile
  int rank_stride;  // ranks, rounded up to 16 bytes: a block of columns of P and E
  bool two_streams, paired;
  bool has_c;  // P = [c u], E = [E0 dE]; else P = [u], E = [dE]
  bool has_d_shrink;
  bool has_x_tangent;
  int shrink_blocks;               // blocks of 64 of K in a stage of a shrink tile
  bool shrink_by_columns;          // S0 and dS are contiguous along the rank
  int first_stream, streams;       // that have tiles of their own, where they are not paired
  int pack_tiles, cluster_rows;    // tiles of a cluster
  int shrink_tiles, output_tiles;  // of a row of tiles
  int column_tiles;                // of N

  __host__ __device__ int p_columns() const { return has_c ? 2 * rank_stride : rank_stride; }
  __host__ __device__ int u_column() const { return has_c ? rank_stride : 0; }  // where u begins in P
  __host__ __device__ int factors() const { return has_d_shrink ? 2 : 1; }
  __host__ __device__ int k_stride() const { return static_cast<int>(round_up(k, kUnit)); }
  __host__ __device__ int rows_of_cta() const { return paired ? kHalfRows : 2 * kHalfRows; }

  // Steps of 64 along K, and along the columns of P. A tangent without input takes one step of zeros, from beyond K;
  // the primal of two streams at B0 = 0 has no update.
  __host__ __device__ bool has_input(int stream) const { return stream == 0 || has_x_tangent; }
  __host__ __device__ int k_steps(int stream) const {
    return has_input(stream) ? static_cast<int>(ceil_div(k, kBlockK)) : 1;
  }
  __host__ __device__ int first_k(int stream) const { return has_input(stream) ? 0 : k; }
  __host__ __device__ bool updates(int stream) const { return !two_streams || stream == 1 || has_c; }
  __host__ __device__ int p_slices() const { return static_cast<int>(ceil_div(p_columns(), 16)); }
  __host__ __device__ int p_steps() const { return static_cast<int>(ceil_div(p_columns(), kBlockK)); }

  // ---- tiles

  __host__ __device__ int tiles() const { return pack_tiles + cluster_rows * (shrink_tiles + output_tiles); }

  __host__ __device__ Tile tile(int ticket) const {
    if (ticket < pack_tiles) return {Tile::kPack, ticket, 0};
    if (ticket >= tiles()) return {Tile::kNone, 0, 0};
    const int in_order = ticket - pack_tiles, columns = shrink_tiles + output_tiles;  // 32 bits: divisions cost
    const int first_row = in_order / (kGroupRows * columns) * kGroupRows, in_group = in_order - first_row * columns;
    const int rows = cluster_rows - first_row < kGroupRows ? cluster_rows - first_row : kGroupRows;
    const int row = first_row + in_group % rows, column = in_group / rows;
    return column < shrink_tiles ? Tile{Tile::kShrink, row, column} : Tile{Tile::kOutput, row, column - shrink_tiles};
  }

  __host__ __device__ int cta_row(const Tile& tile, int cta) const { return kClusterSize * tile.row + cta; }

  // Output tiles: column tile i_n of `half`.
  __host__ __device__ int i_n(const Tile& tile) const { return tile.column % column_tiles; }
  __host__ __device__ Half output_half(const Tile& tile, int cta, int half) const {
    const int row = cta_row(tile, cta) * rows_of_cta();
    if (paired) return {half, row};
    return {first_stream + tile.column / column_tiles, row + half * kHalfRows};
  }

  // Shrink tiles. Of two streams they take 64 rows of both, so a row of 128 has two of them for each block of ranks.
  __host__ __device__ int shrinks_of_row() const { return two_streams && !paired ? 2 : 1; }
  __host__ __device__ int first_rank(const Tile& tile) const { return tile.column / shrinks_of_row() * rank_block; }
  __host__ __device__ Half shrink_half(const Tile& tile, int cta, int half) const {
    const int row = cta_row(tile, cta) * rows_of_cta();
    if (two_streams) return {half, row + tile.column % shrinks_of_row() * kHalfRows};
    return {0, row + half * kHalfRows};
  }

  // ---- flags: counters[0] is the ticket, [1] of the packed factors, then one for each CTA's row of tiles

  __host__ __device__ int counters() const { return 2 + kClusterSize * cluster_rows; }
  __host__ __device__ uint32_t pack_writers() const { return kClusterSize * pack_tiles; }
  __host__ __device__ uint32_t pack_readers() const { return kClusterSize * cluster_rows * shrink_tiles; }
  __host__ __device__ uint32_t row_writers() const { return shrink_tiles; }
  __host__ __device__ uint32_t row_readers() const {
    return paired || streams == 1 || updates(0) ? output_tiles : output_tiles / 2;
  }

  // ---- packed factors, in units of 8 elements: S (factors, rank_stride, k_stride), then E (n, p_columns)

  __host__ __device__ int64_t shrink_units() const { return int64_t{factors()} * rank_stride * (k_stride() / kUnit); }
  __host__ __device__ int64_t units() const { return shrink_units() + int64_t{n} * (p_columns() / kUnit); }
};

struct Unit {
  bool shrink;
  int row, column;  // of the packed matrix; S has factors * rank_stride rows
};

__host__ __device__ inline Unit unit_of(const Plan& plan, int64_t i) {
  if (i < plan.shrink_units()) {
    const int rows = plan.factors() * plan.rank_stride, columns = plan.k_stride() / kUnit;
    if (plan.shrink_by_columns) return {true, static_cast<int>(i % rows), static_cast<int>(i / rows) * kUnit};
    return {true, static_cast<int>(i / columns), static_cast<int>(i % columns) * kUnit};
  }
  i -= plan.shrink_units();
  const int columns = plan.p_columns() / kUnit;
  return {false, static_cast<int>(i / columns), static_cast<int>(i % columns) * kUnit};
}

// The stage of an output tile has room for so many blocks of K of a shrink tile, whose B has `b_rows` rows: two halve
// the waits of tiles that have little to multiply.
__host__ __device__ constexpr int blocks_of_stage(int block_n, int b_rows) {
  return 2 * (2 * kHalfRows + b_rows) <= 2 * kHalfRows + block_n ? 2 : 1;
}

// What tiles take, in clocks of a multiprocessor. Estimates: no GPU has run them. A step of 256 columns is one of 780
// TFLOP/s on an H200, a narrow one 0.55 of it; a shrink step is bound by what it reads, and by waits where a stage
// holds one block; a tile begins and ends.
struct Clocks {
  static constexpr int kWideStep = 1100, kNarrowStep = 605, kShrinkStep[] = {550, 440}, kTile = 2800;

  int64_t step, shrink, output;  // a step along K or P; a tile

  explicit Clocks(const Plan& plan)
      : step(plan.block_n == 256 ? kWideStep : kNarrowStep),
        shrink(int64_t{kShrinkStep[plan.shrink_blocks - 1]} * plan.k_steps(0) + kTile),
        output(step * (plan.k_steps(0) + plan.p_steps()) + kTile) {}
};

// When the last of `clusters` is done. They share the shrink tiles, `late` of them have one more, and then take output
// tiles: of the times at which one of them ends such a tile, the first by which all are done.
inline int64_t makespan(const Plan& plan, int clusters) {
  const Clocks clocks(plan);
  const int64_t shrinks = int64_t{plan.cluster_rows} * plan.shrink_tiles,
                outputs = int64_t{plan.cluster_rows} * plan.output_tiles, late = shrinks % clusters,
                early_start = shrinks / clusters * clocks.shrink,
                late_start = late > 0 ? early_start + clocks.shrink : early_start;
  for (int64_t tiles = outputs / clusters;; ++tiles) {
    for (const int64_t start : {early_start, late_start}) {
      const int64_t end = start + tiles * clocks.output;
      if (end < late_start) continue;
      const int64_t by_early = (end - early_start) / clocks.output, by_late = (end - late_start) / clocks.output;
      if ((clusters - late) * by_early + late * by_late >= outputs) return end;
    }
  }
}

// The plan with output tiles of `block_n` columns.
inline Plan with_columns(Plan plan, int block_n) {
  plan.block_n = block_n;
  plan.shrink_blocks = blocks_of_stage(block_n, plan.factors() * plan.rank_block);
  plan.column_tiles = static_cast<int>(ceil_div(plan.n, block_n));
  plan.output_tiles = plan.column_tiles * (plan.paired ? 1 : plan.streams);
  return plan;
}

// Of `clusters` clusters at work at a time; output tiles are as wide as makes them end sooner.
inline Plan plan_of(const LoraLinear& problem, int clusters) {
  Plan plan{};
  plan.m = static_cast<int>(problem.x.rows);
  plan.n = static_cast<int>(problem.weight.rows);
  plan.k = static_cast<int>(problem.weight.columns);
  plan.rank = static_cast<int>(problem.shrink.rows);
  plan.rank_block = plan.rank <= 32 ? 32 : 64;
  plan.rank_stride = static_cast<int>(round_up(plan.rank, kUnit));
  plan.two_streams = problem.two_streams;
  plan.has_c = problem.expand.data != nullptr;
  plan.has_d_shrink = plan.has_c && problem.d_shrink.data != nullptr;
  plan.has_x_tangent = problem.two_streams && problem.x_tangent.data != nullptr;
  plan.shrink_by_columns = problem.shrink.row_stride < problem.shrink.column_stride;
  plan.paired = plan.has_x_tangent && problem.y.data != nullptr;
  plan.first_stream = problem.y.data == nullptr ? 1 : 0;
  plan.streams = problem.two_streams ? 2 - plan.first_stream : 1;
  plan.cluster_rows = static_cast<int>(ceil_div(plan.m, kClusterSize * plan.rows_of_cta()));
  plan.shrink_tiles = static_cast<int>(ceil_div(plan.rank, plan.rank_block)) * plan.shrinks_of_row();
  plan.pack_tiles = static_cast<int>(ceil_div(plan.units(), kClusterSize * kConsumers * kUnitsPerThread));
  const Plan wide = with_columns(plan, 256), narrow = with_columns(plan, 128);
  return makespan(wide, clusters) <= makespan(narrow, clusters) ? wide : narrow;
}

// Where the parts of scratch begin, in bytes.
struct Scratch {
  int64_t p, shrink, expand, bytes;
};

inline Scratch scratch_of(const Plan& plan) {
  constexpr int64_t kAlignment = 128, kElement = 2;
  Scratch scratch{};
  scratch.shrink = round_up(int64_t{plan.m} * plan.p_columns() * kElement, kAlignment);
  scratch.expand = scratch.shrink + round_up(plan.shrink_units() * kUnit * kElement, kAlignment);
  scratch.bytes = scratch.expand + int64_t{plan.n} * plan.p_columns() * kElement;
  return scratch;
}

}  // namespace linlora::sm90
