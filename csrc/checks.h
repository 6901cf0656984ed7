// What the operators ask of their arguments, stated once. A violation is an error that names the operator, the
// argument, what it is and what it has to be. Host code; only torch's stable ABI is included.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "lora_linear.h"

namespace linlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxRank = 256;

inline std::string described(const Tensor& tensor) {
  std::ostringstream text;
  text << torch::headeronly::toString(tensor.scalar_type()) << " (";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ")";
  if (tensor.is_cuda()) {
    text << " on cuda:" << tensor.get_device_index();
  } else {
    text << " that is not on a CUDA device";
  }
  return text.str();
}

inline std::string shape(int64_t rows, int64_t columns) {
  std::ostringstream text;
  text << "(" << rows << ", " << columns << ")";
  return text.str();
}

// Turns the tensors of one call into matrices once they have passed the checks. Everything is compared with x.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& x) : op_(op), dtype_(x.scalar_type()), device_(x.get_device_index()) {
    if (x.dim() != 2 || !x.is_cuda()) refuse("x is a matrix (M, K) on a CUDA device, got ", described(x));
    if (dtype_ != ScalarType::Half && dtype_ != ScalarType::BFloat16) {
      refuse("x is float16 or bfloat16, got ", described(x), ": cast it, or use the 'triton' backend");
    }
  }

  template <typename... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    std::ostringstream text;
    text << "linlora_cuda::" << op_ << ": ";
    (text << ... << parts);
    throw std::runtime_error(text.str());
  }

  Type type() const { return dtype_ == ScalarType::Half ? Type::kFloat16 : Type::kBFloat16; }

  // x's dtype where every factor has it, float32 where any has that.
  Type factor_type() const { return wide_factors_ ? Type::kFloat32 : type(); }

  int32_t device() const { return device_; }

  // An activation or the weight: of x's dtype.
  Matrix activation(const char* name, const std::optional<Tensor>& tensor, int64_t rows, int64_t columns) const {
    if (!tensor) return {};
    check_placed(name, *tensor, rows, columns);
    if (tensor->scalar_type() != dtype_) {
      refuse(name, " is ", torch::headeronly::toString(dtype_), " like x, got ", described(*tensor));
    }
    return as_matrix(*tensor);
  }

  // W (N, K), by rows or by columns: what `nn.Linear` stores, and its transpose.
  Matrix weight(const Tensor& tensor, int64_t rows, int64_t columns) const {
    const Matrix matrix = activation("weight", tensor, rows, columns);
    if (matrix.row_stride != 1 && matrix.column_stride != 1 && rows > 1 && columns > 1) {
      refuse("weight is contiguous along a dimension, got strides ", shape(matrix.row_stride, matrix.column_stride),
             ": pass weight.contiguous()");
    }
    return matrix;
  }

  // The bias, as one row: of x's dtype or float32.
  Matrix bias(const std::optional<Tensor>& tensor, int64_t columns, Type& bias_type) const {
    bias_type = type();
    if (!tensor) return {};
    bias_type = is_wide("bias", *tensor, columns, kVector) ? Type::kFloat32 : type();
    return as_matrix(*tensor);
  }

  // A factor: of x's dtype or float32. All are noted before the first is read, for all are read in one type.
  void note_factor(const char* name, const std::optional<Tensor>& tensor, int64_t rows, int64_t columns) {
    if (tensor) wide_factors_ |= is_wide(name, *tensor, rows, columns);
  }

  // A factor that has been noted, in the dtype that all have together.
  Matrix factor(const std::optional<Tensor>& tensor) {
    if (!tensor) return {};
    const ScalarType wanted = wide_factors_ ? ScalarType::Float : dtype_;
    if (tensor->scalar_type() == wanted) return as_matrix(*tensor);
    converted_.push_back(torch::stable::to(*tensor, wanted));
    return as_matrix(converted_.back());
  }

  // A new matrix of x's dtype on x's device; one without elements is absent to the problem.
  Tensor output(Matrix& matrix, int64_t rows, int64_t columns) const {
    const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
    const Tensor tensor = empty(x_dtype(), 2, sizes, strides);
    if (rows > 0 && columns > 0) matrix = as_matrix(tensor);
    return tensor;
  }

  // A new vector on x's device; one without elements stands for an output that is not wanted.
  Tensor buffer(int32_t dtype, int64_t count) const {
    const int64_t stride = 1;
    return empty(dtype, 1, &count, &stride);
  }

  int32_t x_dtype() const {
    return dtype_ == ScalarType::Half ? aoti_torch_dtype_float16() : aoti_torch_dtype_bfloat16();
  }

 private:
  static constexpr int64_t kVector = -1;  // the columns of what is a vector

  // Whether it is float32; refuses what is neither that nor of x's dtype.
  bool is_wide(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) const {
    check_placed(name, tensor, rows, columns);
    const ScalarType found = tensor.scalar_type();
    if (found != dtype_ && found != ScalarType::Float) {
      refuse(name, " is ", torch::headeronly::toString(dtype_), " like x, or float32, got ", described(tensor));
    }
    return found == ScalarType::Float;
  }

  void check_placed(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) const {
    const bool vector = columns == kVector;
    const bool fits = vector ? tensor.dim() == 1 && tensor.size(0) == rows
                             : tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
    if (!fits || !tensor.is_cuda() || tensor.get_device_index() != device_) {
      const std::string expected = vector ? "(" + std::to_string(rows) + ",)" : shape(rows, columns);
      refuse(name, " is ", expected, " on cuda:", device_, " here, got ", described(tensor));
    }
  }

  // Straight from the C interface, which costs a fraction of a call of aten::empty.
  Tensor empty(int32_t dtype, int64_t dimensions, const int64_t* sizes, const int64_t* strides) const {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dimensions, sizes, strides, dtype, aoti_torch_device_type_cuda(), device_, &handle));
    return Tensor(handle);
  }

  static Matrix as_matrix(const Tensor& tensor) {
    if (tensor.dim() == 1) return {tensor.data_ptr(), 1, tensor.size(0), tensor.size(0), tensor.stride(0)};
    return {tensor.data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
  }

  const char* op_;
  ScalarType dtype_;
  int32_t device_;
  bool wide_factors_ = false;
  std::vector<Tensor> converted_;  // alive until the launch is queued
};

}  // namespace linlora
