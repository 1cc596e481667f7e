"""The fast network of one memory head: its shape and its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5
# The largest slope of every activation lies just under this (GELU 1.1289, SiLU 1.0998, sin 1).
ACTIVATION_SLOPE = 1.13

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "sin": torch.sin}


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return grad * gate * (1 + x * (1 - gate))


# grad · activation'(x), and differentiable, which the outer gradient needs (torch's own silu_backward is
# not).
ACTIVATION_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "silu": _silu_backward,
    "sin": lambda grad, x: grad * torch.cos(x),
}


@dataclass(frozen=True)
class MemoryNetwork:
    """The network of one head, whose weights are learned at test time.

    With weights W_1 … W_L, each (out, in), h_0 = x and h_l = activation(W_l h_{l-1}),
    the network is f(x) = W_L h_{L-1}; then LayerNorm(f) · gain + bias if `norm`; then + x if `residual`.
    If `gated`, f(x) = W_3 (activation(W_1 x) ⊙ W_2 x), which with "silu" is SwiGLU.

    Args:
        head_dim: width of values and answers of one head.
        depth: number of weight matrices; 1 is a linear memory, and a gated network has 3.
        expansion: hidden width divided by `head_dim` (no hidden layer at depth 1).
        activation: "gelu" (exact, erf), "silu" or "sin".
        residual: add the input to the output.
        norm: LayerNorm on the output, its gain and bias being slow weights.
        gated: multiply the hidden layer by a second one without activation.
        key_dim: width of keys and queries, None for `head_dim`. Features of a key, which another layer
            computes, are usually more than the value has numbers; W_1 is then rectangular.
        normalize_step: where a network is given in place of an `InnerProblem`, the momentum rule's option of
            this name; nothing else looks at it.

    Raises:
        ValueError: for a value outside the domains above.

    Source: section 3.1 of the paper; residual and LayerNorm from the camera-ready's default memory.
    """

    head_dim: int = 64
    depth: int = 2
    expansion: int = 4
    activation: str = "gelu"
    residual: bool = True
    norm: bool = True
    normalize_step: bool = False
    key_dim: int | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        for name in ("head_dim", "depth", "expansion", "input_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                argument = "key_dim" if name == "input_dim" else name
                raise ValueError(f"{argument}={value!r}: give a whole number of at least 1")
        if self.residual and self.input_dim != self.head_dim:
            raise ValueError(
                f"key_dim={self.key_dim} with head_dim={self.head_dim}: a residual adds the key to the "
                "answer, so give residual=False or equal widths"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: choose one of {sorted(ACTIVATIONS)}")
        if self.gated and (self.depth != 3 or self.normalize_step):
            raise ValueError(
                f"gated=True with depth={self.depth} and normalize_step={self.normalize_step}: give depth=3, "
                "for it has three matrices, and False, for no bound of its curvature is known"
            )

    @property
    def input_dim(self) -> int:
        """The width of keys and queries."""
        return self.head_dim if self.key_dim is None else self.key_dim

    @property
    def weight_shapes(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of W_1 … W_L."""
        if self.gated:
            hidden = self.expansion * self.head_dim
            return (hidden, self.input_dim), (hidden, self.input_dim), (self.head_dim, hidden)
        widths = [self.input_dim] + [self.expansion * self.head_dim] * (self.depth - 1) + [self.head_dim]
        return tuple((out, inp) for inp, out in pairwise(widths))

    def total(self, fast: Sequence[Tensor], base: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        """The weights the network is run with: the fast ones, on top of slow ones (heads, out, in) if any."""
        return tuple(fast) if base is None else tuple(w + b for w, b in zip(fast, base, strict=True))

    def features(self, weights: Sequence[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs h_0 … h_{L-1} and outputs W_l h_{l-1} of every layer; x (…, rows, input_dim), W (…, out,
        in)."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        for weight in weights:
            inputs.append(self.layer_input(x, outputs))
            outputs.append(inputs[-1] @ weight.mT)
        return inputs, outputs

    def layer_input(self, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """What the next layer is applied to, from the input and the outputs of the layers before it."""
        if not outputs or (self.gated and len(outputs) == 1):
            return x
        activation = ACTIVATIONS[self.activation]
        return activation(outputs[0]) * outputs[1] if self.gated else activation(outputs[-1])

    def output_gradients(
        self, weights: Sequence[Tensor], outputs: Sequence[Tensor], gradient: Tensor
    ) -> list[Tensor]:
        """The gradients of all layers' outputs from that of the last, (…, rows, out); autograd can follow."""
        backward = ACTIVATION_BACKWARDS[self.activation]
        if self.gated:
            hidden = gradient @ weights[2]
            gate = backward(hidden * outputs[1], outputs[0])
            return [gate, hidden * ACTIVATIONS[self.activation](outputs[0]), gradient]
        found = [gradient]
        for weight, output in zip(reversed(weights[1:]), reversed(outputs[:-1]), strict=True):
            found.append(backward(found[-1] @ weight, output))
        return found[::-1]

    def finish(self, features: Tensor, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        """M(x) from f(x): LayerNorm and residual; gain and bias broadcast against x."""
        out = features
        if self.norm:
            out = F.layer_norm(out, (self.head_dim,), eps=NORM_EPS)
            out = out if gain is None else out * gain
            out = out if bias is None else out + bias
        return out + x if self.residual else out

    def __call__(
        self, weights: Sequence[Tensor], x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """M(x; weights): x (…, rows, input_dim), weights (…, out, in), to (…, rows, head_dim); gain and bias
        broadcast against the answer."""
        return self.finish(self.features(weights, x)[1][-1], x, gain, bias)

    def slope_square(self, features: Tensor, gain: Tensor | None) -> Tensor:
        """ρ² = (max|gain| · rsqrt(var f + ε))², the squared slope of the norm; f (…, rows, head_dim) to (…,
        rows)."""
        if not self.norm:
            return features.new_ones(features.shape[:-1])
        square = 1 / (features.var(-1, correction=0) + NORM_EPS)
        return square if gain is None else square * gain.abs().amax(-1).square()
