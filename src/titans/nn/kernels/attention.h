// Attention of one token of every row: to what the row has seen, to persistent tokens and to itself.
#pragma once

#include <cstring>

#include "rows.h"

namespace titans::token {
namespace {

// Keys and values of one head, `count` slots that lie `stride` numbers apart.
template <class T>
struct Slots {
  const T *keys, *values;
  int64_t count, stride;
};

// Cosines and sines of position · theta^(−2i/size), taken in float64.
template <class T>
struct Turn {
  std::vector<T> cos, sin;

  Turn(int64_t position, int64_t size, double theta) {
    for (int64_t i = 0; i < size; i += 2) {
      const double angle = double(position) * std::pow(theta, -double(i) / double(size));
      cos.push_back(T(std::cos(angle))), sin.push_back(T(std::sin(angle)));
    }
  }
  void operator()(const T* x, T* to) const {
    for (size_t i = 0; i < cos.size(); ++i) {
      const T a = x[2 * i], b = x[2 * i + 1];
      to[2 * i] = a * cos[i] - b * sin[i], to[2 * i + 1] = a * sin[i] + b * cos[i];
    }
  }
};

// What all heads of a layer share. key_value: (2 · heads · size, in), keys first. persistent: (fixed, in) or null.
template <class T>
struct Shared {
  const T *key_value, *persistent;
  int64_t heads, size, in, fixed;
  const T* key_weight(int64_t head) const { return key_value + head * size * in; }
  const T* value_weight(int64_t head) const { return key_value + (heads + head) * size * in; }
};

// One head of one row: softmax over persistent tokens, `slots`, and the `seen` tokens that are new (at most three),
// whose keys are given and whose values this computes and writes.
//
// A persistent token p has the key W_k p and the value W_v p. It is scored as (W_kᵀ q) · p, and what the weights a
// make of all values is W_v Σ a p: both once for each head and not once for each persistent token.
template <class T>
void attend(
    const Shared<T>& layer, int64_t head, const T* plain, const T* rotated, const std::vector<Slots<T>>& slots,
    const std::vector<const T*>& seen, const std::vector<const T*>& new_keys, const std::vector<T*>& new_values, T* to) {
  const int64_t size = layer.size, in = layer.in, fixed = layer.fixed;
  int64_t total = fixed + int64_t(seen.size());
  for (const auto& part : slots) total += part.count;
  std::vector<T> scores(total), mixed(fixed ? in : 0), from_fixed(size);
  T* score = scores.data();
  if (fixed) {
    std::vector<T> asked(in, T(0));
    for (int64_t d = 0; d < size; ++d) add_scaled(in, plain[d], layer.key_weight(head) + d * in, asked.data());
    for (int64_t p = 0; p < fixed; ++p) *score++ = dot(in, asked.data(), layer.persistent + p * in);
  }
  for (const auto& part : slots)
    for (int64_t n = 0; n < part.count; ++n) *score++ = dot(size, rotated, part.keys + n * part.stride);
  for (const T* key : new_keys) *score++ = dot(size, rotated, key);
  softmax(total, scores.data());

  score = scores.data();
  for (int64_t p = 0; p < fixed; ++p) add_scaled(in, *score++, layer.persistent + p * in, mixed.data());
  std::vector<const T*> of = seen;
  std::vector<T*> found = new_values;
  if (fixed) of.push_back(mixed.data()), found.push_back(from_fixed.data());
  products(layer.value_weight(head), in, size, of.data(), int(of.size()), found.data());
  std::copy_n(from_fixed.data(), size, to);
  for (const auto& part : slots)
    for (int64_t n = 0; n < part.count; ++n) add_scaled(size, *score++, part.values + n * part.stride, to);
  for (const T* value : new_values) add_scaled(size, *score++, value, to);
}

// The query of one head of one row over √size; asked: (rows, heads · size).
template <class T>
std::vector<T> scaled_query(const Tensor& asked, int64_t row, int64_t head, int64_t size) {
  const T* query = asked.const_data_ptr<T>() + row * asked.size(1) + head * size;
  const T scale = T(std::pow(double(size), -0.5));
  std::vector<T> scaled(query, query + size);
  for (T& number : scaled) number *= scale;
  return scaled;
}

// body(row, head), threads where there is enough to do: `work` products for each.
template <class Body>
void for_rows_and_heads(int64_t rows, int64_t heads, int64_t work, const Body& body) {
  at::parallel_for(0, rows * heads, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) body(n / heads, n % heads);
  });
}

// x (batch, 1, in) after attention to a window: see `WindowAttention`. Returns y, keys, values and position.
std::tuple<Tensor, Tensor, Tensor, Tensor> window_token(
    const Tensor& x, const Tensor& query, const Tensor& key_value, const Tensor& output, const Tensor& old_keys,
    const Tensor& old_values, const Tensor& position, const OptionalTensor& persistent, double theta) {
  const int64_t rows = x.size(0), in = x.size(2), before = old_keys.size(1), heads = old_keys.size(2);
  const int64_t size = old_keys.size(3), width = heads * size, fixed = persistent ? persistent->size(0) : 0;
  const Tensor flat = x.view({rows, in}), asked = project(flat, query), to = at::empty_like(asked);
  const Tensor keys = at::empty_like(old_keys), values = at::empty_like(old_values);
  const Tensor after = at::empty_like(position);
  in_dtype_of(x, [&](auto type) {
    using T = decltype(type);
    const Shared<T> layer{
        key_value.const_data_ptr<T>(), fixed ? persistent->const_data_ptr<T>() : nullptr, heads, size, in, fixed};
    std::vector<Turn<T>> turns;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t seen = position.const_data_ptr<int64_t>()[row];
      turns.emplace_back(seen, size, theta);
      after.data_ptr<int64_t>()[row] = seen + 1;
      for (const auto& [now, old] : {std::pair(&keys, &old_keys), std::pair(&values, &old_values)})
        if (before)
          std::memcpy(
              now->template data_ptr<T>() + row * before * width, old->template const_data_ptr<T>() + (row * before + 1) * width,
              sizeof(T) * (before - 1) * width);
    }
    for_rows_and_heads(rows, heads, 2 * size * (in + before + fixed), [&](int64_t row, int64_t head) {
      const T* token = flat.const_data_ptr<T>() + row * in;
      const std::vector<T> plain = scaled_query<T>(asked, row, head, size);
      std::vector<T> rotated(size), key(size), turned(size), value(size);
      T* found = key.data();
      products(layer.key_weight(head), in, size, &token, 1, &found);
      turns[row](plain.data(), rotated.data()), turns[row](key.data(), turned.data());
      const int64_t count = std::min(before, position.const_data_ptr<int64_t>()[row]);
      const int64_t first = ((row + 1) * before - count) * width + head * size;
      const Slots<T> window{
          old_keys.const_data_ptr<T>() + first, old_values.const_data_ptr<T>() + first, count, width};
      attend<T>(
          layer, head, plain.data(), rotated.data(), {window}, {token}, {turned.data()}, {value.data()},
          to.data_ptr<T>() + row * width + head * size);
      if (!before) return;
      const int64_t newest = ((row + 1) * before - 1) * width + head * size;
      std::copy_n(turned.data(), size, keys.data_ptr<T>() + newest);
      std::copy_n(value.data(), size, values.data_ptr<T>() + newest);
    });
  });
  return {project(to, output).unsqueeze(1), keys, values, after};
}

// x (batch, 1, in), each row's next token of its segment, and its context likewise: see `SegmentAttention`. old: keys
// and values of contexts, keys and values of tokens. Returns y and what becomes of `old`.
std::tuple<Tensor, Tensors> segment_token(
    const Tensor& x, const Tensor& context, const Tensor& query, const Tensor& key_value, const Tensor& output,
    at::TensorList old, const Tensor& index, const OptionalTensor& persistent, double theta) {
  const int64_t rows = x.size(0), in = x.size(2), most = old[0].size(1), heads = old[0].size(2);
  const int64_t size = old[0].size(3), width = heads * size, fixed = persistent ? persistent->size(0) : 0;
  const Tensor flat = x.view({rows, in}), asked = project(flat, query), to = at::empty_like(asked);
  Tensors now;
  for (const Tensor& part : old) now.push_back(at::empty_like(part));
  in_dtype_of(x, [&](auto type) {
    using T = decltype(type);
    const Shared<T> layer{
        key_value.const_data_ptr<T>(), fixed ? persistent->const_data_ptr<T>() : nullptr, heads, size, in, fixed};
    std::vector<Turn<T>> turns;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t here = index.const_data_ptr<int64_t>()[row];
      turns.emplace_back(here, size, theta);
      for (size_t n = 0; n < now.size(); ++n) {
        T* begin = now[n].data_ptr<T>() + row * most * width;
        std::memcpy(begin, old[n].const_data_ptr<T>() + row * most * width, sizeof(T) * here * width);
        std::fill_n(begin + (here + 1) * width, (most - here - 1) * width, T(0));
      }
    }
    for_rows_and_heads(rows, heads, 2 * size * (2 * in + most + fixed), [&](int64_t row, int64_t head) {
      const T* seen[] = {context.const_data_ptr<T>() + row * in, flat.const_data_ptr<T>() + row * in};
      const std::vector<T> plain = scaled_query<T>(asked, row, head, size);
      std::vector<T> rotated(size), keys(2 * size);
      T* found[] = {keys.data(), keys.data() + size};
      products(layer.key_weight(head), in, size, seen, 2, found);
      turns[row](plain.data(), rotated.data());
      const int64_t here = index.const_data_ptr<int64_t>()[row];
      const int64_t first = row * most * width + head * size, last = first + here * width;
      const auto part = [&](int n, int64_t place) { return now[n].template data_ptr<T>() + place; };
      turns[row](found[0], part(0, last)), turns[row](found[1], part(2, last));
      attend<T>(
          layer, head, plain.data(), rotated.data(),
          {{part(0, first), part(1, first), here, width}, {part(2, first), part(3, first), here, width}},
          {seen[0], seen[1]}, {part(0, last), part(2, last)}, {part(1, last), part(3, last)},
          to.data_ptr<T>() + row * width + head * size);
    });
  });
  return {project(to, output).unsqueeze(1), now};
}

}  // namespace
}  // namespace titans::token
