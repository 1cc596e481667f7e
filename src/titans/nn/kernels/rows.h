// A few rows of numbers, as the next token of a few texts is: products with a matrix that is read once, norms, softmax.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/linear.h>

#include <algorithm>
#include <limits>

#include "vectors.h"

namespace titans::token {
namespace {

// Rows that meet a vector of weights while it is in a register, and rows of weights that are read at the same time.
constexpr int kTogether = 4;
// With more rows a product is torch's, which reuses what it has in its caches.
constexpr int64_t kFewRows = 16;
// Products of two numbers that are worth a thread.
constexpr int64_t kGrain = 1 << 15;

// body(i, count) for whole vectors, and for what is left.
template <class T, class Body>
inline void for_vectors(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + Vec<T>::size() <= size; i += Vec<T>::size()) body(i, int(Vec<T>::size()));
  if (i < size) body(i, int(size - i));
}

template <class T>
inline Vec<T> load_some(const T* x, int count) {
  return count == int(Vec<T>::size()) ? Vec<T>::loadu(x) : Vec<T>::loadu(x, count);
}
template <class T>
inline void store_some(const Vec<T>& x, T* to, int count) {
  if (count == int(Vec<T>::size())) x.store(to);
  else x.store(to, count);
}

template <class T, int Rows, int Outs>
inline void products_of(const T* weight, int64_t in, const T* const* x, T* const* y, int64_t first) {
  Vec<T> sums[Outs][Rows];
  for (auto& of : sums)
    for (auto& sum : of) sum = Vec<T>(T(0));
  for_vectors<T>(in, [&](int64_t i, int count) {
    Vec<T> seen[Rows];
    for (int r = 0; r < Rows; ++r) seen[r] = load_some(x[r] + i, count);
#pragma GCC unroll 4
    for (int n = 0; n < Outs; ++n) {
      const Vec<T> w = load_some(weight + n * in + i, count);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sums[n][r] = at::vec::fmadd(w, seen[r], sums[n][r]);
    }
  });
  for (int n = 0; n < Outs; ++n)
    for (int r = 0; r < Rows; ++r) y[r][first + n] = sum_of(sums[n][r]);
}

// y[r][o] = Σ_i weight[o][i] x[r][i] for `outs` rows of the weights and at most `kTogether` of x.
template <class T, int Rows = kTogether>
inline void products(const T* weight, int64_t in, int64_t outs, const T* const* x, int rows, T* const* y) {
  if constexpr (Rows > 1)
    if (rows < Rows) return products<T, Rows - 1>(weight, in, outs, x, rows, y);
  int64_t o = 0;
  for (; o + kTogether <= outs; o += kTogether) products_of<T, Rows, kTogether>(weight + o * in, in, x, y, o);
  for (; o < outs; ++o) products_of<T, Rows, 1>(weight + o * in, in, x, y, o);
}

// x (rows, in) times weight (out, in): (rows, out).
inline Tensor project(const Tensor& x, const Tensor& weight) {
  const int64_t rows = x.size(0), in = weight.size(1), out = weight.size(0);
  if (rows > kFewRows) return at::linear(x, weight);
  const Tensor y = at::empty({rows, out}, x.options());
  in_dtype_of(x, [&](auto type) {
    using T = decltype(type);
    const T *from = x.const_data_ptr<T>(), *by = weight.const_data_ptr<T>();
    T* to = y.data_ptr<T>();
    at::parallel_for(0, out, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, in * rows)), [&](int64_t begin, int64_t end) {
      for (int64_t first = 0; first < rows; first += kTogether) {
        const int count = std::min<int64_t>(kTogether, rows - first);
        const T* seen[kTogether] = {};
        T* found[kTogether] = {};
        for (int r = 0; r < count; ++r) seen[r] = from + (first + r) * in, found[r] = to + (first + r) * out + begin;
        products(by + begin * in, in, end - begin, seen, count, found);
      }
    });
  });
  return y;
}

template <class T>
inline T dot(int64_t size, const T* a, const T* b) {
  Vec<T> sum(T(0));
  for_vectors<T>(size, [&](int64_t i, int count) { sum = at::vec::fmadd(load_some(a + i, count), load_some(b + i, count), sum); });
  return sum_of(sum);
}

// to += factor · x.
template <class T>
inline void add_scaled(int64_t size, T factor, const T* x, T* to) {
  const Vec<T> by(factor);
  for_vectors<T>(size, [&](int64_t i, int count) { store_some(at::vec::fmadd(by, load_some(x + i, count), load_some(to + i, count)), to + i, count); });
}

template <class T>
inline T rms_factor(int64_t size, const T* x, double eps) {
  return T(1) / std::sqrt(dot(size, x, x) / T(size) + T(eps));
}

// x σ(x), in place.
template <class T>
inline void silu(int64_t size, T* x) {
  for_vectors<T>(size, [&](int64_t i, int count) {
    const Vec<T> z = load_some(x + i, count);
    store_some(z * sigmoid(z), x + i, count);
  });
}

// In place.
template <class T>
inline void softmax(int64_t size, T* x) {
  const T most = *std::max_element(x, x + size);
  T sum = 0;
  for_vectors<T>(size, [&](int64_t i, int count) { store_some((load_some(x + i, count) - Vec<T>(most)).exp(), x + i, count); });
  for (int64_t i = 0; i < size; ++i) sum += x[i];
  for (int64_t i = 0; i < size; ++i) x[i] /= sum;
}

}  // namespace
}  // namespace titans::token
