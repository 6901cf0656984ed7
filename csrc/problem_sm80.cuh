// What the portable kernel is made for (Config) and what a launch of it is given (Problem).
#pragma once

#include "copy.cuh"
#include "factors.cuh"
#include "scheduler.cuh"

namespace linlora {

// A block's tile and its warps; the table in lora_linear_sm80.cu says what for.
template <TileShape kShape, int kStreams>
struct Config;

template <int kStreams>
struct Config<TileShape::kRow, kStreams> {
  static constexpr int kRows = 16, kColumns = 64, kDepth = 128, kStages = kStreams == 1 ? 4 : 3, kRanks = 16;
  static constexpr int kWarpRows = 1, kWarpColumns = 4;
};

template <int kStreams>
struct Config<TileShape::kPanel, kStreams> {
  static constexpr int kRows = 64 / kStreams, kColumns = 64, kDepth = 64, kStages = 4, kRanks = 32;
  static constexpr int kWarpRows = 2, kWarpColumns = 2;
};

template <int kStreams>
struct Config<TileShape::kSquare, kStreams> {
  static constexpr int kRows = 128 / kStreams, kColumns = 128, kDepth = 32, kStages = 4, kRanks = 64;
  static constexpr int kWarpRows = 2, kWarpColumns = 4;
};

// A LoraLinear as the kernel reads it; index 0 is the primal stream (of one stream: the only one).
struct Problem {
  Operand x[2], y[2], weight, u, c;
  Factor bias, shrink, d_shrink, expand, d_expand;
  int ranks, depth;  // r, K
  float scaling;
  bool weight_along_k;  // else `weight` is its transpose
  bool pair;            // B0 != 0
  bool product[2];      // whether y[stream] has a frozen product
  TileOrder order;

  explicit Problem(const LoraLinear& given)
      : x{Operand(given.x), Operand(given.x_tangent)},
        y{Operand(given.y), Operand(given.y_tangent)},
        u(given.u),
        c(given.c),
        bias(given.bias, given.bias_type),
        shrink(given.shrink, given.factor_type),
        d_shrink(given.d_shrink, given.factor_type),
        expand(given.expand, given.factor_type),
        d_expand(given.d_expand, given.factor_type),
        ranks(static_cast<int>(given.shrink.rows)),
        depth(static_cast<int>(given.x.columns)),
        scaling(given.scaling),
        weight_along_k(given.weight.column_stride == 1 || given.weight.row_stride != 1),
        pair(given.expand.data != nullptr || given.c.data != nullptr),  // an empty E0 has no data
        product{given.y.data != nullptr, given.x_tangent.data != nullptr},
        order{} {
    weight = weight_along_k ? Operand(given.weight) : transposed(given.weight);
  }
};

}  // namespace linlora
