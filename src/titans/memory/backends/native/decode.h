// One token of one head without autograd, which is decoding: each weight is read and written once, in place of the
// chunk's matrix products, and nothing is copied. A vector runs along a weight row; every width is whole vectors.
#pragma once

#include "chunk.h"

namespace titans {

// Weights of one head as they lie in the state's tensors: per layer (out, in).
template <class T>
struct Plain {
  std::vector<const T*> weights, momentum, anchor, base;  // base: empty without one
  std::vector<T*> next_weights, next_momentum;
};

// What a token needs besides; every buffer has the width of the widest layer.
template <class T>
struct TokenBuffers {
  TokenMatrices<T> inputs, outputs, slopes, deltas;
  T *read, *answer, *scratch;
  std::vector<T> surprise, input_squares, weight_squares, bounds, normalizers;

  TokenBuffers(Arena& arena, const Network& net) {
    const int most = net.widest();
    const auto width = [&](int) { return most; };
    const auto make = [&] { return TokenMatrices<T>(net, 1, arena, width); };
    inputs = make(), outputs = make(), slopes = make(), deltas = make();
    read = arena.take<T>(most), answer = arena.take<T>(most), scratch = arena.take<T>(3 * most + 8);
    for (auto* numbers : {&input_squares, &weight_squares, &bounds, &normalizers}) numbers->resize(net.depth);
    surprise.resize(1);
  }
};

// Weights and momentum after the token, the read with them into `answer`; returns nothing else than the surprise
// in `at.surprise`. `gates` (depth,) of this head; complete: the token closes its chunk.
template <class T>
void run_token(
    const Network& net, const Plain<T>& state, Affine<T> affine, const T* query, const T* key, const T* value,
    const std::vector<Gates<T>>& gates, bool complete, TokenBuffers<T>& at, T* answer) {
  const int last = net.depth - 1;
  const auto total = [&](int l, std::ptrdiff_t i) {
    const Vector<T> anchor = load(state.anchor[l] + i);
    return state.base.empty() ? anchor : anchor + load(state.base[l] + i);
  };
  std::copy_n(key, net.key_dim, at.inputs[0]);
  for (int l = 0; l <= last; ++l) {
    const int in = net.in(l), out = net.out(l);
    const T* x = at.inputs[l];
    Vector<T> squares{};
    for (int i = 0; i < out; ++i) {
      Vector<T> sum{};
      for (int j = 0; j < in; j += kLanes<T>) {
        const Vector<T> w = total(l, std::ptrdiff_t(i) * in + j);
        sum += w * load(x + j);
        squares += w * w;
      }
      at.outputs[l][i] = sum_of<T>(sum);
    }
    at.weight_squares[l] = sum_of<T>(squares);
    dot_columns(in, 1, x, x, &at.input_squares[l]);
    if (l < last) activate<T>(net.activation, out, at.outputs[l], at.inputs[l + 1], at.slopes[l], nullptr);
  }
  objective(
      net, 1, at.outputs[last], key, value, affine, at.deltas[last], at.surprise.data(), &at.bounds[last],
      at.scratch);
  if (net.normalize) {
    std::vector<T*> bounds, normalizers;
    std::vector<const T*> input_squares;
    for (int l = 0; l <= last; ++l) {
      bounds.push_back(&at.bounds[l]), normalizers.push_back(&at.normalizers[l]);
      input_squares.push_back(&at.input_squares[l]);
    }
    step_normalizers(
        net, 1, input_squares.data(), at.weight_squares.data(), bounds.data(), normalizers.data());
  }
  for (int l = last - 1; l >= 0; --l) {
    const int in = net.in(l + 1), out = net.out(l + 1);
    T* above = at.deltas[l];
    std::fill_n(above, in, T(0));
    for (int i = 0; i < out; ++i)
      for (int j = 0; j < in; j += kLanes<T>)
        store(above + j, load(above + j) + at.deltas[l + 1][i] * total(l + 1, std::ptrdiff_t(i) * in + j));
    multiply(in, above, at.slopes[l], above);
  }
  std::copy_n(query, net.key_dim, at.read);
  for (int l = 0; l <= last; ++l) {
    const int in = net.in(l), out = net.out(l);
    const Gates<T>& gate = gates[l];
    const T theta = net.normalize ? gate.step_size[0] / at.normalizers[l] : gate.step_size[0];
    for (int i = 0; i < out; ++i) {
      const T step = theta * at.deltas[l][i];
      Vector<T> sum{}, squares{};
      for (int j = 0; j < in; j += kLanes<T>) {
        const std::ptrdiff_t here = std::ptrdiff_t(i) * in + j;
        const Vector<T> s = gate.momentum[0] * load(state.momentum[l] + here) - step * load(at.inputs[l] + j);
        Vector<T> w = load(state.weights[l] + here);
        w -= gate.forget[0] * w;
        w += s;
        store(state.next_momentum[l] + here, s);
        store(state.next_weights[l] + here, w);
        squares += w * w;
        sum += (state.base.empty() ? w : w + load(state.base[l] + here)) * load(at.read + j);
      }
      at.answer[i] = sum_of<T>(sum);
      const T scale = complete ? row_scale(net, sum_of<T>(squares)) : T(1);
      for (int j = 0; scale != T(1) && j < in; ++j) state.next_weights[l][std::ptrdiff_t(i) * in + j] *= scale;
    }
    if (l < last) activate<T>(net.activation, out, at.answer, at.read, nullptr, nullptr);
  }
  finish(net, 1, at.answer, query, affine, answer, at.scratch);
}

// A query answered without learning: by weights, by a base, or by their sum; either may be empty.
template <class T>
void read_token(
    const Network& net, const std::vector<const T*>& weights, const std::vector<const T*>& base, Affine<T> affine,
    const T* query, TokenBuffers<T>& at, T* answer) {
  std::copy_n(query, net.key_dim, at.read);
  for (int l = 0; l < net.depth; ++l) {
    const int in = net.in(l), out = net.out(l);
    for (int i = 0; i < out; ++i) {
      Vector<T> sum{};
      for (int j = 0; j < in; j += kLanes<T>) {
        const std::ptrdiff_t here = std::ptrdiff_t(i) * in + j;
        const Vector<T> w = load(weights.empty() ? base[l] + here : weights[l] + here);
        sum += (weights.empty() || base.empty() ? w : w + load(base[l] + here)) * load(at.read + j);
      }
      at.answer[i] = sum_of<T>(sum);
    }
    if (l + 1 < net.depth) activate<T>(net.activation, out, at.answer, at.read, nullptr, nullptr);
  }
  finish(net, 1, at.answer, query, affine, answer, at.scratch);
}

}  // namespace titans
