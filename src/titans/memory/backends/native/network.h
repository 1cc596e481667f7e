// The fast network of one head where it is not a matrix product: activation, LayerNorm, step normalizers, each
// forward and backward. Token matrices are (features, slots), a vector runs along slots.
#pragma once

#include <cmath>

#include "matmul.h"

namespace titans {

constexpr double kNormEps = 1e-5;
constexpr double kNormalizerFloor = 1e-6;
constexpr double kActivationSlope = 1.13;

// The inner problem of one head.
struct Network {
  int depth, key_dim, head_dim, hidden;
  enum Activation { kGelu, kSilu, kSin } activation;
  bool residual, norm, normalize;  // a residual needs equal key_dim and head_dim
  bool limited;  // rows longer than `row_limit` are shortened to it where a chunk ends
  bool narrow;
  enum Objective { kSquaredError, kHuber, kLp } objective;
  double length_floor, row_limit, parameter;  // the last is the objective's: delta or p

  int in(int layer) const { return layer ? hidden : key_dim; }
  int out(int layer) const { return layer + 1 < depth ? hidden : head_dim; }
  int widest() const { return std::max(key_dim, depth > 1 ? std::max(head_dim, hidden) : head_dim); }
};

// h = act(z) and, where they are wanted, act'(z) and act''(z).
template <class T>
inline void activate(Network::Activation kind, int n, const T* z, T* h, T* slope, T* curvature) {
  using V = at::vec::Vectorized<T>;
  const V half(T(0.5)), one(T(1)), two(T(2));
  for (int i = 0; i < n; i += V::size()) {
    const V x = V::loadu(z + i);
    if (kind == Network::kGelu) {
      const V area = half * (one + (x * V(T(M_SQRT1_2))).erf());
      (x * area).store(h + i);
      if (!slope) continue;
      const V density = V(T(0.5 * M_SQRT1_2 * M_2_SQRTPI)) * (x * x * half.neg()).exp();
      (area + x * density).store(slope + i);
      if (curvature) (density * (two - x * x)).store(curvature + i);
    } else if (kind == Network::kSilu) {
      const V gate = one / (one + x.neg().exp());
      (x * gate).store(h + i);
      if (!slope) continue;
      const V closed = one - gate;
      (gate * (one + x * closed)).store(slope + i);
      if (curvature) (gate * closed * (two + x * (one - two * gate))).store(curvature + i);
    } else {
      const V wave = x.sin();
      wave.store(h + i);
      if (!slope) continue;
      x.cos().store(slope + i);
      if (curvature) wave.neg().store(curvature + i);
    }
  }
}

template <class T>
inline void multiply(std::ptrdiff_t size, const T* a, const T* b, T* to) {
  for (std::ptrdiff_t i = 0; i < size; ++i) to[i] = a[i] * b[i];
}

template <class T>
inline void add_all(std::ptrdiff_t size, const T* from, T* to) {
  for (std::ptrdiff_t i = 0; i < size; ++i) to[i] += from[i];
}

// Σ over features of a·b, (slots,). Several sums at once, because each waits for its last addition; slots are whole
// vectors or one.
template <class T>
inline void dot_columns(int features, int slots, const T* a, const T* b, T* sum) {
  if (slots == 1) {
    *sum = 0;
    for (int i = 0; i < features; ++i) *sum += a[i] * b[i];
    return;
  }
  for (int t = 0; t < slots; t += kLanes<T>) {
    Vector<T> sums[4] = {};
    const T *left = a + t, *right = b + t;
    int i = 0;
    for (; i + 4 <= features; i += 4, left += 4 * slots, right += 4 * slots)
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) sums[n] += load(left + n * slots) * load(right + n * slots);
    for (; i < features; ++i, left += slots, right += slots) sums[0] += load(left) * load(right);
    store(sum + t, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

template <class T>
inline T sum_of(Vector<T> x) {
  T sum = 0;
  for (int n = 0; n < kLanes<T>; ++n) sum += x[n];
  return sum;
}

// Σ a·b of two matrices, whole vectors.
template <class T>
inline T dot(std::ptrdiff_t size, const T* a, const T* b) {
  Vector<T> sums[4] = {};
  std::ptrdiff_t i = 0;
  for (; i + 4 * kLanes<T> <= size; i += 4 * kLanes<T>)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sums[n] += load(a + i + n * kLanes<T>) * load(b + i + n * kLanes<T>);
  for (; i < size; i += kLanes<T>) sums[0] += load(a + i) * load(b + i);
  return sum_of<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Gain and bias of one head, each (head_dim,) or null.
template <class T>
struct Affine {
  const T* gain;
  const T* bias;
  T scale(int i) const { return gain ? gain[i] : T(1); }
  T shift(int i) const { return bias ? bias[i] : T(0); }
};

// LayerNorm without gain and bias: normed (features, slots) and its scale 1/√(var + eps) (slots,).
template <class T>
inline void layer_norm(int features, int slots, const T* x, T* normed, T* scale, T* mean) {
  std::fill_n(mean, slots, T(0));
  std::fill_n(scale, slots, T(0));
  for (int i = 0; i < features; ++i)
    for (int t = 0; t < slots; ++t) mean[t] += x[i * slots + t];
  for (int t = 0; t < slots; ++t) mean[t] /= T(features);
  for (int i = 0; i < features; ++i)
    for (int t = 0; t < slots; ++t) {
      normed[i * slots + t] = x[i * slots + t] - mean[t];
      scale[t] += normed[i * slots + t] * normed[i * slots + t];
    }
  for (int t = 0; t < slots; ++t) scale[t] = T(1) / std::sqrt(scale[t] / T(features) + T(kNormEps));
  for (int i = 0; i < features; ++i)
    for (int t = 0; t < slots; ++t) normed[i * slots + t] *= scale[t];
}

// The gradient of LayerNorm's input from that of its output, `grad`, and what else its scale has, `scale_grad`.
template <class T>
inline void layer_norm_backward(
    int features, int slots, const T* normed, const T* scale, const T* grad, const T* scale_grad, T* to,
    T* mean, T* along) {
  std::fill_n(mean, slots, T(0));
  std::fill_n(along, slots, T(0));
  for (int i = 0; i < features; ++i)
    for (int t = 0; t < slots; ++t) {
      mean[t] += grad[i * slots + t];
      along[t] += grad[i * slots + t] * normed[i * slots + t];
    }
  for (int t = 0; t < slots; ++t) {
    mean[t] /= T(features);
    along[t] = (along[t] + (scale_grad ? scale_grad[t] * scale[t] : T(0))) / T(features);
  }
  for (int i = 0; i < features; ++i)
    for (int t = 0; t < slots; ++t)
      to[i * slots + t] = scale[t] * (grad[i * slots + t] - mean[t] - normed[i * slots + t] * along[t]);
}

// M(x) from f(x): LayerNorm and residual. x is looked at for a residual only: it may have another width.
template <class T>
inline void finish(
    const Network& net, int slots, const T* features, const T* x, Affine<T> affine, T* answers, T* scratch) {
  const int d = net.head_dim;
  const T* from = features;
  if (net.norm) {
    T *scale = scratch, *mean = scratch + slots;
    layer_norm(d, slots, features, answers, scale, mean);
    for (int i = 0; i < d; ++i)
      for (int t = 0; t < slots; ++t)
        answers[i * slots + t] = answers[i * slots + t] * affine.scale(i) + affine.shift(i);
    from = answers;
  }
  if (net.residual)
    for (int i = 0; i < d * slots; ++i) answers[i] = from[i] + x[i];
  else if (from != answers)
    std::copy_n(from, d * slots, answers);
}

// Gradients of f(x), gain and bias (these are added to) through `finish`; the residual is the caller's.
template <class T>
inline void finish_backward(
    const Network& net, int slots, const T* features, Affine<T> affine, const T* grad, T* to, T* gain_grad,
    T* bias_grad, T* scratch) {
  const int d = net.head_dim, n = d * slots;
  if (!net.norm) {
    std::copy_n(grad, n, to);
    return;
  }
  T *normed = scratch, *scaled = scratch + n, *scale = scratch + 2 * n;
  T *mean = scale + slots, *along = mean + slots;
  layer_norm(d, slots, features, normed, scale, mean);
  for (int i = 0; i < d; ++i) {
    T gain = 0, bias = 0;
    for (int t = 0; t < slots; ++t) {
      gain += grad[i * slots + t] * normed[i * slots + t];
      bias += grad[i * slots + t];
      scaled[i * slots + t] = grad[i * slots + t] * affine.scale(i);
    }
    if (gain_grad) gain_grad[i] += gain;
    if (bias_grad) bias_grad[i] += bias;
  }
  layer_norm_backward(d, slots, normed, scale, scaled, static_cast<const T*>(nullptr), to, mean, along);
}

template <class T>
inline T largest_gain(const Network& net, Affine<T> affine) {
  T largest = affine.gain ? T(0) : T(1);
  for (int i = 0; affine.gain && i < net.head_dim; ++i) largest = std::max(largest, std::abs(affine.gain[i]));
  return largest;
}

// Per layer the divisor of its step sizes, L · max(c, floor), and the bound on the curvature above it, of which the
// last layer's is given.
template <class T>
inline void step_normalizers(
    const Network& net, int slots, const T* const* input_squares, const T* weight_squares, T* const* bounds,
    T* const* normalizers) {
  const T shortest = T(net.length_floor * net.length_floor);
  for (int l = net.depth - 1; l >= 0; --l) {
    for (int t = 0; t < slots; ++t) {
      const T curvature = bounds[l][t] * std::max(input_squares[l][t], shortest);
      normalizers[l][t] = T(net.depth) * std::max(curvature, T(kNormalizerFloor));
    }
    if (l == 0) break;
    const T above = T(kActivationSlope * kActivationSlope) * (weight_squares[l] + T(net.out(l)) * shortest);
    for (int t = 0; t < slots; ++t) bounds[l - 1][t] = bounds[l][t] * above;
  }
}

// From the gradients of the normalizers to those of input squares, weight squares and the last layer's bound.
template <class T>
inline void step_normalizers_backward(
    const Network& net, int slots, const T* const* input_squares, const T* weight_squares,
    const T* const* bounds, const T* const* normalizer_grads, T* const* input_square_grads,
    T* weight_square_grads, T* bound_grad) {
  const T shortest = T(net.length_floor * net.length_floor);
  std::fill_n(bound_grad, slots, T(0));
  for (int l = 0; l < net.depth; ++l) {
    for (int t = 0; t < slots; ++t) {
      const T length = std::max(input_squares[l][t], shortest);
      const bool counts = bounds[l][t] * length >= T(kNormalizerFloor);
      const T curvature_grad = counts ? T(net.depth) * normalizer_grads[l][t] : T(0);
      input_square_grads[l][t] = input_squares[l][t] >= shortest ? curvature_grad * bounds[l][t] : T(0);
      bound_grad[t] += curvature_grad * length;
    }
    if (l + 1 == net.depth) break;
    const T slope = T(kActivationSlope * kActivationSlope);
    const T above = slope * (weight_squares[l + 1] + T(net.out(l + 1)) * shortest);
    weight_square_grads[l + 1] = 0;
    for (int t = 0; t < slots; ++t) {
      weight_square_grads[l + 1] += slope * bound_grad[t] * bounds[l + 1][t];
      bound_grad[t] *= above;
    }
  }
}

}  // namespace titans
