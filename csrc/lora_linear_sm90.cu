// lora_linear on Hopper, one and two streams, in one launch.
//
//   one stream     u = x S0ᵀ    c = x (S0 + dS)ᵀ            y   = x Wᵀ + b + s [ c E0ᵀ + u dEᵀ ]
//   two streams    u = x S0ᵀ    c = x dSᵀ + x_t S0ᵀ         y   = x Wᵀ + b + s u E0ᵀ
//                                                           y_t = x_t Wᵀ   + s [ c E0ᵀ + u dEᵀ ]
//
// With P = s [c u] and E = [E0 dE], y = [x P] [W E]ᵀ + b: the update is a few more steps of the loop over K, with P and
// E in the place of x and W. P is computed once a row of tiles, by shrink tiles that come before the row's output tiles
// and are published through flags; an output tile looks at the flag only after its own loop over K.
//
//            B: half of it from either CTA, to both          cluster: 2 CTAs, the same columns, different rows
//                ┌────────────────────────────┐
//                │  W (256 x 64, or N-major)  │  x 4 stages   CTA: 1 producer thread, 2 consumer warpgroups
//   A, own       └────────────────────────────┘
//   ┌─────────┐  ┌────────────────────────────┐
//   │ x   64  │  │  64 x 256  warpgroup 0     │  wgmma m64n256k16, sums in 128 registers
//   ├─────────┤  ├────────────────────────────┤
//   │ x   64  │  │  64 x 256  warpgroup 1     │  two streams: the lower half of A is x_t, of the same 64 rows
//   └─────────┘  └────────────────────────────┘
//
// Pipeline. The producer draws tiles from a ticket counter and keeps the stages full by TMA, across tiles; the
// consumers keep one step of products in flight, and free a stage when the next step has been issued. The cluster
// exists to halve the reading of W: at 128 x 256 an SM alone would need 48 bytes a clock, close to all that L2
// delivers; in pairs it needs 32. Outputs are rounded once and leave through shared memory by TMA while the next tile
// is loaded.
//
// Progress (as in kernels/linearized_lora_linear_flags.py). Tickets first pack the factors to 16 bits and contiguous
// rows, which TMA can read, then go through groups of 8 rows of tiles: their shrink tiles, then column after column. A
// tile waits only for tiles of smaller tickets, which clusters that already run have drawn: it does not matter how many
// are resident. The last to look at a flag, or to draw, sets it back to zero, so there is no epoch and no memset, and a
// launch can be captured in a CUDA graph.
//
// Floor: 2MNK + 4Mr(K + N) FLOPs for each stream. Beyond it, a shrink tile reads x once more (at r = 16, 20 KB for 64
// of K, by bytes a third of an output tile's time; two such blocks a stage), packing moves 2r(K + N) elements, P is
// padded to multiples of 16 columns.
//
// Measured: not yet run on a GPU. Its own source runs on the CPU in tests/csrc/test_lora_linear_sm90.py, on emulated
// clusters, TMA, mbarriers and wgmma, under random schedules; the SASS holds HGMMA and UTMALDG, and no spills.
//
// To be read in this order: plan_sm90.cuh, pipeline_sm90.cuh, producer_sm90.cuh, consumer_sm90.cuh, and this file.
#include "consumer_sm90.cuh"
#include "lora_linear_sm90.h"

namespace linlora {
namespace sm90 {

constexpr int kThreads = 128 + kConsumers;

template <class Element, int kBlockN, class Weight>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    lora_linear_sm90_kernel(const __grid_constant__ Launch launch) {
  const Shared<kBlockN> shared{shared_memory()};
  const int cta = cta_of_cluster(), thread = thread_of_cta();
  if (thread == 0) shared.init_barriers();
  cluster_sync();
  if (thread < 128) {
    give_registers<40>();
    if (thread == 0) Producer<kBlockN, Weight>(launch, shared, cta).run();
  } else {
    take_registers<232>();
    Consumer<Element, kBlockN, Weight>(launch, shared, cta, thread - 128).run();
  }
  __syncwarp();
  cluster_sync();  // the other CTA still arrives at mbarriers here
}

// ---- host

bool is_n_major(const Matrix& weight) { return weight.column_stride != 1; }

// Why TMA cannot move `matrix` by its rows, or null.
const char* rows_obstacle(const Matrix& matrix, const char* message) {
  if (matrix.data == nullptr) return nullptr;
  const bool aligned = reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.row_stride % 8 == 0;
  return aligned && matrix.column_stride == 1 && matrix.row_stride >= matrix.columns ? nullptr : message;
}

Matrix transpose(const Matrix& matrix) {
  return {matrix.data, matrix.columns, matrix.rows, matrix.column_stride, matrix.row_stride};
}

// A matrix in boxes of 64 columns.
TensorShape boxes(const Matrix& matrix, int box_rows) {
  return {matrix.data,       static_cast<uint64_t>(matrix.columns), static_cast<uint64_t>(matrix.rows), 1,
          matrix.row_stride, matrix.rows * matrix.row_stride,       static_cast<uint32_t>(box_rows)};
}

cudaError_t encode_maps(Launch& launch, const LoraLinear& problem) {
  const Plan& plan = launch.plan;
  cudaError_t error = cudaSuccess;
  auto add = [&](TensorMap& map, int dimensions, const TensorShape& shape) {
    if (error == cudaSuccess) error = encode(map, problem.type, dimensions, shape);
  };
  auto add_rows = [&](TensorMap& map, const Matrix& matrix) {
    if (matrix.data != nullptr) add(map, 2, boxes(matrix, kHalfRows));
  };
  const bool n_major = is_n_major(problem.weight);
  add_rows(launch.x[0], problem.x);
  add_rows(launch.x[1], plan.has_x_tangent ? problem.x_tangent : problem.x);
  add_rows(launch.y[0], problem.y);
  add_rows(launch.y[1], problem.y_tangent);
  add(launch.weight, 3,
      n_major ? boxes(transpose(problem.weight), kBlockK) : boxes(problem.weight, plan.block_n / kClusterSize));

  const int64_t columns = plan.p_columns();
  const Matrix p{launch.p_scratch, plan.m, columns, columns, 1},
      u{launch.p_scratch + 2 * plan.u_column(), plan.m, plan.rank_stride, columns, 1};
  add_rows(launch.p[0], plan.two_streams ? u : p);
  add_rows(launch.p[1], p);
  add(launch.expand, 3, boxes({launch.expand_scratch, plan.n, columns, columns, 1}, plan.block_n / kClusterSize));
  add(launch.shrink, 3,
      {launch.shrink_scratch, static_cast<uint64_t>(plan.k), static_cast<uint64_t>(plan.rank_stride),
       static_cast<uint64_t>(plan.factors()), plan.k_stride(), int64_t{plan.rank_stride} * plan.k_stride(),
       static_cast<uint32_t>(plan.rank_block / kClusterSize)});
  return error;
}

template <class Element, int kBlockN>
cudaError_t launch_on(const Launch& launch, bool n_major, int clusters, cudaStream_t stream) {
  const auto kernel =
      n_major ? lora_linear_sm90_kernel<Element, kBlockN, NMajor> : lora_linear_sm90_kernel<Element, kBlockN, KMajor>;
  return launch_clusters(kernel, clusters, kThreads, Shared<kBlockN>::kBytes, stream, launch);
}

template <class Element>
cudaError_t launch_on(const Launch& launch, bool n_major, int clusters, cudaStream_t stream) {
  return launch.plan.block_n == 256 ? launch_on<Element, 256>(launch, n_major, clusters, stream)
                                    : launch_on<Element, 128>(launch, n_major, clusters, stream);
}

}  // namespace sm90

const char* lora_linear_sm90_obstacle(const LoraLinear& problem) {
  const Matrix &weight = problem.weight, columns = sm90::transpose(weight);
  if (problem.type == Type::kFloat32) return "it computes in float16 and bfloat16, not in float32";
  if (problem.x.rows <= 64) return "up to 64 rows the portable kernel's small tiles are faster";
  if (problem.x.rows > INT32_MAX / 2 || weight.rows > INT32_MAX / 2 || weight.columns > INT32_MAX / 2) {
    return "its coordinates are 32-bit integers";
  }
  if (weight.rows == 0 || weight.columns == 0 || problem.shrink.rows == 0) return "there is nothing to multiply";
  if (problem.c.data != nullptr && problem.expand.data == nullptr) return "c is computed only where expand is given";
  const char* const obstacles[] = {
      sm90::rows_obstacle(problem.x, "the rows of x are not contiguous and aligned to 16 bytes"),
      sm90::rows_obstacle(problem.x_tangent, "the rows of x_tangent are not contiguous and aligned to 16 bytes"),
      sm90::rows_obstacle(problem.y, "the rows of y are not contiguous and aligned to 16 bytes"),
      sm90::rows_obstacle(problem.y_tangent, "the rows of y_tangent are not contiguous and aligned to 16 bytes"),
      sm90::rows_obstacle(sm90::is_n_major(weight) ? columns : weight,
                          "neither the rows nor the columns of weight are contiguous and aligned to 16 bytes"),
  };
  for (const char* obstacle : obstacles) {
    if (obstacle != nullptr) return obstacle;
  }
  return nullptr;
}

int64_t lora_linear_sm90_counters(const LoraLinear& problem) { return sm90::plan_of(problem, 1).counters(); }
int64_t lora_linear_sm90_scratch(const LoraLinear& problem) {
  return sm90::scratch_of(sm90::plan_of(problem, 1)).bytes;
}

cudaError_t lora_linear_sm90(const LoraLinear& problem, Workspace workspace, cudaStream_t stream) {
  if (lora_linear_sm90_obstacle(problem) != nullptr) return cudaErrorInvalidValue;
  int resident = 0;
  if (cudaError_t error = sm90::cluster_count(resident)) return error;

  sm90::Launch launch{};
  launch.plan = sm90::plan_of(problem, resident);
  const sm90::Scratch scratch = sm90::scratch_of(launch.plan);
  unsigned char* const bytes = static_cast<unsigned char*>(workspace.scratch);
  launch.p_scratch = bytes + scratch.p;
  launch.shrink_scratch = bytes + scratch.shrink;
  launch.expand_scratch = bytes + scratch.expand;
  launch.ticket = workspace.counters;
  launch.pack_flag = workspace.counters + 1;
  launch.row_flags = workspace.counters + 2;
  launch.bias = Factor(problem.bias, problem.bias_type);
  launch.factors_shrink[0] = Factor(problem.shrink, problem.factor_type);
  launch.factors_shrink[1] = Factor(problem.d_shrink, problem.factor_type);
  const Factor d_expand(problem.d_expand, problem.factor_type);
  launch.factors_expand[0] = launch.plan.has_c ? Factor(problem.expand, problem.factor_type) : d_expand;
  launch.factors_expand[1] = d_expand;
  launch.u = static_cast<unsigned char*>(problem.u.data);
  launch.c = static_cast<unsigned char*>(problem.c.data);
  launch.u_stride = problem.u.row_stride;
  launch.c_stride = problem.c.row_stride;
  launch.scaling = sm90::Scaling(problem.scaling, problem.type);
  if (cudaError_t error = sm90::encode_maps(launch, problem)) return error;

  const bool n_major = sm90::is_n_major(problem.weight);
  const int clusters = std::min(resident, launch.plan.tiles());
  return problem.type == Type::kFloat16 ? sm90::launch_on<__half>(launch, n_major, clusters, stream)
                                        : sm90::launch_on<__nv_bfloat16>(launch, n_major, clusters, stream);
}

}  // namespace linlora
