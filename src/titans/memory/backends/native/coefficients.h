// The weights after each token of a chunk as sums over the chunk (rules/rule.py, docs/how/maths.md), and their backward.
// Products of gates in double precision and as running products: a gate of exactly 0 is nothing special, and
// nothing is ever divided by one.
#pragma once

#include <vector>

#include "arena.h"

namespace titans {

// Gates of one head and layer over a chunk, (width,) each.
template <class T>
struct Gates {
  const T *forget, *momentum, *step_size;
  const bool* written;  // null: every token
  bool at(int t) const { return !written || written[t]; }
};

// As in rules/coefficients.py. Slots beyond the width hold zeros.
template <class T>
struct Coefficients {
  T *kept, *moved;                // (slots,): W_t = kept W + moved S − …
  T* steps;                       // [j, t] (slots, slots): the weight of u_j in W_t
  T *end_steps, *momentum_steps;  // (slots,)
  T end_weights, end_momentum, momentum_momentum;
};

template <class T>
Coefficients<T> make_coefficients(int slots, Arena& arena) {
  Coefficients<T> c{};
  c.kept = arena.take<T>(slots), c.moved = arena.take<T>(slots), c.steps = arena.take<T>(slots * slots);
  c.end_steps = arena.take<T>(slots), c.momentum_steps = arena.take<T>(slots);
  return c;
}

// Row t + 1 of `deposits`: what is left in W_t of S at the start (column 0) and of u_j theta_j (column j + 1);
// row t + 1 of `carried` the same for S_t. (width + 1)² each.
struct Products {
  int size = 0;
  std::vector<double> deposits, carried, kept;

  template <class T>
  void compute(int width, const Gates<T>& gates) {
    size = width + 1;
    deposits.assign(size * size, 0.0);
    carried.assign(size * size, 0.0);
    kept.assign(size, 1.0);
    carried[0] = 1;
    for (int t = 0; t < width; ++t) {
      const double retain = gates.at(t) ? 1.0 - double(gates.forget[t]) : 1.0;
      const double carry = gates.at(t) ? double(gates.momentum[t]) : 1.0;
      const double* last_deposits = &deposits[t * size];
      const double* last_carried = &carried[t * size];
      double *now_deposits = &deposits[(t + 1) * size], *now_carried = &carried[(t + 1) * size];
      for (int c = 0; c <= t; ++c) now_carried[c] = carry * last_carried[c];
      now_carried[t + 1] = 1;
      // S is added to W even where nothing is written by this token, so an unwritten one must add nothing.
      const double added = gates.at(t) ? 1.0 : 0.0;
      for (int c = 0; c <= t + 1; ++c) now_deposits[c] = retain * last_deposits[c] + added * now_carried[c];
      kept[t + 1] = retain * kept[t];
    }
  }
};

template <class T>
inline void coefficients(
    int width, int slots, const Gates<T>& gates, const Products& products, Coefficients<T>& to) {
  const int size = products.size;
  const double *last = &products.deposits[width * size], *carried = &products.carried[width * size];
  for (int j = 0; j < slots; ++j) {
    const bool real = j < width;
    const T theta = real && gates.at(j) ? gates.step_size[j] : T(0);
    to.kept[j] = real ? T(products.kept[j + 1]) : T(0);
    to.moved[j] = real ? T(products.deposits[(j + 1) * size]) : T(0);
    to.end_steps[j] = real ? T(last[j + 1]) * theta : T(0);
    to.momentum_steps[j] = real ? T(carried[j + 1]) * theta : T(0);
    for (int t = 0; t < slots; ++t)
      to.steps[j * slots + t] = real && t < width ? T(products.deposits[(t + 1) * size + j + 1]) * theta : T(0);
  }
  to.end_weights = T(products.kept[width] - 1);
  to.end_momentum = T(last[0]);
  to.momentum_momentum = T(carried[0]);
}

// `grad` holds the gradients of the coefficients; writes those of the gates, (width,) each.
template <class T>
inline void coefficients_backward(
    int width, int slots, const Gates<T>& gates, const Products& products, const Coefficients<T>& grad,
    T* forget_grad, T* momentum_grad, T* step_size_grad, std::vector<double>& scratch) {
  const int size = products.size;
  scratch.assign(2 * size, 0.0);
  double *deposits_grad = scratch.data(), *carried_grad = deposits_grad + size;
  double kept_grad = double(grad.end_weights);
  carried_grad[0] = double(grad.momentum_momentum);
  for (int j = 0; j < width; ++j) {
    const double theta = gates.at(j) ? double(gates.step_size[j]) : 0.0;
    carried_grad[j + 1] = theta * double(grad.momentum_steps[j]);
    double sum = double(grad.momentum_steps[j]) * products.carried[width * size + j + 1] +
        double(grad.end_steps[j]) * products.deposits[width * size + j + 1];
    for (int t = 0; t < width; ++t)
      sum += double(grad.steps[j * slots + t]) * products.deposits[(t + 1) * size + j + 1];
    step_size_grad[j] = gates.at(j) ? T(sum) : T(0);
  }
  for (int t = width - 1; t >= 0; --t) {
    const bool written = gates.at(t);
    const double retain = written ? 1.0 - double(gates.forget[t]) : 1.0;
    const double carry = written ? double(gates.momentum[t]) : 1.0;
    const double *last_deposits = &products.deposits[t * size], *last_carried = &products.carried[t * size];
    deposits_grad[0] += double(grad.moved[t]) + (t == width - 1 ? double(grad.end_momentum) : 0.0);
    for (int j = 0; j <= t; ++j) {
      const double theta = gates.at(j) ? double(gates.step_size[j]) : 0.0;
      const double end = t == width - 1 ? double(grad.end_steps[j]) : 0.0;
      deposits_grad[j + 1] += theta * (double(grad.steps[j * slots + t]) + end);
    }
    kept_grad += double(grad.kept[t]);
    double retain_grad = kept_grad * products.kept[t], carry_grad = 0;
    for (int c = 0; c <= t; ++c) {
      retain_grad += deposits_grad[c] * last_deposits[c];
      if (written) carried_grad[c] += deposits_grad[c];
      carry_grad += carried_grad[c] * last_carried[c];
      carried_grad[c] *= carry;
      deposits_grad[c] *= retain;
    }
    kept_grad *= retain;
    forget_grad[t] = written ? T(-retain_grad) : T(0);
    momentum_grad[t] = written ? T(carry_grad) : T(0);
  }
}

}  // namespace titans
