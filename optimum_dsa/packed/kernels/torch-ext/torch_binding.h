// The operators of this build, as they are in LibTorch's stable ABI.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

torch::stable::Tensor linear(torch::stable::Tensor input, torch::stable::Tensor mask, torch::stable::Tensor values,
                             torch::stable::Tensor starts, std::optional<torch::stable::Tensor> scales, int64_t group);

torch::stable::Tensor dense_rows(torch::stable::Tensor mask, torch::stable::Tensor values, torch::stable::Tensor starts,
                                 std::optional<torch::stable::Tensor> scales, int64_t group, int64_t columns,
                                 int64_t first, int64_t last, torch::headeronly::ScalarType dtype);

// Which instruction set runs from now on, "reference" for none: 0 where this processor lacks it. Those it has, the best
// first. And which operators these are, a number that changes with their arguments.
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED int optimum_dsa_kernels_use(const char* name);
EXPORTED const char* optimum_dsa_kernels_runnable();
EXPORTED int optimum_dsa_kernels_contract();
