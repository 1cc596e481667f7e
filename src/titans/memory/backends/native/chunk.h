// One chunk of one head, forward: the algorithm of chunkwise/chunk.py (derivation in docs/how/maths.md) on matrices
// that stay in the core's own cache. Token matrices are (features, slots); the copies that stand on the right of
// a product with a weight-shaped result are (slots, features). Weights are (out, in), rows padded to vectors.
#pragma once

#include "coefficients.h"
#include "objective.h"

namespace titans {

// Per layer a matrix of the shape of that layer's weights.
template <class T>
struct Matrices {
  std::vector<T*> layer;

  Matrices() = default;
  Matrices(const Network& net, Arena& arena) {
    for (int l = 0; l < net.depth; ++l) layer.push_back(arena.take<T>(size(net, l)));
  }
  T* operator[](int l) const { return layer[l]; }
  static int stride(const Network& net, int l) { return padded(net.in(l), kLanes<T>); }
  static std::ptrdiff_t size(const Network& net, int l) {
    return std::ptrdiff_t(net.out(l)) * stride(net, l);
  }
};

// Per layer a token matrix; `of` gives the number of its features.
template <class T>
struct TokenMatrices {
  std::vector<T*> layer;

  TokenMatrices() = default;
  template <class Features>
  TokenMatrices(const Network& net, int slots, Arena& arena, const Features& of) {
    for (int l = 0; l < net.depth; ++l) layer.push_back(arena.take<T>(std::ptrdiff_t(of(l)) * slots));
  }
  T*& operator[](int l) { return layer[l]; }
  T* operator[](int l) const { return layer[l]; }
};

// What a head's memory is at a chunk's start. `total`: anchor + base, where gradients are taken.
template <class T>
struct Fast {
  Matrices<T> weights, momentum, total;
  Fast(const Network& net, Arena& arena) : weights(net, arena), momentum(net, arena), total(net, arena) {}
};

// Everything token-sized of a chunk's forward that its backward uses too.
template <class T>
struct Tape {
  int slots;
  T *queries, *keys, *values;             // (features, slots)
  const T *queries_right, *keys_right;    // (slots, in), the caller's own where they need no padding
  TokenMatrices<T> inputs, inputs_right;  // h_{l-1} of the keys; right: (slots, in)
  TokenMatrices<T> outputs, above, deltas, scaled;
  TokenMatrices<T> slopes, curvatures, read_slopes;  // act' and act'' of the outputs, act' of the answers
  TokenMatrices<T> normalizers, inverses, bounds, input_squares;  // (slots,)
  TokenMatrices<T> reads, reads_right;                  // r_{l-1} of the queries
  TokenMatrices<T> with_weights, with_momentum, answers, similarity;
  TokenMatrices<T> row_scales;  // (out,), what each row was multiplied by at the chunk's end
  std::vector<Coefficients<T>> coefficients;
  std::vector<T> weight_squares;
  T* surprise;

  const T* input_right(int l) const { return l ? inputs_right[l] : keys_right; }
  const T* read_right(int l) const { return l ? reads_right[l] : queries_right; }

  // `keep`: for a backward pass.
  Tape(const Network& net, int slots, Arena& arena, bool keep) : slots(slots) {
    const auto in = [&](int l) { return net.in(l); };
    const auto in_padded = [&](int l) { return Matrices<T>::stride(net, l); };
    const auto out = [&](int l) { return net.out(l); };
    const auto one = [](int) { return 1; };
    const auto square = [&](int) { return slots; };
    const auto make = [&](const auto& of) { return TokenMatrices<T>(net, slots, arena, of); };
    queries = arena.take<T>(net.key_dim * slots);
    keys = arena.take<T>(net.key_dim * slots);
    values = arena.take<T>(net.head_dim * slots);
    surprise = arena.take<T>(slots);
    inputs = make(in), inputs_right = make(in_padded), reads = make(in), reads_right = make(in_padded);
    outputs = make(out), above = make(out), deltas = make(out), answers = make(out);
    scaled = net.normalize ? make(out) : deltas;
    with_weights = make(out), with_momentum = make(out), slopes = make(out);
    curvatures.layer.resize(net.depth), read_slopes.layer.resize(net.depth);
    if (keep) curvatures = make(out), read_slopes = make(out);
    normalizers = make(one), inverses = make(one), bounds = make(one), input_squares = make(one), similarity = make(square);
    inputs[0] = keys;
    reads[0] = queries;
    for (int l = 0; l < net.depth; ++l) {
      row_scales.layer.push_back(arena.take<T>(net.out(l)));
      coefficients.push_back(make_coefficients<T>(slots, arena));
    }
    weight_squares.resize(net.depth);
  }
};

// Buffers that no other chunk looks at.
template <class T>
struct Scratch {
  T *wide, *wide2, *wide3;  // a token matrix of any layer, or (slots, slots)
  T *square, *square2;      // (slots, slots)
  T* norm;                  // for LayerNorm and the objective
  Products products;
  std::vector<double> gates;

  Scratch(const Network& net, int slots, Arena& arena) {
    // At least a vector for each feature: `slots` are whole vectors.
    const int most = std::max(padded(net.widest(), kLanes<T>), slots);
    wide = arena.take<T>(most * slots), wide2 = arena.take<T>(most * slots), wide3 = arena.take<T>(most * slots);
    square = arena.take<T>(slots * slots), square2 = arena.take<T>(slots * slots);
    norm = arena.take<T>((4 * net.head_dim + 8) * slots);
  }
};

// (features, slots) times a number per slot.
template <class T>
inline void scale_columns(int features, int slots, const T* x, const T* by, T* to) {
  for (int i = 0; i < features; ++i)
    for (int t = 0; t < slots; ++t) to[i * slots + t] = x[i * slots + t] * by[t];
}

// (features, slots) to (slots, stride), the padding 0.
template <class T>
inline void to_right(int features, int slots, int stride, const T* x, T* to) {
  if (stride != features) std::fill_n(to, std::ptrdiff_t(slots) * stride, T(0));
  transpose(features, slots, x, slots, to, stride);
}

// The inner forward and backward pass at `total`: what each token would write.
template <class T>
void key_pass(const Network& net, const Fast<T>& now, Affine<T> affine, Tape<T>& tape, Scratch<T>& scratch) {
  const int slots = tape.slots, last = net.depth - 1;
  for (int l = 0; l <= last; ++l) {
    const int in = net.in(l), out = net.out(l), stride = Matrices<T>::stride(net, l);
    product<false>(out, slots, in, now.total[l], stride, tape.inputs[l], slots, assign(tape.outputs[l], slots));
    if (l < last)
      activate(
          net.activation, out * slots, tape.outputs[l], tape.inputs[l + 1], tape.slopes[l], tape.curvatures[l]);
    if (l) to_right(in, slots, stride, tape.inputs[l], tape.inputs_right[l]);
  }
  objective(
      net, slots, tape.outputs[last], tape.keys, tape.values, affine, tape.deltas[last], tape.surprise,
      tape.bounds[last], scratch.norm);
  if (net.normalize) {
    for (int l = 0; l <= last; ++l) {
      dot_columns(net.in(l), slots, tape.inputs[l], tape.inputs[l], tape.input_squares[l]);
      if (l) tape.weight_squares[l] = dot(Matrices<T>::size(net, l), now.total[l], now.total[l]);
    }
    step_normalizers(
        net, slots, tape.input_squares.layer.data(), tape.weight_squares.data(), tape.bounds.layer.data(),
        tape.normalizers.layer.data());
  }
  for (int l = last - 1; l >= 0; --l) {
    const int out = net.out(l), stride = Matrices<T>::stride(net, l + 1);
    product<true>(
        out, slots, net.out(l + 1), now.total[l + 1], stride, tape.deltas[l + 1], slots,
        assign(tape.above[l], slots));
    multiply(out * slots, tape.above[l], tape.slopes[l], tape.deltas[l]);
  }
  for (int l = 0; net.normalize && l <= last; ++l) {
    for (int t = 0; t < slots; ++t) tape.inverses[l][t] = T(1) / tape.normalizers[l][t];
    scale_columns(net.out(l), slots, tape.deltas[l], tape.inverses[l], tape.scaled[l]);
  }
}

// What rows of this squared length are multiplied by at a chunk's end.
template <class T>
inline T row_scale(const Network& net, T square) {
  const T length = std::sqrt(square);
  return net.limited && length > T(net.row_limit) ? T(net.row_limit) / length : T(1);
}

// Layer l's weights and momentum after the chunk, and, where it is complete, settled and with their total.
// `next` may be `now`: every element is read before it is written.
template <class T>
void write_layer(
    const Network& net, int l, const Fast<T>& now, const Fast<T>& next, const T* base, bool complete,
    Tape<T>& tape, Scratch<T>& scratch) {
  const int in = net.in(l), out = net.out(l), stride = Matrices<T>::stride(net, l), slots = tape.slots;
  const auto& c = tape.coefficients[l];
  scale_columns(out, slots, tape.scaled[l], c.end_steps, scratch.wide);
  scale_columns(out, slots, tape.scaled[l], c.momentum_steps, scratch.wide2);
  const T *weights = now.weights[l], *momentum = now.momentum[l];
  T *next_weights = next.weights[l], *next_momentum = next.momentum[l], *next_total = next.total[l];
  // Squared lengths of the rows, lane by lane.
  T* squares = scratch.wide3;
  if (net.limited) std::fill_n(squares, out * kLanes<T>, T(0));
  product<false>(
      out, stride, slots, scratch.wide, slots, tape.input_right(l), stride, [&](int i, int j, Vector<T> sum) {
        const std::ptrdiff_t at = std::ptrdiff_t(i) * stride + j;
        Vector<T> w = load(weights + at);
        // In this order: forgetting everything must leave nothing, not a rounding.
        w += c.end_weights * w;
        w += c.end_momentum * load(momentum + at) - sum;
        store(next_weights + at, w);
        if (!complete) return;
        store(next_total + at, base ? w + load(base + at) : w);
        if (!net.limited) return;
        T* square = squares + i * kLanes<T>;
        store(square, load(square) + w * w);
      });
  product<false>(
      out, stride, slots, scratch.wide2, slots, tape.input_right(l), stride, [&](int i, int j, Vector<T> sum) {
        const std::ptrdiff_t at = std::ptrdiff_t(i) * stride + j;
        store(next_momentum + at, c.momentum_momentum * load(momentum + at) - sum);
      });
  if (!complete) {
    if (next_total != now.total[l]) std::copy_n(now.total[l], Matrices<T>::size(net, l), next_total);
    return;
  }
  for (int i = 0; net.limited && i < out; ++i) {
    const T scale = tape.row_scales[l][i] = row_scale(net, sum_of<T>(load(squares + i * kLanes<T>)));
    if (scale == T(1)) continue;
    for (std::ptrdiff_t at = std::ptrdiff_t(i) * stride; at < std::ptrdiff_t(i + 1) * stride; ++at) {
      next_weights[at] *= scale;
      next_total[at] = base ? next_weights[at] + base[at] : next_weights[at];
    }
  }
}

// Reads every query with the weights just written, and moves the state on. answers: (head_dim, slots).
template <class T>
void run_chunk(
    const Network& net, const Fast<T>& now, const Fast<T>& next, const Matrices<T>* base, Affine<T> affine,
    bool complete, Tape<T>& tape, Scratch<T>& scratch, T* answers) {
  const int slots = tape.slots;
  key_pass(net, now, affine, tape, scratch);
  for (int l = 0; l < net.depth; ++l) {
    const int in = net.in(l), out = net.out(l), stride = Matrices<T>::stride(net, l);
    const auto& c = tape.coefficients[l];
    const T* hidden = tape.reads[l];
    T* answer = tape.answers[l];
    const auto mixed = [&](int i, int j, Vector<T> sum) {
      const int at = i * slots + j;
      store(tape.with_momentum[l] + at, sum);
      store(answer + at, load(tape.with_weights[l] + at) * load(c.kept + j) + sum * load(c.moved + j));
    };
    product<false>(out, slots, in, now.weights[l], stride, hidden, slots, assign(tape.with_weights[l], slots));
    product<false>(out, slots, in, now.momentum[l], stride, hidden, slots, mixed);
    if (base) product<false>(out, slots, in, (*base)[l], stride, hidden, slots, add(answer, slots));
    product<true>(slots, slots, in, tape.inputs[l], slots, hidden, slots, assign(tape.similarity[l], slots));
    for (int n = 0; n < slots * slots; ++n) scratch.square[n] = tape.similarity[l][n] * c.steps[n];
    product<false>(out, slots, slots, tape.scaled[l], slots, scratch.square, slots, subtract(answer, slots));
    if (l + 1 < net.depth)
      activate<T>(net.activation, out * slots, answer, tape.reads[l + 1], tape.read_slopes[l], nullptr);
    write_layer(net, l, now, next, base ? (*base)[l] : nullptr, complete, tape, scratch);
  }
  finish(net, slots, tape.answers[net.depth - 1], tape.queries, affine, answers, scratch.norm);
}

}  // namespace titans
