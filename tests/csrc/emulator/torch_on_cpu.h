// Included before csrc/register.cpp: what it says of CUDA tensors, it then says of those of the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {

struct NoGuard {
  explicit NoGuard(int32_t) {}
};

}  // namespace torch::stable::accelerator

#define is_cuda is_cpu
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define DeviceGuard NoGuard
#define CUDA CPU  // the dispatch key
