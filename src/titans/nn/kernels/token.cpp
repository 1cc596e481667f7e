// The next token of every row without autograd, which is decoding: a layer's part in one call. Each is the forward of
// the class in titans/nn that it is named after; memories learn and are read by the operators of
// memory/backends/native.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "attention.h"

namespace titans::token {
namespace {

Tensors learn(
    at::IntArrayRef sizes, at::ArrayRef<double> numbers, at::TensorList tokens, const Tensor& complete,
    const OptionalTensor& gain, const OptionalTensor& bias, at::TensorList base, at::TensorList state, bool shared,
    bool ragged) {
  using Scan = Tensors(
      at::IntArrayRef, at::ArrayRef<double>, at::TensorList, const OptionalTensor&, const OptionalTensor&,
      const Tensor&, const OptionalTensor&, const OptionalTensor&, at::TensorList, at::TensorList, at::TensorList,
      at::TensorList, bool, int64_t, bool, bool);
  static const auto scan = c10::Dispatcher::singleton().findSchemaOrThrow("titans_native::scan", "").typed<Scan>();
  const at::TensorList none;
  return scan.call(
      sizes, numbers, tokens, std::nullopt, std::nullopt, complete, gain, bias, none, none, base, state, shared, 1,
      false, ragged);
}

// Queries (rows · heads, key_dim) answered by weights on a base, or by the base alone.
Tensor read(
    at::IntArrayRef sizes, at::ArrayRef<double> numbers, const Tensor& queries, at::TensorList weights,
    at::TensorList base, const OptionalTensor& gain, const OptionalTensor& bias) {
  using Read = Tensor(
      at::IntArrayRef, at::ArrayRef<double>, const Tensor&, at::TensorList, at::TensorList, const OptionalTensor&,
      const OptionalTensor&);
  static const auto ask = c10::Dispatcher::singleton().findSchemaOrThrow("titans_native::read", "").typed<Read>();
  return ask.call(sizes, numbers, queries, weights, base, gain, bias);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Tensor from = x.contiguous(), to = at::empty_like(from);
  const int64_t size = weight.size(0), rows = from.numel() / size;
  in_dtype_of(x, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = 0; row < rows; ++row) {
      const T *in = from.const_data_ptr<T>() + row * size, *by = weight.const_data_ptr<T>();
      T* out = to.data_ptr<T>() + row * size;
      const Vec<T> factor(rms_factor(size, in, eps));
      for_vectors<T>(size, [&](int64_t i, int count) { store_some(load_some(in + i, count) * factor * load_some(by + i, count), out + i, count); });
    }
  });
  return to;
}

// norm(a) σ(norm(b)), see `MemoryGate`.
Tensor gate(
    const Tensor& a, const Tensor& b, const Tensor& a_weight, const Tensor& b_weight, double a_eps, double b_eps) {
  const Tensor left = a.contiguous(), right = b.contiguous(), to = at::empty_like(left);
  const int64_t size = a_weight.size(0), rows = left.numel() / size;
  in_dtype_of(a, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = 0; row < rows; ++row) {
      const T *x = left.const_data_ptr<T>() + row * size, *y = right.const_data_ptr<T>() + row * size;
      const Vec<T> of_x(rms_factor(size, x, a_eps)), of_y(rms_factor(size, y, b_eps));
      for_vectors<T>(size, [&](int64_t i, int count) {
        const Vec<T> normed = load_some(x + i, count) * of_x * load_some(a_weight.const_data_ptr<T>() + i, count);
        const Vec<T> opens = load_some(y + i, count) * of_y * load_some(b_weight.const_data_ptr<T>() + i, count);
        store_some(normed * sigmoid(opens), to.data_ptr<T>() + row * size + i, count);
      });
    }
  });
  return to;
}

// x + down(silu(gate(n)) up(n)) with n = norm(x), see `feed_forward`.
Tensor feed_forward(const Tensor& given, const Tensor& weight, double eps, const Tensor& gate_up, const Tensor& down) {
  const Tensor x = given.contiguous();
  const Tensor both = project(rms_norm(x, weight, eps).view({-1, x.size(-1)}), gate_up);
  const int64_t rows = both.size(0), size = both.size(1) / 2;
  const Tensor hidden = at::empty({rows, size}, x.options());
  in_dtype_of(x, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = 0; row < rows; ++row) {
      const T* gate = both.const_data_ptr<T>() + row * 2 * size;
      T* to = hidden.data_ptr<T>() + row * size;
      for_vectors<T>(size, [&](int64_t i, int count) {
        const Vec<T> z = load_some(gate + i, count);
        store_some(z * sigmoid(z) * load_some(gate + size + i, count), to + i, count);
      });
    }
  });
  const Tensor y = project(hidden, down);
  in_dtype_of(x, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < y.numel(); ++i) y.data_ptr<T>()[i] += x.const_data_ptr<T>()[i];
  });
  return y.view(x.sizes());
}

// One part's heads of a token after convolution and SiLU, at their length; see `head_vectors`. x, the token's numbers
// from the part's first channel on. tail: of the row, likewise; width: from one token to the next.
template <class T>
void filter_token(
    const T* x, const T* tail, int64_t width, const T* conv, int64_t kernel, int64_t heads, int64_t size,
    double longest, T* to) {
  for (int64_t c = 0; c < heads * size; ++c) {
    T sum = x[c] * conv[c * kernel + kernel - 1];
    for (int64_t j = 0; j + 1 < kernel; ++j) sum += tail[j * width + c] * conv[c * kernel + j];
    to[c] = sum;
  }
  silu(heads * size, to);
  for (int64_t head = 0; head < heads; ++head) {
    T* vector = to + head * size;
    const T length = std::sqrt(dot(size, vector, vector));
    const T scale = longest > 0 ? T(longest) / std::max(length, T(longest)) : T(1) / std::max(length, T(kShortest));
    for (int64_t i = 0; i < size; ++i) vector[i] *= scale;
  }
}

// The tail after x: (rows, kernel − 1, channels), x (rows, at least channels).
template <class T>
Tensor tail_after(const Tensor& tail, const Tensor& x) {
  const Tensor to = at::empty_like(tail);
  const int64_t kept = tail.size(1), channels = tail.size(2);
  for (int64_t row = 0; kept && row < tail.size(0); ++row) {
    T* out = to.data_ptr<T>() + row * kept * channels;
    std::copy_n(tail.const_data_ptr<T>() + (row * kept + 1) * channels, (kept - 1) * channels, out);
    std::copy_n(x.const_data_ptr<T>() + row * x.size(1), channels, out + (kept - 1) * channels);
  }
  return to;
}

// norm(reads − prior) + norm(prior), or norm(reads) without a prior, of one head; see `ReadNorm`.
template <class T>
void norm_read(
    int64_t size, const T* reads, const T* prior, const T* taught, const T* known, double eps, T* to) {
  std::copy_n(reads, size, to);
  for (int64_t i = 0; prior && i < size; ++i) to[i] -= prior[i];
  const T factor = rms_factor(size, to, eps), of_prior = prior ? rms_factor(size, prior, eps) : T(0);
  for (int64_t i = 0; i < size; ++i) to[i] = to[i] * factor * taught[i] + (prior ? prior[i] * of_prior * known[i] : T(0));
}

// What the gates of a memory are made of, see `Learner`. weight (3 · heads · depth, in), bias (3, heads, depth); keys
// (3, heads, depth, size), up (units, in [+ heads · size]) and down (3 · heads · depth, units), or nothing.
// limits: of momentum and step size, then the half-lives that bound forgetting, if any.
struct Gates {
  const Tensor &weight, &bias;
  const OptionalTensor &keys, &up, &down;
  at::ArrayRef<double> limits;
};

// Forget, momentum and step size (1, depth, rows · heads, 1) of tokens x (rows, in) with keys (rows · heads, size);
// nothing where one is no number.
template <class T>
Tensors gates_of(const Gates& of, const Tensor& x, const Tensor& keys, bool frozen) {
  const int64_t rows = x.size(0), heads = of.bias.size(1), depth = of.bias.size(2), size = keys.size(1);
  const int64_t in = x.size(1), count = 3 * heads * depth;
  const Tensor raw = project(x, of.weight);
  T* logits = raw.data_ptr<T>();
  for (int64_t i = 0; i < rows * count; ++i) logits[i] += of.bias.const_data_ptr<T>()[i % count];
  const T scale = T(std::pow(double(size), 0.5));
  if (of.keys)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t n = 0; n < count; ++n) {
        const int64_t head = n / depth % heads;
        logits[row * count + n] += scale *
            dot(size, keys.const_data_ptr<T>() + (row * heads + head) * size, of.keys->const_data_ptr<T>() + n * size);
      }
  if (of.up) {
    const int64_t all = of.up->size(1);
    const Tensor seen = at::empty({rows, all}, x.options());
    for (int64_t row = 0; row < rows; ++row) {
      T* to = seen.data_ptr<T>() + row * all;
      std::copy_n(x.const_data_ptr<T>() + row * in, in, to);
      for (int64_t i = in; i < all; ++i) to[i] = scale * keys.const_data_ptr<T>()[row * heads * size + i - in];
    }
    const Tensor hidden = project(seen, *of.up);
    silu(hidden.numel(), hidden.data_ptr<T>());
    const Tensor more = project(hidden, *of.down);
    for (int64_t i = 0; i < rows * count; ++i) logits[i] += more.const_data_ptr<T>()[i];
  }
  Tensors found;
  for (int n = 0; n < 3; ++n) found.push_back(at::empty({1, depth, rows * heads, 1}, x.options()));
  const auto opened = [](T z) { return T(1) / (T(1) + std::exp(-z)); };
  bool numbers = true;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t head = 0; head < heads; ++head) {
      T least = 0;
      if (of.limits.size() > 2) {
        const double place = heads > 1 ? double(head) / double(heads - 1) : 0.5;
        least = T(std::log(2.0) / (of.limits[2] * std::pow(of.limits[3] / of.limits[2], place)));
      }
      for (int64_t l = 0; l < depth; ++l) {
        const T* z = logits + row * count + head * depth + l;
        const T rate = (*z > T(20) ? *z : std::log1p(std::exp(*z))) + least;
        const T gates[] = {
            -std::expm1(-rate), T(of.limits[0]) * opened(z[heads * depth]),
            frozen ? T(0) * z[2 * heads * depth] : T(of.limits[1]) * opened(z[2 * heads * depth])};
        for (int n = 0; n < 3; ++n) {
          found[n].data_ptr<T>()[(l * rows + row) * heads + head] = gates[n];
          numbers = numbers && gates[n] == gates[n];
        }
      }
    }
  return numbers ? found : Tensors{};
}

Tensors each(at::TensorList tensors, at::IntArrayRef leading) {
  Tensors found;
  for (const Tensor& x : tensors) {
    std::vector<int64_t> shape = leading.vec();
    const int64_t kept = leading.size() == 1 ? 2 : 1;
    for (int64_t n = kept; n < x.dim(); ++n) shape.push_back(x.size(n));
    found.push_back(x.reshape(shape).contiguous());
  }
  return found;
}

// x (rows, 1, in) read by a `NeuralMemory`. state: weights, momentum and, unless `shared`, anchor, (rows, heads, out,
// in) each. projections: input, convolution, output. Returns y, tail, position and the state's tensors, and what its
// anchor is: 0 what it was, 1 the weights, 2 written out after the momentum; no tensors where a gate is no number.
std::tuple<Tensors, int64_t> memory_token(
    const Tensor& x, const Tensor& tail, const Tensor& position, at::TensorList state, bool shared,
    at::IntArrayRef sizes, at::ArrayRef<double> numbers, int64_t chunk_size, bool frozen, at::TensorList projections,
    const Tensor& gate_weight, const Tensor& gate_bias, const OptionalTensor& gate_keys, const OptionalTensor& gate_up,
    const OptionalTensor& gate_down, at::ArrayRef<double> limits, at::TensorList base, const OptionalTensor& gain,
    const OptionalTensor& bias, const Tensor& taught, const OptionalTensor& known, double eps) {
  const int64_t rows = x.size(0), heads = gate_bias.size(1), size = sizes[2], width = heads * size;
  const int64_t depth = sizes[0], all = rows * heads;
  const Tensor flat = x.contiguous().view({rows, x.size(2)}), projected = project(flat, projections[0]);
  const Tensor& conv = projections[1];
  return in_dtype_of(x, [&](auto type) -> std::tuple<Tensors, int64_t> {
    using T = decltype(type);
    Tensors tokens;
    for (int part = 0; part < 3; ++part) {
      tokens.push_back(at::empty({1, all, 1, size}, x.options()));
      for (int64_t row = 0; row < rows; ++row)
        filter_token(
            projected.const_data_ptr<T>() + row * 4 * width + part * width,
            tail.const_data_ptr<T>() + row * tail.size(1) * 3 * width + part * width, 3 * width,
            conv.const_data_ptr<T>() + part * width * conv.size(1), conv.size(1), heads, size,
            part == 2 ? std::pow(double(size), 0.5) : 0.0, tokens[part].data_ptr<T>() + row * width);
    }
    const Tensor asked = tokens[0].view({all, size});
    const Gates gates{gate_weight, gate_bias, gate_keys, gate_up, gate_down, limits};
    const Tensors opened = gates_of<T>(gates, flat, tokens[1].view({all, size}), frozen);
    if (opened.empty()) return {};
    tokens.insert(tokens.end(), opened.begin(), opened.end());

    const Tensor complete = at::empty({1, all}, x.options().dtype(at::kBool)), after = at::empty_like(position);
    int64_t closed = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t now = after.data_ptr<int64_t>()[row] = position.const_data_ptr<int64_t>()[row] + 1;
      std::fill_n(complete.data_ptr<bool>() + row * heads, heads, now % chunk_size == 0);
      closed += now % chunk_size == 0;
    }
    const bool ragged = closed && closed != rows;
    // Written out: of one head `reshape` would give every row the same place.
    const auto of_rows = [&](const Tensor& x) {
      return x.expand({rows, heads, x.size(-1)}).reshape({all, x.size(-1)}).contiguous();
    };
    Tensors own = each(state, {all}), under;
    // The scan looks at no anchor that is shared, but counts on three parts.
    if (shared) own.insert(own.end(), own.begin(), own.begin() + depth);
    for (const Tensor& b : base)
      under.push_back(b.expand({rows, heads, b.size(1), b.size(2)}).reshape({all, b.size(1), b.size(2)}).contiguous());
    Tensors found = learn(
        sizes, numbers, tokens, complete, gain ? OptionalTensor(of_rows(*gain)) : gain,
        bias ? OptionalTensor(of_rows(*bias)) : bias, under, own, shared, ragged);
    const Tensor prior = base.empty() ? Tensor() : read(sizes, numbers, asked, {}, base, gain, bias);

    const Tensor answers = at::empty({rows, width}, x.options());
    for (int64_t n = 0; n < all; ++n) {
      const int64_t head = n % heads;
      T* to = answers.data_ptr<T>() + n * size;
      const T* gate = projected.const_data_ptr<T>() + n / heads * 4 * width + 3 * width + head * size;
      norm_read(
          size, found[0].const_data_ptr<T>() + n * size, prior.defined() ? prior.const_data_ptr<T>() + n * size : nullptr,
          taught.const_data_ptr<T>() + head * size, known ? known->const_data_ptr<T>() + head * size : nullptr, eps, to);
      for_vectors<T>(size, [&](int64_t i, int count) {
        const Vec<T> z = load_some(gate + i, count);
        store_some(load_some(to + i, count) * z * sigmoid(z), to + i, count);
      });
    }
    Tensors results{project(answers, projections[2]).unsqueeze(1), tail_after<T>(tail, projected), after};
    for (size_t n = 2; n < found.size(); ++n)
      results.push_back(found[n].view({rows, heads, found[n].size(1), found[n].size(2)}));
    return {results, ragged ? 2 : closed ? 1 : 0};
  });
}

// What `MACBlock` recalls for x (rows, 1, in) from a snapshot (rows, heads, out, in) of its memory; and the new tail.
std::tuple<Tensor, Tensor> recall_token(
    const Tensor& x, const Tensor& tail, at::IntArrayRef sizes, at::ArrayRef<double> numbers, at::TensorList snapshot,
    const Tensor& query, const Tensor& conv, const Tensor& output, at::TensorList base, const OptionalTensor& gain,
    const OptionalTensor& bias, const Tensor& taught, const OptionalTensor& known, double eps) {
  const int64_t rows = x.size(0), size = sizes[2], width = query.size(0), heads = width / size, all = rows * heads;
  const Tensor projected = project(x.contiguous().view({rows, x.size(2)}), query);
  return in_dtype_of(x, [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = decltype(type);
    const Tensor asked = at::empty({all, size}, x.options()), answers = at::empty({rows, width}, x.options());
    for (int64_t row = 0; row < rows; ++row)
      filter_token(
          projected.const_data_ptr<T>() + row * width, tail.const_data_ptr<T>() + row * tail.size(1) * width, width,
          conv.const_data_ptr<T>(), conv.size(1), heads, size, 0.0, asked.data_ptr<T>() + row * width);
    const Tensor reads = read(sizes, numbers, asked, each(snapshot, {all}), base, gain, bias);
    const Tensor prior = base.empty() ? Tensor() : read(sizes, numbers, asked, {}, base, gain, bias);
    for (int64_t n = 0; n < all; ++n)
      norm_read(
          size, reads.const_data_ptr<T>() + n * size, prior.defined() ? prior.const_data_ptr<T>() + n * size : nullptr,
          taught.const_data_ptr<T>() + n % heads * size, known ? known->const_data_ptr<T>() + n % heads * size : nullptr,
          eps, answers.data_ptr<T>() + n * size);
    return {project(answers, output).unsqueeze(1), tail_after<T>(tail, projected)};
  });
}

}  // namespace
}  // namespace titans::token

TORCH_LIBRARY_FRAGMENT(titans_native, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("gate(Tensor a, Tensor b, Tensor a_weight, Tensor b_weight, float a_eps, float b_eps) -> Tensor");
  library.def("feed_forward(Tensor x, Tensor weight, float eps, Tensor gate_up, Tensor down) -> Tensor");
  library.def(
      "window_token(Tensor x, Tensor query, Tensor key_value, Tensor output, Tensor keys, Tensor values, "
      "Tensor position, Tensor? persistent, float theta) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "segment_token(Tensor x, Tensor context, Tensor query, Tensor key_value, Tensor output, Tensor[] old, "
      "Tensor index, Tensor? persistent, float theta) -> (Tensor, Tensor[])");
  library.def(
      "memory_token(Tensor x, Tensor tail, Tensor position, Tensor[] state, bool shared, int[] sizes, "
      "float[] numbers, int chunk_size, bool frozen, Tensor[] projections, Tensor gate_weight, Tensor gate_bias, "
      "Tensor? gate_keys, Tensor? gate_up, Tensor? gate_down, float[] limits, Tensor[] base, Tensor? gain, "
      "Tensor? bias, Tensor taught, Tensor? known, float eps) -> (Tensor[], int)");
  library.def(
      "recall_token(Tensor x, Tensor tail, int[] sizes, float[] numbers, Tensor[] snapshot, Tensor query, "
      "Tensor conv, Tensor output, Tensor[] base, Tensor? gain, Tensor? bias, Tensor taught, Tensor? known, "
      "float eps) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(titans_native, CPU, library) {
  library.impl("rms_norm", titans::token::rms_norm);
  library.impl("gate", titans::token::gate);
  library.impl("feed_forward", titans::token::feed_forward);
  library.impl("window_token", titans::token::window_token);
  library.impl("segment_token", titans::token::segment_token);
  library.impl("memory_token", titans::token::memory_token);
  library.impl("recall_token", titans::token::recall_token);
}
