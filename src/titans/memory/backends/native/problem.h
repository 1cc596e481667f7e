// The arguments of a scan as its loops see them, and copies between tensors and the buffers of a head.
#pragma once

#include <ATen/core/Tensor.h>

#include "chunk.h"

namespace titans {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

template <class T>
const T* data(const OptionalTensor& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

inline Network network(at::IntArrayRef sizes, at::ArrayRef<double> numbers) {
  return {int(sizes[0]),
          int(sizes[1]),
          int(sizes[2]),
          int(sizes[3]),
          Network::Activation(sizes[4]),
          bool(sizes[5]),
          bool(sizes[6]),
          bool(sizes[7]),
          bool(sizes[8]),
          bool(sizes[9]),
          Network::Objective(sizes[10]),
          numbers[0],
          numbers[1],
          numbers[2]};
}

// The arguments of a scan: tokens (chunks, rows, width, …), gates (chunks, depth, rows, width), flags (chunks, rows).
template <class T>
struct Problem {
  Network net;
  int chunks, rows, width, slots;
  const Tensors &tokens, &initial, &initial_momentum, &base, &state;
  const bool *filled, *fresh, *complete;
  const T *gain, *bias;
  bool shared;

  Problem(
      const Network& net, const Tensors& tokens, const OptionalTensor& filled, const OptionalTensor& fresh,
      const Tensor& complete, const OptionalTensor& gain, const OptionalTensor& bias, const Tensors& initial,
      const Tensors& initial_momentum, const Tensors& base, const Tensors& state, bool shared)
      : net(net),
        chunks(tokens[0].size(0)),
        rows(tokens[0].size(1)),
        width(tokens[0].size(2)),
        slots(padded(width, kLanes<T>)),
        tokens(tokens),
        initial(initial),
        initial_momentum(initial_momentum),
        base(base),
        state(state),
        filled(data<bool>(filled)),
        fresh(data<bool>(fresh)),
        complete(complete.const_data_ptr<bool>()),
        gain(data<T>(gain)),
        bias(data<T>(bias)),
        shared(shared) {}

  // Whether products round their operands to bfloat16: only those of float32 ever do.
  bool narrow() const { return net.narrow && std::is_same_v<T, float> && Tiles::allowed(); }
  Affine<T> affine(int row) const {
    return {gain ? gain + row * net.head_dim : nullptr, bias ? bias + row * net.head_dim : nullptr};
  }
  bool starts_fresh(int n, int row) const { return fresh && fresh[n * rows + row]; }
  bool completes(int n, int row) const { return complete[n * rows + row]; }
  // Where a chunk's tokens, of `features` numbers each, begin.
  std::ptrdiff_t token_offset(int n, int row, int features) const {
    return (std::ptrdiff_t(n) * rows + row) * width * features;
  }
  std::ptrdiff_t gate_offset(int n, int l, int row) const {
    return ((std::ptrdiff_t(n) * net.depth + l) * rows + row) * width;
  }
  Gates<T> gates(int n, int l, int row) const {
    const auto at = gate_offset(n, l, row);
    return {
        tokens[3].const_data_ptr<T>() + at, tokens[4].const_data_ptr<T>() + at,
        tokens[5].const_data_ptr<T>() + at,
        filled ? filled + (std::ptrdiff_t(n) * rows + row) * width : nullptr};
  }
};

// One matrix of a (…, rows, out, in) tensor into padded rows, and back.
template <class T>
void load_matrix(const Network& net, int l, const Tensor& from, std::ptrdiff_t index, T* to) {
  const int in = net.in(l), stride = Matrices<T>::stride(net, l);
  const T* source = from.const_data_ptr<T>() + index * net.out(l) * in;
  for (int i = 0; i < net.out(l); ++i) {
    std::copy_n(source + std::ptrdiff_t(i) * in, in, to + std::ptrdiff_t(i) * stride);
    std::fill_n(to + std::ptrdiff_t(i) * stride + in, stride - in, T(0));
  }
}
template <class T>
void store_matrix(const Network& net, int l, const T* from, Tensor& to, std::ptrdiff_t index) {
  const int in = net.in(l), stride = Matrices<T>::stride(net, l);
  T* target = to.data_ptr<T>() + index * net.out(l) * in;
  for (int i = 0; i < net.out(l); ++i)
    std::copy_n(from + std::ptrdiff_t(i) * stride, in, target + std::ptrdiff_t(i) * in);
}

template <class T>
void load_tokens(const Problem<T>& problem, int n, int row, const Tensor& from, T* to) {
  const int d = from.size(-1), slots = problem.slots;
  if (problem.width < slots) std::fill_n(to, d * slots, T(0));
  transpose(problem.width, d, from.const_data_ptr<T>() + problem.token_offset(n, row, d), d, to, slots);
}
template <class T>
void store_tokens(const Problem<T>& problem, int n, int row, const T* from, Tensor& to) {
  const int d = to.size(-1);
  T* target = to.data_ptr<T>() + problem.token_offset(n, row, d);
  transpose(d, problem.width, from, problem.slots, target, d);
}

// The same as (slots, features), features and slots padded with zeros: in the tensor itself or, copied, in `buffer`.
template <class T>
const T* tokens_right(const Problem<T>& problem, int n, int row, const Tensor& from, T* buffer) {
  const int d = from.size(-1), stride = padded(d, kLanes<T>);
  const T* source = from.const_data_ptr<T>() + problem.token_offset(n, row, d);
  if (stride == d && problem.width == problem.slots) return source;
  std::fill_n(buffer, problem.slots * stride, T(0));
  for (int t = 0; t < problem.width; ++t) std::copy_n(source + t * d, d, buffer + t * stride);
  return buffer;
}

template <class T>
void load_chunk(const Problem<T>& problem, int n, int row, Tape<T>& tape, Scratch<T>& scratch) {
  load_tokens(problem, n, row, problem.tokens[0], tape.queries);
  load_tokens(problem, n, row, problem.tokens[1], tape.keys);
  load_tokens(problem, n, row, problem.tokens[2], tape.values);
  tape.queries_right = tokens_right(problem, n, row, problem.tokens[0], tape.reads_right[0]);
  tape.keys_right = tokens_right(problem, n, row, problem.tokens[1], tape.inputs_right[0]);
  for (int l = 0; l < problem.net.depth; ++l) {
    const auto gates = problem.gates(n, l, row);
    scratch.products.compute(problem.width, gates);
    coefficients(problem.width, problem.slots, gates, scratch.products, tape.coefficients[l]);
  }
}

// total = anchor + base.
template <class T>
void add_base(const Network& net, const Matrices<T>& anchor, const Matrices<T>* base, const Matrices<T>& total) {
  for (int l = 0; l < net.depth; ++l) {
    std::copy_n(anchor[l], Matrices<T>::size(net, l), total[l]);
    if (base) add_all(Matrices<T>::size(net, l), (*base)[l], total[l]);
  }
}

// What a head starts from: the state given, or the one that `group` chunks are recomputed from.
template <class T>
void load_state(
    const Problem<T>& problem, const Tensors& state, std::ptrdiff_t index, bool shared, const Matrices<T>* base,
    const Matrices<T>& anchor, const Fast<T>& to) {
  const Network& net = problem.net;
  for (int l = 0; l < net.depth; ++l) {
    load_matrix(net, l, state[l], index, to.weights[l]);
    load_matrix(net, l, state[net.depth + l], index, to.momentum[l]);
    if (!shared) load_matrix(net, l, state[2 * net.depth + l], index, anchor[l]);
  }
  add_base(net, shared ? to.weights : anchor, base, to.total);
}

template <class T>
void load_fresh(const Problem<T>& problem, int row, const Matrices<T>* base, const Fast<T>& to) {
  for (int l = 0; l < problem.net.depth; ++l) {
    load_matrix(problem.net, l, problem.initial[l], row, to.weights[l]);
    load_matrix(problem.net, l, problem.initial_momentum[l], row, to.momentum[l]);
  }
  add_base(problem.net, to.weights, base, to.total);
}

}  // namespace titans
