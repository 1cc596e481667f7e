// From the gradients of what a chunk leaves to those of what entered it: chunk_backward of chunkwise/chunk.py.
#pragma once

#include "chunk.h"

namespace titans {

// The gradient of a head's state on its way back through the chunks, and the sums over chunks of what they share.
template <class T>
struct StateGradients {
  Matrices<T> weights, momentum, anchor, base, initial, initial_momentum;
  T *gain, *bias;
  bool anchored;  // `anchor` is not all zero

  StateGradients(const Network& net, Arena& arena, bool has_base, bool has_initial)
      : weights(net, arena), momentum(net, arena), anchor(net, arena) {
    if (has_base) base = Matrices<T>(net, arena);
    if (has_initial) initial = Matrices<T>(net, arena), initial_momentum = Matrices<T>(net, arena);
    gain = arena.take<T>(net.head_dim), bias = arena.take<T>(net.head_dim);
  }
};

// Token-sized gradients of one chunk.
template <class T>
struct TokenGradients {
  TokenMatrices<T> by_read, by_key;       // of the layers' outputs, as read and at the keys
  TokenMatrices<T> scaled, inputs, bends;  // of D_l and h_{l-1}; what curves through act''
  TokenMatrices<T> above_right;            // (slots, in)
  TokenMatrices<T> normalizers, input_squares;
  T *deposit_weights, *deposit_momentum;
  T *queries, *keys, *values, *bound;
  std::vector<T> weight_squares;
  std::vector<Coefficients<T>> coefficients;

  TokenGradients(const Network& net, int slots, Arena& arena) {
    const auto in = [&](int l) { return net.in(l); };
    const auto in_padded = [&](int l) { return Matrices<T>::stride(net, l); };
    const auto out = [&](int l) { return net.out(l); };
    const auto one = [](int) { return 1; };
    const auto make = [&](const auto& of) { return TokenMatrices<T>(net, slots, arena, of); };
    by_read = make(out), by_key = make(out), scaled = make(out), bends = make(out), inputs = make(in);
    above_right = make(in_padded), normalizers = make(one), input_squares = make(one);
    const int most = net.widest();
    deposit_weights = arena.take<T>(most * slots), deposit_momentum = arena.take<T>(most * slots);
    queries = arena.take<T>(net.key_dim * slots), keys = arena.take<T>(net.key_dim * slots);
    values = arena.take<T>(net.head_dim * slots);
    bound = arena.take<T>(slots);
    weight_squares.resize(net.depth);
    for (int l = 0; l < net.depth; ++l) coefficients.push_back(make_coefficients<T>(slots, arena));
  }
};

// The anchor was the weights: its gradient is theirs.
template <class T>
void join_anchor(const Network& net, StateGradients<T>& grads) {
  for (int l = 0; grads.anchored && l < net.depth; ++l) {
    add_all(Matrices<T>::size(net, l), grads.anchor[l], grads.weights[l]);
    std::fill_n(grads.anchor[l], Matrices<T>::size(net, l), T(0));
  }
  grads.anchored = false;
}

// Back through the end of a complete chunk: its weights settled and became the anchor.
template <class T>
void settle_backward(const Network& net, const Fast<T>& next, const Tape<T>& tape, StateGradients<T>& grads) {
  join_anchor(net, grads);
  for (int l = 0; l < net.depth; ++l) {
    const int stride = Matrices<T>::stride(net, l);
    for (int i = 0; net.limited && i < net.out(l); ++i) {
      const T scale = tape.row_scales[l][i];
      if (scale == T(1)) continue;
      const T* settled = next.weights[l] + std::ptrdiff_t(i) * stride;
      T *grad = grads.weights[l] + std::ptrdiff_t(i) * stride, along = 0;
      for (int j = 0; j < stride; ++j) along += settled[j] * grad[j];
      along /= T(net.row_limit * net.row_limit);
      for (int j = 0; j < stride; ++j) grad[j] = scale * (grad[j] - settled[j] * along);
    }
  }
}

// Back through the reads and the update of layer l.
template <class T>
void layer_backward(
    const Network& net, int l, const Fast<T>& now, const Matrices<T>* base, Tape<T>& tape, Scratch<T>& scratch,
    StateGradients<T>& grads, TokenGradients<T>& found) {
  const int in = net.in(l), out = net.out(l), stride = Matrices<T>::stride(net, l), slots = tape.slots;
  const auto& c = tape.coefficients[l];
  auto& c_grad = found.coefficients[l];
  const T *out_grad = found.by_read[l], *scaled = tape.scaled[l], *read = tape.reads[l];
  T *weights_grad = grads.weights[l], *momentum_grad = grads.momentum[l], *mixing = scratch.square;

  product<true>(slots, slots, out, scaled, slots, out_grad, slots, [&](int i, int j, Vector<T> sum) {
    store(mixing + i * slots + j, -sum);
  });
  for (int n = 0; n < slots * slots; ++n) {
    c_grad.steps[n] = mixing[n] * tape.similarity[l][n];
    mixing[n] *= c.steps[n];
  }
  dot_columns(out, slots, out_grad, tape.with_weights[l], c_grad.kept);
  dot_columns(out, slots, out_grad, tape.with_momentum[l], c_grad.moved);

  // What the tokens' writes were worth to what comes after the chunk.
  product<false>(
      out, slots, in, weights_grad, stride, tape.inputs[l], slots, assign(found.deposit_weights, slots));
  product<false>(
      out, slots, in, momentum_grad, stride, tape.inputs[l], slots, assign(found.deposit_momentum, slots));
  dot_columns(out, slots, scaled, found.deposit_weights, c_grad.end_steps);
  dot_columns(out, slots, scaled, found.deposit_momentum, c_grad.momentum_steps);
  for (int t = 0; t < slots; ++t) {
    c_grad.end_steps[t] = -c_grad.end_steps[t];
    c_grad.momentum_steps[t] = -c_grad.momentum_steps[t];
  }

  // D_l: through the similarity-weighted sum of the reads, and through the writes.
  T *mixed = scratch.square2, *turned = scratch.wide;
  for (int n = 0; n < slots * slots; ++n) turned[n] = tape.similarity[l][n] * c.steps[n];
  transpose(slots, slots, turned, slots, mixed, slots);
  product<false>(out, slots, slots, out_grad, slots, mixed, slots, [&](int i, int j, Vector<T> sum) {
    const int at = i * slots + j;
    store(
        found.scaled[l] + at,
        -sum - load(found.deposit_weights + at) * load(c.end_steps + j) -
            load(found.deposit_momentum + at) * load(c.momentum_steps + j));
  });

  // h_{l-1} of the keys.
  transpose(slots, slots, mixing, slots, mixed, slots);
  product<false>(in, slots, slots, read, slots, mixed, slots, assign(found.inputs[l], slots));
  scale_columns(out, slots, scaled, c.end_steps, scratch.wide);
  product<true>(in, slots, out, weights_grad, stride, scratch.wide, slots, subtract(found.inputs[l], slots));
  scale_columns(out, slots, scaled, c.momentum_steps, scratch.wide);
  product<true>(in, slots, out, momentum_grad, stride, scratch.wide, slots, subtract(found.inputs[l], slots));

  // r_{l-1} of the queries.
  T *by_weights = scratch.wide, *by_momentum = scratch.wide2, *hidden_grad = scratch.wide3;
  scale_columns(out, slots, out_grad, c.kept, by_weights);
  scale_columns(out, slots, out_grad, c.moved, by_momentum);
  product<true>(in, slots, out, now.weights[l], stride, by_weights, slots, assign(hidden_grad, slots));
  product<true>(in, slots, out, now.momentum[l], stride, by_momentum, slots, add(hidden_grad, slots));
  if (base) product<true>(in, slots, out, (*base)[l], stride, out_grad, slots, add(hidden_grad, slots));
  product<false>(in, slots, slots, tape.inputs[l], slots, mixing, slots, add(hidden_grad, slots));

  // The state before the chunk.
  const auto size = Matrices<T>::size(net, l);
  c_grad.end_weights = dot(size, weights_grad, now.weights[l]);
  c_grad.end_momentum = dot(size, weights_grad, now.momentum[l]);
  c_grad.momentum_momentum = dot(size, momentum_grad, now.momentum[l]);
  if (l) to_right(in, slots, stride, read, tape.reads_right[l]);
  const T* read_right = tape.read_right(l);
  product<false>(out, stride, slots, by_momentum, slots, read_right, stride, [&](int i, int j, Vector<T> sum) {
    const std::ptrdiff_t at = std::ptrdiff_t(i) * stride + j;
    const Vector<T> moment = load(momentum_grad + at);
    store(momentum_grad + at, c.momentum_momentum * moment + c.end_momentum * load(weights_grad + at) + sum);
  });
  product<false>(out, stride, slots, by_weights, slots, read_right, stride, [&](int i, int j, Vector<T> sum) {
    const std::ptrdiff_t at = std::ptrdiff_t(i) * stride + j;
    const Vector<T> weight = load(weights_grad + at);
    store(weights_grad + at, weight + c.end_weights * weight + sum);
  });
  if (base) product<false>(out, stride, slots, out_grad, slots, read_right, stride, add(grads.base[l], stride));

  if (l)
    multiply(in * slots, hidden_grad, tape.read_slopes[l - 1], found.by_read[l - 1]);
  else
    std::copy_n(hidden_grad, in * slots, found.queries);
}

// Through the inner backward pass and the inner forward pass; `at_anchor` (and the base) get what is found there.
template <class T>
void key_backward(
    const Network& net, const Fast<T>& now, Affine<T> affine, bool has_base, const Matrices<T>& at_anchor,
    Tape<T>& tape, Scratch<T>& scratch, StateGradients<T>& grads, TokenGradients<T>& found) {
  const int slots = tape.slots, last = net.depth - 1;
  if (net.normalize) {
    for (int l = 0; l <= last; ++l) {
      T* grad = found.scaled[l];
      scale_columns(net.out(l), slots, grad, tape.inverses[l], grad);
      dot_columns(net.out(l), slots, grad, tape.scaled[l], found.normalizers[l]);
      for (int t = 0; t < slots; ++t) found.normalizers[l][t] = -found.normalizers[l][t];
    }
    step_normalizers_backward(
        net, slots, tape.input_squares.layer.data(), tape.weight_squares.data(), tape.bounds.layer.data(),
        found.normalizers.layer.data(), found.input_squares.layer.data(), found.weight_squares.data(),
        found.bound);
    for (int l = 0; l <= last; ++l)
      for (int i = 0; i < net.in(l); ++i)
        for (int t = 0; t < slots; ++t)
          found.inputs[l][i * slots + t] += 2 * tape.inputs[l][i * slots + t] * found.input_squares[l][t];
  }

  // Up through δ_l = act'(z_l) ⊙ (δ_{l+1} W_{l+1}).
  for (int l = 0; l < last; ++l) {
    const int out = net.out(l), stride = Matrices<T>::stride(net, l + 1);
    T* above_grad = scratch.wide;
    multiply(out * slots, found.scaled[l], tape.slopes[l], above_grad);
    multiply(out * slots, found.scaled[l], tape.above[l], found.bends[l]);
    multiply(out * slots, found.bends[l], tape.curvatures[l], found.bends[l]);
    product<false>(
        net.out(l + 1), slots, out, now.total[l + 1], stride, above_grad, slots, add(found.scaled[l + 1], slots));
    to_right(out, slots, stride, above_grad, found.above_right[l + 1]);
  }
  std::fill_n(found.keys, net.key_dim * slots, T(0));
  objective_backward(
      net, slots, tape.outputs[last], tape.keys, tape.values, affine, found.scaled[last],
      net.normalize ? found.bound : nullptr, found.by_key[last], found.keys, found.values,
      affine.gain ? grads.gain : nullptr, affine.bias ? grads.bias : nullptr, scratch.norm);

  // Down through z_l = W_l h_{l-1}.
  for (int l = last; l >= 0; --l) {
    const int in = net.in(l), out = net.out(l), stride = Matrices<T>::stride(net, l);
    const T* out_grad = found.by_key[l];
    product<true>(in, slots, out, now.total[l], stride, out_grad, slots, add(found.inputs[l], slots));
    if (l) {
      multiply(in * slots, found.inputs[l], tape.slopes[l - 1], found.by_key[l - 1]);
      add_all(in * slots, found.bends[l - 1], found.by_key[l - 1]);
    }
    const T square_grad = l && net.normalize ? 2 * found.weight_squares[l] : T(0);
    const auto keep = [&](int i, int j, Vector<T> sum) {
      const std::ptrdiff_t at = std::ptrdiff_t(i) * stride + j;
      store(at_anchor[l] + at, load(at_anchor[l] + at) + sum);
      if (has_base) store(grads.base[l] + at, load(grads.base[l] + at) + sum);
    };
    product<false>(out, stride, slots, out_grad, slots, tape.input_right(l), stride, keep);
    if (!l) continue;
    const auto with_squares = [&](int i, int j, Vector<T> sum) {
      keep(i, j, sum + square_grad * load(now.total[l] + std::ptrdiff_t(i) * stride + j));
    };
    product<false>(out, stride, slots, tape.deltas[l], slots, found.above_right[l], stride, with_squares);
  }
  add_all(net.key_dim * slots, found.inputs[0], found.keys);
}

// answers_grad: (head_dim, slots). `shared`: before the chunk the anchor was the weights.
template <class T>
void chunk_backward(
    const Network& net, const Fast<T>& now, const Fast<T>& next, const Matrices<T>* base, Affine<T> affine,
    bool complete, bool shared, Tape<T>& tape, Scratch<T>& scratch, const T* answers_grad,
    StateGradients<T>& grads, TokenGradients<T>& found) {
  const int slots = tape.slots, last = net.depth - 1;
  if (complete) settle_backward(net, next, tape, grads);
  finish_backward(
      net, slots, tape.answers[last], affine, answers_grad, found.by_read[last],
      affine.gain ? grads.gain : nullptr, affine.bias ? grads.bias : nullptr, scratch.norm);
  for (int l = last; l >= 0; --l) layer_backward(net, l, now, base, tape, scratch, grads, found);
  if (net.residual) add_all(net.head_dim * slots, answers_grad, found.queries);
  key_backward(
      net, now, affine, base != nullptr, shared ? grads.weights : grads.anchor, tape, scratch, grads, found);
  if (shared) join_anchor(net, grads);
  else grads.anchored = true;
}

}  // namespace titans
