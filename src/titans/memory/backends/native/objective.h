// What the memory is trained on at test time: Σ φ(M(k) − v) over features, forward and backward. φ is e² for the
// squared error; e² up to δ and 2 δ |e| − δ² beyond for Huber; |e|^p for l_p, p ≥ 2. See objectives.py.
#pragma once

#include "network.h"

namespace titans {

// |e|^(p − 2) of whole vectors: φ, φ′ and φ″ of l_p by e², p e and p (p − 1).
template <class T>
inline void lp_weights(const Network& net, int size, const T* error, T* weight) {
  using V = at::vec::Vectorized<T>;
  const V power(T(net.parameter - 2));
  for (int i = 0; i < size; i += V::size()) {
    const V e = V::loadu(error + i).abs();
    (net.parameter == 3 ? e : e.pow(power)).store(weight + i);
  }
}

// φ″ of l_p at the largest |e| of each slot, and that; (slots,) each.
template <class T>
inline void lp_curvatures(const Network& net, int slots, const T* error, T* largest, T* curvature) {
  const T p(net.parameter);
  std::fill_n(largest, slots, T(0));
  for (int i = 0; i < net.head_dim; ++i)
    for (int t = 0; t < slots; ++t) largest[t] = std::max(largest[t], std::abs(error[i * slots + t]));
  for (int t = 0; t < slots; ++t) curvature[t] = p * (p - 1) * std::pow(largest[t], T(net.parameter - 2));
}

// Adds to `by_error` what the gradient of these is worth; the largest errors of a slot share it.
template <class T>
inline void lp_curvatures_backward(
    const Network& net, int slots, const T* error, const T* largest, const T* curvature, const T* curvature_grad,
    T* by_error, T* share) {
  const auto is_largest = [&](int at, int t) { return std::abs(error[at]) == largest[t] && largest[t] > 0; };
  std::fill_n(share, slots, T(0));
  for (int i = 0; i < net.head_dim; ++i)
    for (int t = 0; t < slots; ++t) share[t] += is_largest(i * slots + t, t) ? T(1) : T(0);
  for (int t = 0; t < slots; ++t)
    if (share[t] > 0)
      share[t] = curvature_grad[t] * curvature[t] * T(net.parameter - 2) / (largest[t] * share[t]);
  for (int i = 0; i < net.head_dim; ++i)
    for (int t = 0; t < slots; ++t) {
      const int at = i * slots + t;
      by_error[at] += is_largest(at, t) ? (error[at] < 0 ? -share[t] : share[t]) : T(0);
    }
}

// M(k) − v of feature i, which stands at `at`; x: LayerNorm(f), or f without a norm. Keys of another width than the
// values are not looked at.
template <class T>
inline T error_at(
    const Network& net, Affine<T> affine, int i, int at, const T* x, const T* keys, const T* values) {
  T answer = net.norm ? x[at] * affine.scale(i) + affine.shift(i) : x[at];
  if (net.residual) answer += keys[at];
  return answer - values[at];
}

template <class T>
inline void errors(
    const Network& net, int slots, const T* x, const T* keys, const T* values, Affine<T> affine, T* error) {
  for (int i = 0; i < net.head_dim; ++i)
    for (int at = i * slots; at < (i + 1) * slots; ++at)
      error[at] = error_at(net, affine, i, at, x, keys, values);
}

// φ′ of each error of `errors`, Σ φ of each slot, and a bound on φ″ between its errors and 0, (slots,) each. Without
// __restrict every row would be checked for an overlap.
template <class T>
inline void losses(
    const Network& net, int slots, const T* x, const T* keys, const T* values, Affine<T> affine,
    T* __restrict slopes, T* surprise, T* curvature, T* scratch) {
  const int d = net.head_dim;
  std::fill_n(surprise, slots, T(0));
  if (net.objective == Network::kSquaredError) {
    std::fill_n(curvature, slots, T(2));
    for (int i = 0; i < d; ++i)
      for (int t = 0; t < slots; ++t) {
        const int at = i * slots + t;
        const T error = error_at(net, affine, i, at, x, keys, values);
        surprise[t] += error * error;
        slopes[at] = 2 * error;
      }
  } else if (net.objective == Network::kHuber) {
    const T delta(net.parameter);
    std::fill_n(curvature, slots, T(2));
    for (int i = 0; i < d; ++i)
      for (int t = 0; t < slots; ++t) {
        const int at = i * slots + t;
        const T error = error_at(net, affine, i, at, x, keys, values);
        const T within = std::max(-delta, std::min(error, delta));
        surprise[t] += within * (2 * error - within);
        slopes[at] = 2 * within;
      }
  } else {
    const T p(net.parameter);
    T *error = slopes, *weight = scratch;
    errors(net, slots, x, keys, values, affine, error);
    lp_curvatures(net, slots, error, scratch, curvature);
    lp_weights(net, d * slots, error, weight);
    for (int i = 0; i < d; ++i)
      for (int t = 0; t < slots; ++t) {
        const int at = i * slots + t;
        const T e = error[at];
        surprise[t] += weight[at] * e * e;
        slopes[at] = p * weight[at] * e;
      }
  }
}

// For other objectives than the squared error: in place from errors to φ′ of them, and φ″. `by_error` gets what the
// gradient of the bound on φ″ (null without one) is worth.
template <class T>
inline void losses_backward(
    const Network& net, int slots, T* error, T* bend, const T* curvature_grad, T* curvature, T* by_error,
    T* scratch) {
  const int n = net.head_dim * slots;
  std::fill_n(by_error, n, T(0));
  if (net.objective == Network::kHuber) {
    const T delta(net.parameter);
    std::fill_n(curvature, slots, T(2));
    for (int i = 0; i < n; ++i) {
      bend[i] = std::abs(error[i]) <= delta ? T(2) : T(0);
      error[i] = 2 * std::max(-delta, std::min(error[i], delta));
    }
  } else {
    const T p(net.parameter);
    T *largest = scratch, *share = scratch + slots;
    lp_curvatures(net, slots, error, largest, curvature);
    if (curvature_grad)
      lp_curvatures_backward(net, slots, error, largest, curvature, curvature_grad, by_error, share);
    lp_weights(net, n, error, bend);
    for (int i = 0; i < n; ++i) {
      error[i] = p * bend[i] * error[i];
      bend[i] = p * (p - 1) * bend[i];
    }
  }
}

// The gradient of the objective with respect to f(k), the objective itself, and a bound on its curvature in f(k): that
// in M(k) times ρ², the norm's squared slope.
template <class T>
inline void objective(
    const Network& net, int slots, const T* features, const T* keys, const T* values, Affine<T> affine,
    T* delta, T* surprise, T* bound, T* scratch) {
  const int d = net.head_dim, n = d * slots;
  T *normed = scratch, *slopes = net.norm ? scratch + n : delta, *weights = scratch + 2 * n;
  T *scale = scratch + 3 * n, *mean = scale + slots, *along = mean + slots;
  if (net.norm) layer_norm(d, slots, features, normed, scale, mean);
  losses(net, slots, net.norm ? normed : features, keys, values, affine, slopes, surprise, bound, weights);
  if (!net.norm) return;
  for (int i = 0; i < d; ++i)
    for (int t = 0; t < slots; ++t) slopes[i * slots + t] *= affine.scale(i);
  const T largest = largest_gain(net, affine);
  for (int t = 0; t < slots; ++t) bound[t] *= largest * largest * scale[t] * scale[t];
  layer_norm_backward(d, slots, normed, scale, slopes, static_cast<const T*>(nullptr), delta, mean, along);
}

// Backward of `objective`. Squared: of the squared error, whose φ″ is 2 everywhere.
template <bool Squared, class T>
inline void objective_backward_of(
    const Network& net, int slots, const T* features, const T* keys, const T* values, Affine<T> affine,
    const T* delta_grad, const T* bound_grad, T* features_grad, T* keys_grad, T* values_grad, T* gain_grad,
    T* bias_grad, T* scratch) {
  const int d = net.head_dim, n = d * slots;
  T *normed = scratch, *error = scratch + n, *answer_grad = scratch + 2 * n, *bend = scratch + 3 * n;
  T *scale = scratch + 4 * n, *mean = scale + slots, *along = mean + slots, *mean_grad = along + slots,
    *along_grad = mean_grad + slots, *scale_grad = along_grad + slots, *curvature = scale_grad + slots,
    *curvature_grad = curvature + slots;
  if (net.norm) layer_norm(d, slots, features, normed, scale, mean);
  const T largest = largest_gain(net, affine);
  if (!Squared) {
    for (int t = 0; bound_grad && t < slots; ++t)
      curvature_grad[t] = net.norm ? bound_grad[t] * largest * largest * scale[t] * scale[t] : bound_grad[t];
    errors(net, slots, net.norm ? normed : features, keys, values, affine, error);
    losses_backward(
        net, slots, error, bend, bound_grad ? curvature_grad : nullptr, curvature, answer_grad, mean_grad);
  }
  if (!net.norm) {
    for (int i = 0; i < n; ++i) {
      const T by_answer = Squared ? 2 * delta_grad[i] : answer_grad[i] + bend[i] * delta_grad[i];
      features_grad[i] = by_answer;
      values_grad[i] = -by_answer;
      if (net.residual) keys_grad[i] += by_answer;
    }
    return;
  }
  std::fill_n(mean, 5 * slots, T(0));
  for (int i = 0; i < d; ++i)
    for (int t = 0; t < slots; ++t) {
      const int at = i * slots + t;
      if (Squared) error[at] = 2 * error_at<T>(net, affine, i, at, normed, keys, values);
      const T scaled = error[at] * affine.scale(i);
      mean[t] += scaled;
      along[t] += scaled * normed[at];
      mean_grad[t] += delta_grad[at];
      along_grad[t] += delta_grad[at] * normed[at];
    }
  for (int t = 0; t < slots; ++t) {
    mean[t] /= T(d);
    along[t] /= T(d);
    mean_grad[t] /= T(d);
    along_grad[t] /= T(d);
  }
  // δ = scale · (φ′ · gain − mean − normed · along).
  T* normed_grad = answer_grad;
  for (int i = 0; i < d; ++i) {
    T gain = 0, bias = 0;
    for (int t = 0; t < slots; ++t) {
      const int at = i * slots + t;
      const T scaled = error[at] * affine.scale(i);
      scale_grad[t] += delta_grad[at] * (scaled - mean[t] - normed[at] * along[t]);
      const T scaled_grad = scale[t] * (delta_grad[at] - mean_grad[t] - normed[at] * along_grad[t]);
      const T through = (Squared ? 2 : bend[at]) * scaled_grad * affine.scale(i);
      const T by_answer = Squared ? through : answer_grad[at] + through;
      normed_grad[at] = by_answer * affine.scale(i) -
          scale[t] * (delta_grad[at] * along[t] + scaled * along_grad[t]);
      gain += scaled_grad * error[at] + by_answer * normed[at];
      bias += by_answer;
      values_grad[at] = -by_answer;
      if (net.residual) keys_grad[at] += by_answer;
    }
    if (gain_grad) gain_grad[i] += gain;
    if (bias_grad) bias_grad[i] += bias;
  }
  if (bound_grad) {
    T largest_grad = 0;
    int ties = 0;
    for (int t = 0; t < slots; ++t) {
      const T slope_grad = (Squared ? 2 : curvature[t]) * bound_grad[t];
      scale_grad[t] += 2 * largest * largest * scale[t] * slope_grad;
      largest_grad += 2 * largest * scale[t] * scale[t] * slope_grad;
    }
    for (int i = 0; gain_grad && i < d; ++i) ties += std::abs(affine.gain[i]) == largest;
    for (int i = 0; gain_grad && i < d; ++i)
      if (std::abs(affine.gain[i]) == largest && largest > 0)
        gain_grad[i] += (affine.gain[i] < 0 ? -largest_grad : largest_grad) / T(ties);
  }
  // normed = (f − mean f) · scale, and the scale depends on f as well.
  layer_norm_backward(d, slots, normed, scale, normed_grad, scale_grad, features_grad, mean, along);
}

// Backward of `objective` from the gradients of delta and bound (null without one): features, keys (added to) and
// values are written to, gain and bias added to.
template <class T, class... Rest>
inline void objective_backward(const Network& net, int slots, const T* features, Rest... rest) {
  if (net.objective == Network::kSquaredError) objective_backward_of<true>(net, slots, features, rest...);
  else objective_backward_of<false>(net, slots, features, rest...);
}

}  // namespace titans
