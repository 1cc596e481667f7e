// Vectors of numbers along a head's features, and tensors in their dtype.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <optional>
#include <vector>

namespace titans {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

constexpr double kShortest = 1e-2;  // SHORTEST of titans/nn/norm.py

template <class T>
using Vec = at::vec::Vectorized<T>;

template <class T>
T sum_of(const Vec<T>& x) {
  T parts[Vec<T>::size()];
  x.store(parts);
  for (int n = Vec<T>::size() / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
  return parts[0];
}

template <class T>
Vec<T> sigmoid(const Vec<T>& x) {
  return Vec<T>(T(1)) / (Vec<T>(T(1)) + x.neg().exp());
}

template <class Function>
auto in_dtype_of(const Tensor& x, const Function& function) {
  if (x.scalar_type() == at::kDouble) return function(double());
  TORCH_CHECK(x.scalar_type() == at::kFloat, "the native layer operators compute in float32 or float64");
  return function(float());
}

}  // namespace
}  // namespace titans
