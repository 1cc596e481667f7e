// What surrounds a scan in a layer, each in one pass over its tokens: short convolution, SiLU and the lengths of
// queries, keys and values before it; norm and gate of the answers after it. Vectors run along a head's features.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "vectors.h"

namespace titans {
namespace {

// One head's channels of (batch, time, channels) rows, contiguous along the channels.
template <class T>
struct Channels {
  T* at;
  std::ptrdiff_t stride;
  T* operator()(std::ptrdiff_t t) const { return at + t * stride; }
};

template <class T>
Channels<T> channels(const Tensor& x, int64_t row, int64_t first) {
  return {x.data_ptr<T>() + row * x.stride(0) + first, x.stride(1)};
}
// The same of (batch, time, heads, head_dim).
template <class T>
Channels<T> head_of(const Tensor& x, int64_t row, int64_t head) {
  return {x.data_ptr<T>() + row * x.stride(0) + head * x.stride(2), x.stride(1)};
}

// x (batch, time, parts · heads · size), tail (batch, kernel − 1, the same), weight (the same, kernel).
struct Filtered {
  const Tensor &x, &tail, &weight;
  const OptionalTensor &reset, &lengths;
  at::ArrayRef<double> longest;  // for each part; 0: unit length
  int64_t size;

  int64_t kernel() const { return weight.size(1); }
  int64_t heads() const { return x.size(2) / size / int64_t(longest.size()); }
  int64_t real(int64_t row) const { return lengths ? lengths->const_data_ptr<int64_t>()[row] : x.size(1); }
  bool resets(int64_t row, int64_t t) const {
    return t >= 0 && reset && reset->const_data_ptr<bool>()[row * x.size(1) + t];
  }
};

// One head of one part in one row.
template <class T>
struct Filter {
  const Filtered& of;
  int64_t row, kernel, size;
  double longest;
  Channels<T> x, tail;
  std::vector<T> taps;  // (kernel, size), tap j meets the token j before
  std::vector<T> filtered, gate;

  Filter(const Filtered& of, int64_t row, int64_t first)
      : of(of),
        row(row),
        kernel(of.kernel()),
        size(of.size),
        longest(of.longest[first / size / of.heads()]),
        x(channels<T>(of.x, row, first)),
        tail(channels<T>(of.tail, row, first)),
        taps(kernel * size),
        filtered(size),
        gate(size) {
    const T* weight = of.weight.const_data_ptr<T>() + first * kernel;
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < kernel; ++j) taps[j * size + i] = weight[i * kernel + kernel - 1 - j];
  }

  const T* token(int64_t t) const { return t >= 0 ? x(t) : tail(t + kernel - 1); }
  const T* tap(int64_t j) const { return taps.data() + j * size; }

  // z = the convolution at t, over the last `reach` tokens too, and σ(z). Returns what z σ(z) is multiplied by,
  // and whether that is more than a constant.
  std::pair<T, bool> run(int64_t t, int64_t reach) {
    Vec<T> squares(T(0));
    for (int64_t i = 0; i < size; i += Vec<T>::size()) {
      Vec<T> z(T(0));
      for (int64_t j = reach; j >= 0; --j)
        z = at::vec::fmadd(Vec<T>::loadu(tap(j) + i), Vec<T>::loadu(token(t - j) + i), z);
      const Vec<T> open = sigmoid(z), y = z * open;
      z.store(filtered.data() + i), open.store(gate.data() + i);
      squares = at::vec::fmadd(y, y, squares);
    }
    const T length = std::sqrt(sum_of(squares));
    if (longest > 0) return length > T(longest) ? std::pair(T(longest) / length, true) : std::pair(T(1), false);
    return length > T(kShortest) ? std::pair(T(1) / length, true) : std::pair(T(1 / kShortest), false);
  }
};

template <class T>
void filter_head(const Filtered& of, int64_t row, int64_t first, Channels<T> to) {
  Filter<T> filter(of, row, first);
  const int64_t size = of.size, last = of.kernel() - 1, real = of.real(row);
  for (int64_t t = 0, reach = last; t < real; ++t, reach = std::min(reach + 1, last)) {
    if (of.resets(row, t)) reach = 0;
    const Vec<T> scale(filter.run(t, reach).first);
    for (int64_t i = 0; i < size; i += Vec<T>::size())
      (Vec<T>::loadu(&filter.filtered[i]) * Vec<T>::loadu(&filter.gate[i]) * scale).store(to(t) + i);
  }
  for (int64_t t = real; t < of.x.size(1); ++t) std::fill_n(to(t), size, T(0));
}

// `grad` is that of what `filter_head` wrote; taps_grad (size, kernel).
template <class T>
void filter_head_backward(
    const Filtered& of, int64_t row, int64_t first, Channels<T> grad, Channels<T> x_grad, Channels<T> tail_grad,
    T* taps_grad) {
  Filter<T> filter(of, row, first);
  const int64_t size = of.size, kernel = of.kernel(), last = kernel - 1, time = of.x.size(1), real = of.real(row);
  std::vector<char> reaches(real);
  for (int64_t t = 0, reach = last; t < real; ++t, reach = std::min(reach + 1, last))
    reaches[t] = char(reach = of.resets(row, t) ? 0 : reach);
  for (int64_t t = real; t < time; ++t) std::fill_n(x_grad(t), size, T(0));
  // Of the convolution at the last `kernel` tokens looked at, in a ring; and of the taps.
  std::vector<T> later(kernel * size, T(0)), sums(kernel * size, T(0));
  for (int64_t t = real - 1; t >= -last; --t) {
    T* now = &later[((t + last) % kernel) * size];
    if (t < 0) {
      std::fill_n(now, size, T(0));
    } else {
      const auto [factor, moves] = filter.run(t, reaches[t]);
      Vec<T> along(T(0));
      for (int64_t i = 0; moves && i < size; i += Vec<T>::size())
        along = at::vec::fmadd(
            Vec<T>::loadu(grad(t) + i), Vec<T>::loadu(&filter.filtered[i]) * Vec<T>::loadu(&filter.gate[i]), along);
      // y = s · limit / ‖s‖ (limit 1 or the longest): dy = factor (g − s (g·s) / ‖s‖²).
      const T limit = of.longest[first / size / of.heads()] > 0 ? T(filter.longest) : T(1);
      const T shrink = moves ? sum_of(along) * (factor / limit) * (factor / limit) : T(0);
      for (int64_t i = 0; i < size; i += Vec<T>::size()) {
        const Vec<T> z = Vec<T>::loadu(&filter.filtered[i]), open = Vec<T>::loadu(&filter.gate[i]);
        const Vec<T> y_grad = Vec<T>(factor) * (Vec<T>::loadu(grad(t) + i) - z * open * Vec<T>(shrink));
        const Vec<T> z_grad = y_grad * open * (Vec<T>(T(1)) + z * (Vec<T>(T(1)) - open));
        z_grad.store(now + i);
        for (int64_t j = 0; j <= reaches[t]; ++j)
          at::vec::fmadd(z_grad, Vec<T>::loadu(filter.token(t - j) + i), Vec<T>::loadu(&sums[j * size + i]))
              .store(&sums[j * size + i]);
      }
    }
    T* to = t >= 0 ? x_grad(t) : tail_grad(t + last);
    for (int64_t i = 0; i < size; i += Vec<T>::size()) {
      Vec<T> sum(T(0));
      for (int64_t j = 0; j < kernel && t + j < real; ++j)
        sum = at::vec::fmadd(Vec<T>::loadu(filter.tap(j) + i), Vec<T>::loadu(&later[((t + j + last) % kernel) * size + i]), sum);
      sum.store(to + i);
    }
    // What comes before a reset is not reached from after it.
    if (of.resets(row, t)) std::fill(later.begin(), later.end(), T(0));
  }
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < kernel; ++j) taps_grad[i * kernel + kernel - 1 - j] = sums[j * size + i];
}

template <class Body>
void for_heads(int64_t rows, int64_t heads, const Body& body) {
  at::parallel_for(0, rows * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) body(n / heads, n % heads);
  });
}

// One tensor (batch, time, heads, size) for each part.
Tensors filter(
    const Tensor& x, const Tensor& tail, const Tensor& weight, const OptionalTensor& reset,
    const OptionalTensor& lengths, at::ArrayRef<double> longest, int64_t size) {
  const Filtered of{x, tail, weight, reset, lengths, longest, size};
  const int64_t parts = longest.size(), heads = of.heads();
  Tensors found;
  for (int64_t part = 0; part < parts; ++part)
    found.push_back(at::empty({x.size(0), x.size(1), heads, size}, x.options()));
  return in_dtype_of(x, [&](auto type) {
    using T = decltype(type);
    for_heads(x.size(0), parts * heads, [&](int64_t row, int64_t head) {
      filter_head<T>(of, row, head * size, head_of<T>(found[head / heads], row, head % heads));
    });
    return found;
  });
}

// The gradients of x, tail and weight, this one for each row.
Tensors filter_backward(
    const Tensor& x, const Tensor& tail, const Tensor& weight, const OptionalTensor& reset,
    const OptionalTensor& lengths, at::ArrayRef<double> longest, int64_t size, at::TensorList grads) {
  const Filtered of{x, tail, weight, reset, lengths, longest, size};
  const int64_t parts = longest.size(), heads = of.heads();
  const Tensor x_grad = at::empty(x.sizes(), x.options()), tail_grad = at::empty(tail.sizes(), x.options());
  const Tensor weight_grad = at::empty({x.size(0), weight.size(0), weight.size(1)}, x.options());
  return in_dtype_of(x, [&](auto type) {
    using T = decltype(type);
    for_heads(x.size(0), parts * heads, [&](int64_t row, int64_t head) {
      const int64_t first = head * size;
      filter_head_backward<T>(
          of, row, first, head_of<T>(grads[head / heads], row, head % heads), channels<T>(x_grad, row, first),
          channels<T>(tail_grad, row, first),
          weight_grad.data_ptr<T>() + row * weight_grad.stride(0) + first * weight.size(1));
    });
    return Tensors{x_grad, tail_grad, weight_grad};
  });
}

// A vector x / √(mean x² + eps), given as x and that factor.
template <class T>
T norm_factor(int64_t size, const T* x, const T* minus, double eps) {
  Vec<T> squares(T(0));
  for (int64_t i = 0; i < size; i += Vec<T>::size()) {
    Vec<T> at = Vec<T>::loadu(x + i);
    if (minus) at = at - Vec<T>::loadu(minus + i);
    squares = at::vec::fmadd(at, at, squares);
  }
  return T(1) / std::sqrt(sum_of(squares) / T(size) + T(eps));
}

struct Answers {
  const Tensor &reads, &prior, &gate, &taught_weight, &prior_weight;
  double eps;
  int64_t size() const { return reads.size(3); }
};

// One head of one row: its tokens and weights.
template <class T>
struct Answer {
  Channels<T> read, prior, gate;
  const T *taught_weight, *prior_weight;
  int64_t size;
  double eps;

  Answer(const Answers& of, int64_t row, int64_t head)
      : read(head_of<T>(of.reads, row, head)),
        prior(head_of<T>(of.prior, row, head)),
        gate(channels<T>(of.gate, row, head * of.size())),
        taught_weight(of.taught_weight.const_data_ptr<T>() + head * of.size()),
        prior_weight(of.prior_weight.const_data_ptr<T>() + head * of.size()),
        size(of.size()),
        eps(of.eps) {}

  std::pair<T, T> factors(int64_t t) const {
    return {norm_factor(size, read(t), prior(t), eps), norm_factor<T>(size, prior(t), nullptr, eps)};
  }
};

// (norm(reads − prior) + norm(prior)) · silu(gate): (batch, time, heads · size).
Tensor answer(
    const Tensor& reads, const Tensor& prior, const Tensor& gate, const Tensor& taught_weight,
    const Tensor& prior_weight, double eps) {
  const Answers of{reads, prior, gate, taught_weight, prior_weight, eps};
  const Tensor to = at::empty(gate.sizes(), reads.options());
  in_dtype_of(reads, [&](auto type) {
    using T = decltype(type);
    for_heads(reads.size(0), reads.size(2), [&](int64_t row, int64_t head) {
      const Answer<T> in(of, row, head);
      const auto out = channels<T>(to, row, head * in.size);
      for (int64_t t = 0; t < reads.size(1); ++t) {
        const auto [taught, known] = in.factors(t);
        for (int64_t i = 0; i < in.size; i += Vec<T>::size()) {
          const auto before = Vec<T>::loadu(in.prior(t) + i), g = Vec<T>::loadu(in.gate(t) + i);
          const auto change = Vec<T>::loadu(in.read(t) + i) - before;
          const auto normed = change * Vec<T>(taught) * Vec<T>::loadu(in.taught_weight + i) +
              before * Vec<T>(known) * Vec<T>::loadu(in.prior_weight + i);
          (normed * g * sigmoid(g)).store(out(t) + i);
        }
      }
    });
    return Tensors{};
  });
  return to;
}

// The gradients of reads, prior, gate, and of the weights for each row.
Tensors answer_backward(
    const Tensor& reads, const Tensor& prior, const Tensor& gate, const Tensor& taught_weight,
    const Tensor& prior_weight, double eps, const Tensor& grad) {
  const Answers of{reads, prior, gate, taught_weight, prior_weight, eps};
  const Tensor reads_grad = at::empty_like(reads), prior_grad = at::empty_like(prior);
  const Tensor gate_grad = at::empty(gate.sizes(), gate.options());
  const Tensor weights_grad = at::empty({2, reads.size(0), reads.size(2), reads.size(3)}, reads.options());
  return in_dtype_of(reads, [&](auto type) {
    using T = decltype(type);
    for_heads(reads.size(0), reads.size(2), [&](int64_t row, int64_t head) {
      const Answer<T> in(of, row, head);
      const auto out = channels<T>(grad, row, head * in.size), to_gate = channels<T>(gate_grad, row, head * in.size);
      const auto to_read = head_of<T>(reads_grad, row, head), to_prior = head_of<T>(prior_grad, row, head);
      T *taught_sum = weights_grad.data_ptr<T>() + (row * reads.size(2) + head) * in.size;
      T *known_sum = taught_sum + weights_grad.stride(0);
      std::fill_n(taught_sum, in.size, T(0)), std::fill_n(known_sum, in.size, T(0));
      std::vector<T> normed_grad(in.size);
      for (int64_t t = 0; t < reads.size(1); ++t) {
        const auto [taught, known] = in.factors(t);
        Vec<T> along_taught(T(0)), along_known(T(0));
        for (int64_t i = 0; i < in.size; i += Vec<T>::size()) {
          const auto before = Vec<T>::loadu(in.prior(t) + i), g = Vec<T>::loadu(in.gate(t) + i);
          const auto change = (Vec<T>::loadu(in.read(t) + i) - before) * Vec<T>(taught);
          const auto kept = before * Vec<T>(known), open = sigmoid(g), y_grad = Vec<T>::loadu(out(t) + i);
          const auto by_taught = Vec<T>::loadu(in.taught_weight + i), by_prior = Vec<T>::loadu(in.prior_weight + i);
          (y_grad * (change * by_taught + kept * by_prior) * open * (Vec<T>(T(1)) + g * (Vec<T>(T(1)) - open)))
              .store(to_gate(t) + i);
          const auto to_normed = y_grad * g * open;
          to_normed.store(&normed_grad[i]);
          (Vec<T>::loadu(taught_sum + i) + to_normed * change).store(taught_sum + i);
          (Vec<T>::loadu(known_sum + i) + to_normed * kept).store(known_sum + i);
          along_taught = along_taught + to_normed * by_taught * change;
          along_known = along_known + to_normed * by_prior * kept;
        }
        const Vec<T> taught_mean(sum_of(along_taught) / T(in.size)), known_mean(sum_of(along_known) / T(in.size));
        for (int64_t i = 0; i < in.size; i += Vec<T>::size()) {
          const auto before = Vec<T>::loadu(in.prior(t) + i), to_normed = Vec<T>::loadu(&normed_grad[i]);
          const auto change = (Vec<T>::loadu(in.read(t) + i) - before) * Vec<T>(taught), kept = before * Vec<T>(known);
          const auto to_change =
              Vec<T>(taught) * (to_normed * Vec<T>::loadu(in.taught_weight + i) - change * taught_mean);
          const auto to_kept = Vec<T>(known) * (to_normed * Vec<T>::loadu(in.prior_weight + i) - kept * known_mean);
          to_change.store(to_read(t) + i);
          (to_kept - to_change).store(to_prior(t) + i);
        }
      }
    });
    return Tensors{reads_grad, prior_grad, gate_grad, weights_grad};
  });
}

}  // namespace
}  // namespace titans

TORCH_LIBRARY_FRAGMENT(titans_native, library) {
  library.def(
      "filter(Tensor x, Tensor tail, Tensor weight, Tensor? reset, Tensor? lengths, float[] longest, int size) "
      "-> Tensor[]");
  library.def(
      "filter_backward(Tensor x, Tensor tail, Tensor weight, Tensor? reset, Tensor? lengths, float[] longest, "
      "int size, Tensor[] grads) -> Tensor[]");
  library.def(
      "answer(Tensor reads, Tensor prior, Tensor gate, Tensor taught_weight, Tensor prior_weight, float eps) "
      "-> Tensor");
  library.def(
      "answer_backward(Tensor reads, Tensor prior, Tensor gate, Tensor taught_weight, Tensor prior_weight, "
      "float eps, Tensor grad) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(titans_native, CPU, library) {
  library.impl("filter", titans::filter);
  library.impl("filter_backward", titans::filter_backward);
  library.impl("answer", titans::answer);
  library.impl("answer_backward", titans::answer_backward);
}
