"""The neural long-term memory of "Titans: Learning to Memorize at Test Time" in numpy, one token at a time.

Nothing here is fast and nothing is hidden: no autograd, no batch, no chunk algebra. The gradient of the
memory's loss is derived manually, so this file shares neither code nor method with the library, and a test
holds the two to the same numbers (`tests/test_numpy_oracle.py`). Numbers in brackets: the paper's equations.

    symbol    here         shape        meaning
    M(x)      M(W, x)      (d,)         the memory: a small network, read at x with weights W
    W_l       W[l]         (out, in)    its weights: *fast* weights, rewritten by every token
    S_l       S[l]         (out, in)    momentum: past surprise, still moving the weights
    W'_l      anchor[l]    (out, in)    W as it stood after the last token of the previous chunk
    u_l       u[l]         (out, in)    momentary surprise: gradient of |M(k) - v|^2 at W'
    c_l       c[l]         scalar       bound on that loss's curvature in W'_l (only for `normalize_step`)
    k, v, q   k, v, q      (d,)         key and value to be stored, query to be answered
    alpha     forget       scalar       share of W that is forgotten, in [0, 1]
    eta       momentum     scalar       share of S that is kept, in [0, 1]
    theta     step_size    scalar       how much of the surprise is written

Four things to notice. Only W decays: the step S is added whole, after the decay. A token reads what it has
just written. Gradients are taken at the chunk's start, W', not at W: this lets the library work a chunk at
once, and is why W, S and W' are all part of the state. Chunks are counted from the start of the sequence, not
of the call, so cutting a sequence into several calls changes nothing.

`python examples/titans_in_numpy.py` checks the hand-written gradient, then shows the memory at work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
LAYER_NORM_EPS = 1e-5
MAX_SLOPE = 1.13  # the steepest slope of GELU is 1.129, of SiLU 1.100

erf = np.vectorize(math.erf, otypes=[float])


def gelu(z: Array) -> tuple[Array, Array]:
    """GELU z Phi(z), exact, and its derivative Phi(z) + z phi(z)."""
    cdf = (1 + erf(z / math.sqrt(2))) / 2
    return z * cdf, cdf + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def silu(z: Array) -> tuple[Array, Array]:
    """SiLU z sigma(z) and its derivative sigma(z) (1 + z (1 - sigma(z)))."""
    sigmoid = (1 + np.tanh(z / 2)) / 2
    return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


ACTIVATIONS = {"gelu": gelu, "silu": silu}


@dataclass(frozen=True)
class Memory:
    """One head's M(x) = LayerNorm(W_L act(... W_1 x)) + x; LayerNorm (gain None) and + x may be left out."""

    activation: str = "gelu"
    residual: bool = True
    gain: Array | None = None  # (d,), with bias the slow weights of the LayerNorm
    bias: Array | None = None

    def layers(self, W: list[Array], x: Array) -> tuple[list[Array], list[Array], Array]:
        """What each layer receives, h_0 = x to h_{L-1}; the slopes act' of h_1 to h_{L-1}; W_L h_{L-1}."""
        h, slopes = [x], []
        for matrix in W[:-1]:
            out, slope = ACTIVATIONS[self.activation](matrix @ h[-1])
            h.append(out)
            slopes.append(slope)
        return h, slopes, W[-1] @ h[-1]

    def __call__(self, W: list[Array], x: Array) -> Array:
        """Read the memory at x."""
        y = self.layers(W, x)[2]
        if self.gain is not None:
            y = (y - y.mean()) / np.sqrt(y.var() + LAYER_NORM_EPS) * self.gain + self.bias
        return y + x if self.residual else y

    def surprise(self, W: list[Array], k: Array, v: Array) -> list[Array]:
        """u_l = d|M(k) - v|^2 / dW_l: the chain rule, walked from the error back to the first layer."""
        h, slopes, f = self.layers(W, k)
        delta = 2 * (self(W, k) - v)  # the residual path holds no weights: it enters the error, not the chain
        if self.gain is not None:
            deviation = np.sqrt(f.var() + LAYER_NORM_EPS)
            normal, delta = (f - f.mean()) / deviation, delta * self.gain
            delta = (delta - delta.mean() - normal * (delta * normal).mean()) / deviation
        u = [np.outer(delta, h[-1])]
        for layer in reversed(range(len(W) - 1)):
            delta = (W[layer + 1].T @ delta) * slopes[layer]
            u.insert(0, np.outer(delta, h[layer]))
        return u

    def finite_differences(self, W: list[Array], k: Array, v: Array, step: float = 1e-5) -> list[Array]:
        """The same gradient without calculus: nudge each weight both ways and see what the loss does."""
        u = [np.zeros_like(w) for w in W]
        for layer, index in ((layer, index) for layer, w in enumerate(W) for index in np.ndindex(w.shape)):
            for sign in (1, -1):
                nudged = [w.copy() for w in W]
                nudged[layer][index] += sign * step
                u[layer][index] += sign * np.sum((self(nudged, k) - v) ** 2) / (2 * step)
        return u

    def curvature(self, W: list[Array], k: Array, floor: float = 0.0) -> list[float]:
        """c_l = 2 rho^2 kappa_l^2 |h_{l-1}|^2: rho is LayerNorm's stretch, kappa_l the later layers'.

        With a floor no h counts as shorter, and every row of a later W as longer by it (by one more column).
        """
        h, _, f = self.layers(W, k)
        rho = 1.0 if self.gain is None else np.abs(self.gain).max() / np.sqrt(f.var() + LAYER_NORM_EPS)
        stretch = [MAX_SLOPE * np.linalg.norm(np.c_[w, np.full(len(w), floor)]) for w in W]
        kappa = [math.prod(stretch[layer + 1 :]) for layer in range(len(W))]
        return [
            2 * (rho * a) ** 2 * max(float(np.linalg.norm(x)), floor) ** 2
            for a, x in zip(kappa, h, strict=True)
        ]


@dataclass(frozen=True)
class State:
    """What a sequence leaves: W, S and W', per layer (heads, out, in), and how many tokens were written."""

    weights: list[Array]
    momentum: list[Array]
    anchor: list[Array]
    position: int = 0

    @classmethod
    def initial(cls, weights: list[Array]) -> State:
        """The state before the first token: nothing moves yet, and the first chunk starts at `weights`."""
        return cls(weights, [np.zeros_like(w) for w in weights], weights)


def shorten_rows(w: Array, limit: float) -> Array:
    """w with its rows longer than `limit` cut to that length."""
    return w / np.maximum(np.linalg.norm(w, axis=1, keepdims=True) / limit, 1.0)


def memory_scan(
    queries: Array, keys: Array, values: Array,  # (time, heads, d)
    forget: Array, momentum: Array, step_size: Array,  # alpha, eta, theta: (time, heads, depth)
    state: State, chunk_size: int = 16, *, activation: str = "gelu", residual: bool = True,
    gain: Array | None = None, bias: Array | None = None,  # (heads, d); without them no LayerNorm
    normalize_step: bool = False, row_limit: float = math.inf, length_floor: float = 0.0,
    base: list[Array] | None = None,
) -> tuple[Array, State]:  # fmt: skip
    """Write each (key, value), then answer its query; returns reads (time, heads, d) and the final state.

    Depth is the number of weight matrices: 1 is the linear memory, 2 the two-layer one. Not in the paper, but
    for stability: `normalize_step` divides theta by the curvature (which `length_floor` bounds from below);
    `row_limit` shortens the rows of W where a chunk ends; and with `base`, per layer (heads, out, in), the
    network is run with base + W, so that forgetting leads back to it, not to nothing.
    """
    time, num_heads, depth = forget.shape
    reads, ends = np.zeros_like(queries), []
    for head in range(num_heads):
        M = Memory(activation, residual, *(None if p is None else p[head] for p in (gain, bias)))
        B = [0.0 * w[head] if base is None else base[layer][head] for layer, w in enumerate(state.weights)]
        W, S, anchor = ([w[head] for w in part] for part in (state.weights, state.momentum, state.anchor))
        for t in range(time):
            q, k, v = queries[t, head], keys[t, head], values[t, head]
            start = [b + w for b, w in zip(B, anchor, strict=True)]
            u = M.surprise(start, k, v)
            c = M.curvature(start, k, length_floor)
            for layer in range(depth):
                alpha, eta, theta = (gate[t, head, layer] for gate in (forget, momentum, step_size))
                theta = theta / (depth * max(c[layer], 1e-6)) if normalize_step else theta
                S[layer] = eta * S[layer] - theta * u[layer]  # (14)
                W[layer] = (1 - alpha) * W[layer] + S[layer]  # (13)
            reads[t, head] = M([b + w for b, w in zip(B, W, strict=True)], q)  # (15)
            if (state.position + t + 1) % chunk_size == 0:
                if row_limit < math.inf:
                    W = [shorten_rows(w, row_limit) for w in W]
                anchor = list(W)
        ends.append((W, S, anchor))
    joined = ([np.stack(layer) for layer in zip(*part, strict=True)] for part in zip(*ends, strict=True))
    return reads, State(*joined, position=state.position + time)


def main() -> None:
    """Check the gradient on a random example, then store pairs and repeat one, and print what happens."""
    rng = np.random.default_rng(0)
    d, hidden, pairs = 16, 64, 8
    keys, values = rng.normal(size=(2, pairs + 1, d)) / math.sqrt(d)
    W = [rng.normal(size=(hidden, d)) / 4, rng.normal(size=(d, hidden)) / 8]
    M = Memory(gain=rng.normal(size=d), bias=rng.normal(size=d))
    by_hand, nudged = (gradient(W, keys[0], values[0]) for gradient in (M.surprise, M.finite_differences))
    error = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(by_hand, nudged, strict=True))
    print(f"derived gradient against finite differences: relative error {error:.0e}")
    if error > 1e-7:
        raise SystemExit("the hand-written gradient is wrong")

    M, state = Memory(residual=False), State.initial([w[None] for w in W])

    def write(which: list[int]) -> State:
        k, v = keys[which, None], values[which, None]
        alpha, eta, theta = (np.full((len(which), 1, 2), gate) for gate in (0.0, 0.5, 0.03))
        return memory_scan(k, k, v, alpha, eta, theta, state, chunk_size=pairs, residual=False)[1]

    def recall_error() -> float:
        W = [w[0] for w in state.weights]
        return float(np.mean([np.sum((M(W, keys[i]) - values[i]) ** 2) for i in range(pairs)]))

    print(f"\n{pairs} pairs, stored again and again, one pass a chunk: the error |M(k) - v|^2 falls")
    for passes in range(17):
        if passes in (0, 1, 2, 4, 8, 16):
            print(f"  after {passes:2} passes  mean recall error {recall_error():.3f}")
        state = write(list(range(pairs)))

    print("\na new pair, written chunk after chunk: its surprise |u| fades, and the old pairs pay for it")
    for chunk in range(1, 6):
        u = M.surprise([w[0] for w in state.anchor], keys[pairs], values[pairs])
        size = np.linalg.norm(np.concatenate(u, axis=None))
        print(f"  chunk {chunk}  surprise {size:.3f}  mean recall error of the old {recall_error():.3f}")
        state = write([pairs] * pairs)


if __name__ == "__main__":
    main()
