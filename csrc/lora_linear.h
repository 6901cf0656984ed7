// lora_linear: what a launch is given, the same for every architecture.
//
//   one stream     u = x S0ᵀ    c = x (S0 + dS)ᵀ            y   = x Wᵀ + b + s [ c E0ᵀ + u dEᵀ ]
//   two streams    u = x S0ᵀ    c = x dSᵀ + x_t S0ᵀ         y   = x Wᵀ + b + s u E0ᵀ
//                                                           y_t = x_t Wᵀ   + s [ c E0ᵀ + u dEᵀ ]
//   at B0 = 0 (no dS, no E0, no c): the terms with dS and E0 drop out.
//
// The backward dX is the same problem on the transposes, with the streams swapped: nothing here knows about it.
#pragma once

#include <cstdint>

namespace linlora {

enum class Type : int32_t { kFloat16, kBFloat16, kFloat32 };

// A matrix of device memory, any strides (in elements); absent where data is null.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 0;
};

struct LoraLinear {
  Type type;                // of x, W and the outputs: float16 or bfloat16
  Type factor_type;         // of the four factors: the same, or float32
  Type bias_type;           // of the bias: the same, or float32
  Matrix x, x_tangent;      // (M, K); no x_tangent with two streams means that it is zero
  Matrix weight;            // (N, K); K or N contiguous
  Matrix bias;              // (1, N), or absent
  Matrix shrink, expand;    // S0 (r, K), E0 (N, r)
  Matrix d_shrink, d_expand;  // dS, dE
  Matrix y, y_tangent;      // (M, N), N contiguous; y absent: the primal is not wanted (two streams)
  Matrix u, c;              // (M, r), r contiguous, in `type`; absent: not wanted
  float scaling;
  bool two_streams;
};

}  // namespace linlora
