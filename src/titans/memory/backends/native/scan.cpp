// Chunks in sequence for every head: the scan of chunkwise/groups.py, one head to a thread, its state in that core's
// cache.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstdlib>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "chunk_backward.h"
#include "decode.h"
#include "problem.h"

namespace titans {
namespace {

// What a memory forgets halves until it is denormal, and arithmetic with denormals is a hundred times slower.
class FlushDenormals {
#if defined(__SSE__)
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

struct Block {
  explicit Block(std::ptrdiff_t bytes) : at(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
    TORCH_CHECK(at || !bytes, "the native memory backend needs ", bytes, " bytes for each thread and got none");
  }
  ~Block() { std::free(at); }
  Block(const Block&) = delete;
  void* at;
};

// body(buffers, row) for every row, each thread with buffers of its own in one block. `narrow`: see Tiles.
template <class Buffers, class Body, class... Arguments>
void for_rows(int rows, bool narrow, const Body& body, const Arguments&... arguments) {
  Arena counting;
  Buffers(counting, arguments...);
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals guard;
    const Tiles tiles(narrow);
    Block block(counting.used());
    Arena arena(block.at);
    Buffers buffers(arena, arguments...);
    for (int row = begin; row < end; ++row) body(buffers, row);
  });
}

template <class T>
struct ForwardBuffers {
  Fast<T> now;
  Matrices<T> anchor, base;
  Tape<T> tape;
  Scratch<T> scratch;
  T* answers;
  ForwardBuffers(Arena& arena, const Problem<T>& p)
      : now(p.net, arena),
        anchor(p.net, arena),
        base(p.net, arena),
        tape(p.net, p.slots, arena, false),
        scratch(p.net, p.slots, arena),
        answers(arena.take<T>(p.net.head_dim * p.slots)) {}
};

template <class T>
struct BackwardBuffers {
  std::vector<Fast<T>> fast;  // before each chunk of a group, and after the last
  Fast<T> fresh;
  Matrices<T> anchor, base;
  std::vector<Tape<T>> tapes;
  Scratch<T> scratch;
  StateGradients<T> grads;
  TokenGradients<T> found;
  T* answers;
  BackwardBuffers(Arena& arena, const Problem<T>& p, int group)
      : fresh(p.net, arena),
        anchor(p.net, arena),
        base(p.net, arena),
        scratch(p.net, p.slots, arena),
        grads(p.net, arena, !p.base.empty(), p.fresh != nullptr),
        found(p.net, p.slots, arena),
        answers(arena.take<T>(p.net.head_dim * p.slots)) {
    for (int i = 0; i <= group; ++i) fast.emplace_back(p.net, arena);
    for (int i = 0; i < group; ++i) tapes.emplace_back(p.net, p.slots, arena, true);
  }
};

template <class T>
const Matrices<T>* load_base(const Problem<T>& problem, int row, const Matrices<T>& to) {
  if (problem.base.empty()) return nullptr;
  for (int l = 0; l < problem.net.depth; ++l) load_matrix(problem.net, l, problem.base[l], row, to[l]);
  return &to;
}

template <class T>
bool whole_vectors(const Network& net) {
  const int vector = std::max<int>(kLanes<T>, at::vec::Vectorized<T>::size());
  return net.head_dim % vector == 0 && net.key_dim % vector == 0;
}

// A single token of every row. `ragged`: as of `forward`.
template <class T>
void forward_token(const Problem<T>& problem, bool ragged, Tensors& results) {
  const Network& net = problem.net;
  const auto run_row = [&](TokenBuffers<T>& at, int row) {
    Plain<T> state;
    std::vector<Gates<T>> gates;
    for (int l = 0; l < net.depth; ++l) {
      const std::ptrdiff_t here = std::ptrdiff_t(row) * net.out(l) * net.in(l);
      const auto part = [&](int which) {
        return problem.state[which * net.depth + l].template const_data_ptr<T>() + here;
      };
      state.weights.push_back(part(0)), state.momentum.push_back(part(1));
      state.anchor.push_back(part(problem.shared ? 0 : 2));
      if (!problem.base.empty()) state.base.push_back(problem.base[l].template const_data_ptr<T>() + here);
      state.next_weights.push_back(results[2 + l].template data_ptr<T>() + here);
      state.next_momentum.push_back(results[2 + net.depth + l].template data_ptr<T>() + here);
      gates.push_back(problem.gates(0, l, row));
    }
    const auto token = [&](int which) {
      const Tensor& tokens = problem.tokens[which];
      return tokens.template const_data_ptr<T>() + row * tokens.size(-1);
    };
    run_token(
        net, state, problem.affine(row), token(0), token(1), token(2), gates, problem.completes(0, row), at,
        results[0].template data_ptr<T>() + row * net.head_dim);
    results[1].template data_ptr<T>()[row] = at.surprise[0];
    for (int l = 0; ragged && l < net.depth; ++l) {
      const std::ptrdiff_t size = std::ptrdiff_t(net.out(l)) * net.in(l);
      std::copy_n(
          problem.completes(0, row) ? state.next_weights[l] : state.anchor[l], size,
          results[2 + 2 * net.depth + l].template data_ptr<T>() + row * size);
    }
  };
  for_rows<TokenBuffers<T>>(problem.rows, false, run_row, net);
}

// `keep`: also the state before every group of chunks but the first, which starts from what the caller has.
// `ragged`: rows differ in the chunks that they complete, so that each needs an anchor of its own.
template <class T>
Tensors forward(const Problem<T>& problem, int group, bool keep, bool ragged) {
  const Network& net = problem.net;
  const int groups = (problem.chunks + group - 1) / group;
  const auto options = problem.tokens[0].options();
  Tensors results{
      at::empty({problem.chunks, problem.rows, problem.width, net.head_dim}, options),
      at::empty({problem.chunks, problem.rows, problem.width}, options)};
  const bool give_anchor = keep || ragged;
  for (int part = 0; part < (give_anchor ? 3 : 2); ++part)
    for (int l = 0; l < net.depth; ++l)
      results.push_back(at::empty({problem.rows, net.out(l), net.in(l)}, options));
  if (!keep && !problem.filled && !problem.fresh && problem.chunks == 1 && problem.width == 1 &&
      whole_vectors<T>(net)) {
    forward_token(problem, ragged, results);
    return results;
  }
  Tensors starts;
  for (int part = 0; keep && part < (ragged ? 3 : 2); ++part)
    for (int l = 0; l < net.depth; ++l)
      starts.push_back(at::empty({groups - 1, problem.rows, net.out(l), net.in(l)}, options));

  const auto run_row = [&](ForwardBuffers<T>& at, int row) {
    const Matrices<T>* base = load_base(problem, row, at.base);
    bool shared = problem.shared;
    load_state(problem, problem.state, row, shared, base, at.anchor, at.now);
    for (int n = 0; n < problem.chunks; ++n) {
      if (keep && n && n % group == 0) {
        const std::ptrdiff_t index = std::ptrdiff_t(n / group - 1) * problem.rows + row;
        for (int l = 0; l < net.depth; ++l) {
          store_matrix(net, l, at.now.weights[l], starts[l], index);
          store_matrix(net, l, at.now.momentum[l], starts[net.depth + l], index);
          if (ragged)
            store_matrix(
                net, l, shared ? at.now.weights[l] : at.anchor[l], starts[2 * net.depth + l], index);
        }
      }
      if (problem.starts_fresh(n, row)) {
        load_fresh(problem, row, base, at.now);
        shared = true;
      }
      const bool complete = problem.completes(n, row);
      if (shared && !complete)
        for (int l = 0; l < net.depth; ++l)
          std::copy_n(at.now.weights[l], Matrices<T>::size(net, l), at.anchor[l]);
      load_chunk(problem, n, row, at.tape, at.scratch);
      run_chunk(net, at.now, at.now, base, problem.affine(row), complete, at.tape, at.scratch, at.answers);
      store_tokens(problem, n, row, at.answers, results[0]);
      std::copy_n(
          at.tape.surprise, problem.width,
          results[1].data_ptr<T>() + (std::ptrdiff_t(n) * problem.rows + row) * problem.width);
      shared = complete;
    }
    for (int l = 0; l < net.depth; ++l) {
      store_matrix(net, l, at.now.weights[l], results[2 + l], row);
      store_matrix(net, l, at.now.momentum[l], results[2 + net.depth + l], row);
      if (give_anchor)
        store_matrix(
            net, l, shared ? at.now.weights[l] : at.anchor[l], results[2 + 2 * net.depth + l], row);
    }
  };
  for_rows<ForwardBuffers<T>>(problem.rows, problem.narrow(), run_row, problem);
  results.insert(results.end(), starts.begin(), starts.end());
  return results;
}

// grads: of reads, weights, momentum and anchor. Returns the gradients of tokens, gain, bias, initial,
// initial_momentum, base, weights, momentum, anchor.
template <class T>
Tensors backward(const Problem<T>& problem, int group, const Tensors& starts, const Tensors& grads) {
  const Network& net = problem.net;
  const int groups = (problem.chunks + group - 1) / group, depth = net.depth;
  const auto options = problem.tokens[0].options();
  const auto like = [&](const Tensor& x) { return at::empty(x.sizes(), options); };
  Tensors token_grads, initial_grads, base_grads, state_grads;
  for (const auto& x : problem.tokens) token_grads.push_back(like(x));
  Tensor gain_grad = at::empty({problem.rows, net.head_dim}, options), bias_grad = like(gain_grad);
  for (const auto& x : problem.initial) initial_grads.push_back(like(x));
  for (const auto& x : problem.initial_momentum) initial_grads.push_back(like(x));
  for (const auto& x : problem.base) base_grads.push_back(like(x));
  for (int part = 0; part < 3; ++part)
    for (int l = 0; l < depth; ++l) state_grads.push_back(like(problem.state[l]));

  const auto run_row = [&](BackwardBuffers<T>& at, int row) {
    std::vector<const Fast<T>*> before(group);
    std::vector<char> shared(problem.chunks + 1);
    const Affine<T> affine = problem.affine(row);
    const Matrices<T>* base = load_base(problem, row, at.base);
    const auto zero = [&](const Matrices<T>& x) {
      for (size_t l = 0; l < x.layer.size(); ++l) std::fill_n(x[l], Matrices<T>::size(net, l), T(0));
    };
    zero(at.grads.base), zero(at.grads.initial), zero(at.grads.initial_momentum);
    std::fill_n(at.grads.gain, net.head_dim, T(0));
    std::fill_n(at.grads.bias, net.head_dim, T(0));
    for (int l = 0; l < depth; ++l) {
      load_matrix(net, l, grads[1 + l], row, at.grads.weights[l]);
      load_matrix(net, l, grads[1 + depth + l], row, at.grads.momentum[l]);
      load_matrix(net, l, grads[1 + 2 * depth + l], row, at.grads.anchor[l]);
    }
    at.grads.anchored = true;
    if (problem.fresh) load_fresh(problem, row, base, at.fresh);
    // shared[n]: when chunk n − 1 was over, the anchor was the weights.
    shared[0] = problem.shared;
    for (int n = 0; n < problem.chunks; ++n) shared[n + 1] = problem.completes(n, row);

    for (int g = groups - 1; g >= 0; --g) {
      const int first = g * group, count = std::min(group, problem.chunks - first);
      const std::ptrdiff_t index = g ? std::ptrdiff_t(g - 1) * problem.rows + row : row;
      load_state(problem, g ? starts : problem.state, index, shared[first], base, at.anchor, at.fast[0]);
      for (int i = 0; i < count; ++i) {
        before[i] = problem.starts_fresh(first + i, row) ? &at.fresh : &at.fast[i];
        load_chunk(problem, first + i, row, at.tapes[i], at.scratch);
        run_chunk(
            net, *before[i], at.fast[i + 1], base, affine, problem.completes(first + i, row), at.tapes[i],
            at.scratch, at.answers);
      }
      for (int i = count - 1; i >= 0; --i) {
        const int n = first + i;
        const bool fresh = problem.starts_fresh(n, row);
        load_tokens(problem, n, row, grads[0], at.answers);
        chunk_backward(
            net, *before[i], at.fast[i + 1], base, affine, problem.completes(n, row), fresh || shared[n],
            at.tapes[i], at.scratch, at.answers, at.grads, at.found);
        store_tokens(problem, n, row, at.found.queries, token_grads[0]);
        store_tokens(problem, n, row, at.found.keys, token_grads[1]);
        store_tokens(problem, n, row, at.found.values, token_grads[2]);
        for (int l = 0; l < depth; ++l) {
          const auto gates = problem.gates(n, l, row);
          const auto offset = problem.gate_offset(n, l, row);
          at.scratch.products.compute(problem.width, gates);
          coefficients_backward(
              problem.width, problem.slots, gates, at.scratch.products, at.found.coefficients[l],
              token_grads[3].data_ptr<T>() + offset, token_grads[4].data_ptr<T>() + offset,
              token_grads[5].data_ptr<T>() + offset, at.scratch.gates);
        }
        for (int l = 0; fresh && l < depth; ++l) {
          add_all(Matrices<T>::size(net, l), at.grads.weights[l], at.grads.initial[l]);
          add_all(Matrices<T>::size(net, l), at.grads.momentum[l], at.grads.initial_momentum[l]);
        }
        if (fresh) zero(at.grads.weights), zero(at.grads.momentum);
      }
    }
    for (int l = 0; l < depth; ++l) {
      store_matrix(net, l, at.grads.weights[l], state_grads[l], row);
      store_matrix(net, l, at.grads.momentum[l], state_grads[depth + l], row);
      store_matrix(net, l, at.grads.anchor[l], state_grads[2 * depth + l], row);
      if (base) store_matrix(net, l, at.grads.base[l], base_grads[l], row);
      if (!problem.fresh) continue;
      store_matrix(net, l, at.grads.initial[l], initial_grads[l], row);
      store_matrix(net, l, at.grads.initial_momentum[l], initial_grads[depth + l], row);
    }
    std::copy_n(at.grads.gain, net.head_dim, gain_grad.data_ptr<T>() + std::ptrdiff_t(row) * net.head_dim);
    std::copy_n(at.grads.bias, net.head_dim, bias_grad.data_ptr<T>() + std::ptrdiff_t(row) * net.head_dim);
  };
  for_rows<BackwardBuffers<T>>(problem.rows, problem.narrow(), run_row, problem, group);
  Tensors results = token_grads;
  results.insert(results.end(), {gain_grad, bias_grad});
  for (const auto* part : {&initial_grads, &base_grads, &state_grads})
    results.insert(results.end(), part->begin(), part->end());
  return results;
}

template <class Function>
Tensors dispatch(const Tensor& x, const Function& function) {
  if (x.scalar_type() == at::kDouble) return function(double());
  TORCH_CHECK(x.scalar_type() == at::kFloat, "the native memory backend computes in float32 or float64");
  return function(float());
}

Tensors scan(
    at::IntArrayRef sizes, at::ArrayRef<double> numbers, at::TensorList tokens, const OptionalTensor& filled,
    const OptionalTensor& fresh, const Tensor& complete, const OptionalTensor& gain, const OptionalTensor& bias,
    at::TensorList initial, at::TensorList initial_momentum, at::TensorList base, at::TensorList state,
    bool shared, int64_t group, bool keep, bool ragged) {
  const Tensors t = tokens.vec(), i = initial.vec(), m = initial_momentum.vec(), b = base.vec(), s = state.vec();
  return dispatch(t[0], [&](auto type) {
    const Problem<decltype(type)> problem(
        network(sizes, numbers), t, filled, fresh, complete, gain, bias, i, m, b, s, shared);
    return forward(problem, group, keep, ragged);
  });
}

// Queries (rows, key_dim) answered without learning. weights (rows, out, in) or none; base (heads, out, in) or none,
// gain and bias (heads, head_dim), the heads of one text after another being the rows.
Tensor read(
    at::IntArrayRef sizes, at::ArrayRef<double> numbers, const Tensor& queries, at::TensorList weights,
    at::TensorList base, const OptionalTensor& gain, const OptionalTensor& bias) {
  const Network net = network(sizes, numbers);
  const Tensor answers = at::empty({queries.size(0), net.head_dim}, queries.options());
  dispatch(queries, [&](auto type) {
    using T = decltype(type);
    TORCH_CHECK(whole_vectors<T>(net), "read: the widths are no whole vectors");
    const auto run_row = [&](TokenBuffers<T>& at, int row) {
      const auto part = [&](const Tensor& x) { return x.template const_data_ptr<T>() + row % x.size(0) * x.stride(0); };
      std::vector<const T*> own, under;
      for (const Tensor& w : weights) own.push_back(part(w));
      for (const Tensor& b : base) under.push_back(part(b));
      const Affine<T> affine{gain ? part(*gain) : nullptr, bias ? part(*bias) : nullptr};
      read_token(net, own, under, affine, part(queries), at, answers.data_ptr<T>() + std::ptrdiff_t(row) * net.head_dim);
    };
    for_rows<TokenBuffers<T>>(int(queries.size(0)), false, run_row, net);
    return Tensors{};
  });
  return answers;
}

Tensors scan_backward(
    at::IntArrayRef sizes, at::ArrayRef<double> numbers, at::TensorList tokens, const OptionalTensor& filled,
    const OptionalTensor& fresh, const Tensor& complete, const OptionalTensor& gain, const OptionalTensor& bias,
    at::TensorList initial, at::TensorList initial_momentum, at::TensorList base, at::TensorList state,
    bool shared, int64_t group, at::TensorList starts, at::TensorList grads) {
  const Tensors t = tokens.vec(), i = initial.vec(), m = initial_momentum.vec(), b = base.vec(), s = state.vec();
  return dispatch(t[0], [&](auto type) {
    const Problem<decltype(type)> problem(
        network(sizes, numbers), t, filled, fresh, complete, gain, bias, i, m, b, s, shared);
    return backward(problem, group, starts.vec(), grads.vec());
  });
}

}  // namespace
}  // namespace titans

TORCH_LIBRARY_FRAGMENT(titans_native, library) {
  library.def("has_tiles() -> bool", [] { return titans::Tiles::allowed(); });
  library.def(
      "scan(int[] sizes, float[] numbers, Tensor[] tokens, Tensor? filled, Tensor? fresh, Tensor complete, "
      "Tensor? gain, Tensor? bias, Tensor[] initial, Tensor[] initial_momentum, Tensor[] base, Tensor[] state, "
      "bool shared, int group, bool keep, bool ragged) -> Tensor[]");
  library.def(
      "read(int[] sizes, float[] numbers, Tensor queries, Tensor[] weights, Tensor[] base, Tensor? gain, "
      "Tensor? bias) -> Tensor");
  library.def(
      "scan_backward(int[] sizes, float[] numbers, Tensor[] tokens, Tensor? filled, Tensor? fresh, "
      "Tensor complete, Tensor? gain, Tensor? bias, Tensor[] initial, Tensor[] initial_momentum, Tensor[] base, "
      "Tensor[] state, bool shared, int group, Tensor[] starts, Tensor[] grads) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(titans_native, CPU, library) {
  library.impl("scan", titans::scan);
  library.impl("read", titans::read);
  library.impl("scan_backward", titans::scan_backward);
}
