// lora_linear for every GPU from sm_80 on: a LoRA layer with its tangent, one stream or two, in one launch.
//
//   one stream     u = x S0ᵀ    c = x (S0 + dS)ᵀ            y   = x Wᵀ + b + s [ c E0ᵀ + u dEᵀ ]
//   two streams    u = x S0ᵀ    c = x dSᵀ + x_t S0ᵀ         y   = x Wᵀ + b + s u E0ᵀ
//                                                           y_t = x_t Wᵀ   + s [ c E0ᵀ + u dEᵀ ]
//
//   x, x_t (M, K)   W (N, K)   S0, dS (r, K)   E0, dE (N, r)   y, y_t (M, N)   u, c (M, r)      lora_linear.h
//
//                    K →                     columns        ranks, ranks      after the loop over K:
//              ┌─────┬───                  ┌──────────┐      ┌───┬───┐
//   rows of x  │     │ …  · Wᵀ, [S0; dS]ᵀ  │    y     │      │ u │ c │        y   += s c E0ᵀ + s u dEᵀ
//              ├─────┼───                  ├──────────┤      └───┴───┘
//   and of x_t │     │ …                   │   y_t    │                       (two streams: see above)
//              └─────┴───                  └──────────┘
//
// A block computes one tile of y and the same tile of y_t: every tile of W is loaded once for both. u and c are
// computed again by every column of tiles, from the tile of x that is there anyway (overhead 2r / columns of a tile,
// three halves of it with two streams), and stored by the first. More ranks than fit (64, or 16 and 32 in the small
// tiles) take further loops over K, without W, before the one with it.
//
// Pipeline: x and W come by cp.async, kStages - 1 steps of K ahead; the factors through registers, one step ahead,
// rounded to `Type` on the way; one barrier a step. Accumulators are float32; u and c are rounded once, to be operands
// of the update, and y once, at its store.
//
//   shape      rows of x (two streams)   columns   K step   stages   ranks   warps    for
//   kRow       16 (16)                   64        128      4 (3)    16      1 x 4    M <= 16: reading W once
//   kPanel     64 (32)                   64        64       4        32      2 x 2    M <= 64, and few tiles
//   kSquare    128 (64)                  128       32       4        64      2 x 4    the rest
//
// Floor: one stream 2MNK + 4Mr(K + N) FLOPs; MK + NK + MN + 2r(K + N) + 2Mr elements, each moved once. Two streams
// twice the FLOPs of the frozen product, and of the elements of x, y. Measured: not yet run on a GPU; emulated on the
// CPU (tests/csrc/emulator/) and compiled for sm_80, sm_90a and sm_100.
#include "epilogue.cuh"
#include "lora_linear_sm80.h"
#include "problem_sm80.cuh"

namespace linlora {
namespace {

template <TileShape kShape, class Type, int kStreams>
struct Block : Config<kShape, kStreams> {
  using Config_ = Config<kShape, kStreams>;
  using Config_::kColumns, Config_::kDepth, Config_::kRanks, Config_::kRows, Config_::kStages, Config_::kWarpColumns,
      Config_::kWarpRows;
  static constexpr int kThreads = 32 * kWarpRows * kWarpColumns;
  // What a warp computes, in fragments of 16 rows by 8 columns; of u and c together as pairs of 8 ranks each.
  static constexpr int kM = kRows / kWarpRows / 16, kN = kColumns / kWarpColumns / 8,
                       kPairs = ceil_div(kRanks / 8, kWarpColumns);

  using XTile = SharedTile<kRows, kDepth>;
  using WeightTile = SharedTile<kColumns, kDepth>;
  using TransposedWeightTile = SharedTile<kDepth, kColumns>;
  using XCopy = TileCopy<XTile, kThreads>;
  using WeightCopy = TileCopy<WeightTile, kThreads>;
  using TransposedWeightCopy = TileCopy<TransposedWeightTile, kThreads>;
  using ShrinkTile = SharedTile<2 * kRanks, kDepth>;    // S0 above dS
  using RankTile = SharedTile<kRows, 2 * kRanks>;       // u beside c
  using ExpandTile = SharedTile<kColumns, 2 * kRanks>;  // dE beside E0
  using OutputTile = SharedTile<kRows, kColumns>;
  using ShrinkTiles = FactorTiles<Type, kRanks, kDepth, kThreads>;
  using ExpandTiles = FactorTiles<Type, kColumns, kRanks, kThreads>;

  static constexpr uint32_t kStageBytes = kStreams * XTile::kBytes + WeightTile::kBytes;
  static constexpr uint32_t kSharedBytes = kStages * kStageBytes + 2 * ShrinkTile::kBytes;
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 have no more");
  static_assert(RankTile::kBytes + ExpandTile::kBytes <= kSharedBytes && OutputTile::kBytes <= kSharedBytes,
                "after the loop, u, c and E and then y lie where x and W were");

  const Problem& problem;
  const int first_row, first_column;
  const bool stores_ranks;
  const int warp_row = threadIdx.x / 32 / kWarpColumns, warp_column = threadIdx.x / 32 % kWarpColumns;
  const uint32_t memory = shared_memory();
  // Where this thread begins to copy, and where its lane's rows of the warp's first fragments are in their tiles.
  CopyStart x_start[kStreams], weight_start;
  uint32_t x_offset, weight_offset, shrink_offset;
  float y[kStreams][kM][kN][4];
  float u[kPairs][kM][4], c[kPairs][kM][4];

  __device__ Block(const Problem& problem, TileOrder::Place tile)
      : problem(problem),
        first_row(static_cast<int>(tile.row) * kRows),
        first_column(static_cast<int>(tile.column) * kColumns),
        stores_ranks(tile.column == 0) {
#pragma unroll
    for (int stream = 0; stream < kStreams; ++stream) x_start[stream] = XCopy::start(problem.x[stream], first_row, 0);
    weight_start = problem.weight_along_k ? WeightCopy::start(problem.weight, first_column, 0)
                                          : TransposedWeightCopy::start(problem.weight, 0, first_column);
    x_offset = rows_offset<XTile>(row_of(0));
    weight_offset = problem.weight_along_k ? columns_offset<WeightTile>(column_of(0), column_of(1))
                                           : transposed_columns_offset<TransposedWeightTile>(column_of(0));
    shrink_offset = columns_offset<ShrinkTile>(rank_of(0), kRanks + rank_of(0));
    keep(x_offset);
    keep(weight_offset);
    keep(shrink_offset);
  }

  __device__ uint32_t x_tile(int step, int stream) const {
    return memory + step % kStages * kStageBytes + stream * XTile::kBytes;
  }
  __device__ uint32_t weight_tile(int step) const { return x_tile(step, kStreams); }
  __device__ uint32_t shrink_tile(int step) const {
    return memory + kStages * kStageBytes + step % 2 * ShrinkTile::kBytes;
  }

  // Where fragments of this warp begin in a tile. The pairs go round from the other end in every other row of warps:
  // few of them still load all four tensor cores alike.
  __device__ int row_of(int m) const { return warp_row * (16 * kM) + 16 * m; }
  __device__ int column_of(int n) const { return warp_column * (8 * kN) + 8 * n; }
  __device__ int rank_of(int pair) const {
    return 8 * (pair * kWarpColumns + (warp_column + warp_row * (kWarpColumns / 2)) % kWarpColumns);
  }

  __device__ void run() {
    start_with_bias();
    for (int rank = (problem.ranks - 1) / kRanks * kRanks; rank >= 0; rank -= kRanks) add_rank_block(rank);
    store();
  }

  __device__ void start_with_bias() {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = first_column + column_of(n) + lane_index() % 4 * 2 + e % 2;
        const float bias =
            problem.bias.rows != 0 && column < problem.bias.columns ? load_number<Type>(problem.bias, 0, column) : 0.0f;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          y[0][m][n][e] = bias;
          if (kStreams == 2) y[kStreams - 1][m][n][e] = 0.0f;
        }
      }
    }
  }

  // y and y_t += the update of kRanks ranks from `rank` on, and with the last block, rank 0, the product with W, in one
  // loop over K. It begins kStages - 1 steps early, to fill the pipeline.
  __device__ void add_rank_block(int rank) {
    const bool frozen = rank == 0;
    const int ranks = problem.ranks - rank < kRanks ? problem.ranks - rank : kRanks;
    const int steps = static_cast<int>(ceil_div(problem.depth, kDepth));
    ShrinkTiles shrink(problem.shrink, rank, 0), d_shrink(problem.d_shrink, rank, 0);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) u[pair][m][e] = c[pair][m][e] = 0.0f;
      }
    }

    for (int step = 1 - kStages; step < steps; ++step) {
      if (step >= 0) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the tiles of this step are there; nobody reads those of the last one any more
      }
      fetch(step + kStages - 1, steps, frozen);
      const int next = step + 1;
      if (next >= 0) {
        shrink.load(next * kDepth);
        if (problem.pair) d_shrink.load(next * kDepth);
      }
      if (step >= 0) multiply(step, ranks, frozen);
      if (next >= 0) {
        shrink.template store<ShrinkTile>(shrink_tile(next), 0, 0);
        if (problem.pair) d_shrink.template store<ShrinkTile>(shrink_tile(next), kRanks, 0);
      }
    }
    __syncthreads();  // u, c and E take the place of x and W
    add_update(rank, ranks);
    __syncthreads();
  }

  __device__ void fetch(int step, int steps, bool frozen) const {
    if (step < steps) {
      const int k = step * kDepth;
#pragma unroll
      for (int stream = 0; stream < kStreams; ++stream) {
        XCopy::copy(problem.x[stream], x_start[stream], x_tile(step, stream), 0, k);
      }
      if (frozen && problem.weight_along_k) {
        WeightCopy::copy(problem.weight, weight_start, weight_tile(step), 0, k);
      } else if (frozen) {
        TransposedWeightCopy::copy(problem.weight, weight_start, weight_tile(step), k, 0);
      }
    }
    cp_async_commit();  // an empty group past the end: the count of the groups stays that of the steps
  }

  __device__ void multiply(int step, int ranks, bool frozen) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t x[kStreams][kM][4], w[kN / 2][4], s[kPairs][4];
      load_fragments(x, w, s, step, k, ranks, frozen);
      if (frozen) {
#pragma unroll
        for (int stream = 0; stream < kStreams; ++stream) {
          if (kStreams == 2 && !problem.product[stream]) continue;
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int n = 0; n < kN; ++n) {
              mma_m16n8k16<Type>(y[stream][m][n], x[stream][m], w[n / 2][n % 2 * 2], w[n / 2][n % 2 * 2 + 1]);
            }
          }
        }
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        if (rank_of(pair) >= ranks) continue;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma_m16n8k16<Type>(u[pair][m], x[0][m], s[pair][0], s[pair][1]);
          if (!problem.pair) continue;
          mma_m16n8k16<Type>(c[pair][m], x[0][m], s[pair][2], s[pair][3]);
          if (kStreams == 2) mma_m16n8k16<Type>(c[pair][m], x[kStreams - 1][m], s[pair][0], s[pair][1]);
        }
      }
    }
  }

  // The warp's part of columns k to k + 15 of the tiles: of x, of W and of S0 and dS.
  __device__ void load_fragments(uint32_t (&x)[kStreams][kM][4], uint32_t (&w)[kN / 2][4], uint32_t (&s)[kPairs][4],
                                 int step, int k, int ranks, bool frozen) {
#pragma unroll
    for (int stream = 0; stream < kStreams; ++stream) {
#pragma unroll
      for (int m = 0; m < kM; ++m) ldmatrix(x[stream][m], XTile::move(x_tile(step, stream) + x_offset, 16 * m, k));
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (rank_of(pair) < ranks)
        ldmatrix(s[pair], ShrinkTile::move(shrink_tile(step) + shrink_offset, 8 * kWarpColumns * pair, k));
    }
    if (!frozen) return;
    if (problem.weight_along_k) {
#pragma unroll
      for (int n = 0; n < kN; n += 2) ldmatrix(w[n / 2], WeightTile::move(weight_tile(step) + weight_offset, 8 * n, k));
    } else {
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        ldmatrix_transposed(w[n / 2], TransposedWeightTile::move(weight_tile(step) + weight_offset, k, 8 * n));
      }
    }
  }

  __device__ void add_update(int rank, int ranks) {
    const uint32_t rank_tile = memory;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (rank_of(pair) >= kRanks) continue;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[pair][m][e] += kStreams == 1 ? u[pair][m][e] : 0.0f;
        store_fragment<RankTile, Type>(u[pair][m], rank_tile, row_of(m), rank_of(pair));
        store_fragment<RankTile, Type>(c[pair][m], rank_tile, row_of(m), kRanks + rank_of(pair));
      }
    }
    store_expand(problem.d_expand, rank, 0);
    if (problem.pair) store_expand(problem.expand, rank, kRanks);
    __syncthreads();

    update(y[kStreams - 1], ranks, 0, 0);  // s u dEᵀ
    if (problem.pair) {
      update(y[kStreams - 1], ranks, kRanks, kRanks);                           // s c E0ᵀ
      if (kStreams == 2 && problem.product[0]) update(y[0], ranks, 0, kRanks);  // s u E0ᵀ
    }
    if (stores_ranks) {
      store_tile<RankTile, kRanks, kThreads>(rank_tile, 0, problem.u, first_row, rank);
      store_tile<RankTile, kRanks, kThreads>(rank_tile, kRanks, problem.c, first_row, rank);
    }
  }

  __device__ void update(float (&sums)[kM][kN][4], int ranks, int p_column, int e_column) const {
    add_product<RankTile, ExpandTile, Type>(sums, problem.scaling, ranks, memory, p_column, memory + RankTile::kBytes,
                                            e_column, row_of(0), column_of(0));
  }

  // Columns `rank` to rank + kRanks of dE or E0 become those from `column` on of the tile.
  __device__ void store_expand(const Factor& factor, int rank, int column) const {
    ExpandTiles expand(factor, first_column, rank);
    expand.load(0);
    expand.template store<ExpandTile>(memory + RankTile::kBytes, 0, column);
  }

  __device__ void store() {
#pragma unroll
    for (int stream = 0; stream < kStreams; ++stream) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) store_fragment<OutputTile, Type>(y[stream][m][n], memory, row_of(m), column_of(n));
      }
      __syncthreads();
      store_tile<OutputTile, kColumns, kThreads>(memory, 0, problem.y[stream], first_row, first_column);
      __syncthreads();
    }
  }
};

template <TileShape kShape, class Type, int kStreams>
__global__ void __launch_bounds__(Block<kShape, Type, kStreams>::kThreads, 1)
    lora_linear_sm80_kernel(const __grid_constant__ Problem problem) {
  Block<kShape, Type, kStreams>(problem, problem.order.at(blockIdx.x)).run();
}

template <TileShape kShape, class Type, int kStreams>
cudaError_t launch_shape(const LoraLinear& given, cudaStream_t stream) {
  using Block = Block<kShape, Type, kStreams>;
  Problem problem(given);
  const int64_t columns = ceil_div(given.weight.rows, Block::kColumns);
  problem.order = {ceil_div(given.x.rows, Block::kRows),
                   columns > 0 ? columns : 1};  // u and c even if y has no columns
  if (problem.order.tiles() > INT32_MAX) return cudaErrorInvalidValue;
  return launch(lora_linear_sm80_kernel<kShape, Type, kStreams>, dim3{static_cast<unsigned>(problem.order.tiles())},
                dim3{Block::kThreads}, Block::kSharedBytes, stream, problem);
}

template <class Type, int kStreams>
cudaError_t launch_streams(const LoraLinear& given, cudaStream_t stream) {
  int multiprocessors = 0;
  if (cudaError_t error = multiprocessor_count(multiprocessors)) return error;
  switch (choose_tile(given.x.rows, given.weight.rows, kStreams, multiprocessors)) {
    case TileShape::kRow:
      return launch_shape<TileShape::kRow, Type, kStreams>(given, stream);
    case TileShape::kPanel:
      return launch_shape<TileShape::kPanel, Type, kStreams>(given, stream);
    default:
      return launch_shape<TileShape::kSquare, Type, kStreams>(given, stream);
  }
}

template <class Type>
cudaError_t launch_type(const LoraLinear& given, cudaStream_t stream) {
  return given.two_streams ? launch_streams<Type, 2>(given, stream) : launch_streams<Type, 1>(given, stream);
}

}  // namespace

cudaError_t lora_linear_sm80(const LoraLinear& problem, cudaStream_t stream) {
  if (problem.x.rows == 0) return cudaSuccess;
  constexpr int64_t kMost = INT32_MAX - 1024;  // no sum of a side and a tile overflows
  if (problem.x.rows > kMost || problem.x.columns > kMost || problem.weight.rows > kMost) return cudaErrorInvalidValue;
  return problem.type == Type::kFloat16 ? launch_type<__half>(problem, stream)
                                        : launch_type<__nv_bfloat16>(problem, stream);
}

}  // namespace linlora
