"""Feature maps φ, which a linear memory applies to its queries and keys.

A memory M(k) = W φ(k), with W fast and φ slow, is linear in W. The chunked form, the largest stable
step and the proof of stability of a linear memory hold unchanged, and W has one column for each feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from titans.memory.precision import autocast_device

# Added to ‖h‖² for each feature, so that a hidden vector near 0 stays short and its gradient bounded.
SOFTNESS = 0.01
# The widest and the narrowest bandwidth of "sin" at first lie this factor below and above the middle one.
BANDWIDTH, SPREAD = 2.0, math.sqrt(2)


class FeatureMap(nn.Module):
    """φ(x) = h / √(‖h‖² + 0.01 · feature_size), where a class defines h = `hidden(x)`.

    So ‖φ(x)‖ < 1 for any x. The stability of the memory depends on this.

    Args:
        num_heads: heads; each has its own features.
        head_dim: width of a query or key.
        feature_size: width of φ(x), the number of columns of the fast weights.
    """

    def __init__(self, num_heads: int, head_dim: int, feature_size: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.feature_size = num_heads, head_dim, feature_size

    def hidden(self, x: Tensor) -> Tensor:
        """h: x (heads, tokens, head_dim), in at least float32, to (heads, tokens, feature_size)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, time, heads, head_dim) to (batch, time, heads, feature_size), in at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(autocast_device(x), enabled=False):
            hidden = self.hidden(x.to(dtype).flatten(0, 1).transpose(0, 1))
            square = hidden.square().sum(-1, keepdim=True)
            features = hidden * torch.rsqrt(square + SOFTNESS * self.feature_size)
        return features.transpose(0, 1).unflatten(0, x.shape[:2])


class SinFeatures(FeatureMap):
    """h = sin(b U x): U (heads, feature_size, head_dim) and a bandwidth b for each head are learned.

    The larger b, the more the features of two different keys differ: the memory holds more pairs, and needs
    more exact queries. Heads start with different bandwidths around `BANDWIDTH`.

    Source: random features (Rahimi and Recht, 2007), here learned, normalised, and without the cosine.
    """

    def __init__(self, num_heads: int, head_dim: int, feature_size: int) -> None:
        super().__init__(num_heads, head_dim, feature_size)
        self.weight = nn.Parameter(torch.empty(num_heads, feature_size, head_dim))
        self.log_bandwidth = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        place = torch.linspace(-1, 1, self.num_heads) if self.num_heads > 1 else torch.zeros(1)
        self.log_bandwidth.copy_(math.log(BANDWIDTH) + math.log(SPREAD) * place)

    def hidden(self, x: Tensor) -> Tensor:
        bandwidth = self.log_bandwidth.to(x.dtype).exp()
        return torch.sin(x @ (self.weight.to(x.dtype) * bandwidth[:, None, None]).mT)


class _TwoProjections(FeatureMap):
    """`weight` stacks A and B, both (heads, feature_size, head_dim)."""

    def __init__(self, num_heads: int, head_dim: int, feature_size: int) -> None:
        super().__init__(num_heads, head_dim, feature_size)
        self.weight = nn.Parameter(torch.empty(num_heads, 2 * feature_size, head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (x @ self.weight.to(x.dtype).mT).chunk(2, -1)
        return first, second


class ProductFeatures(_TwoProjections):
    """h = (A x) ⊙ (B x): products of pairs of directions, a sketch of x xᵀ."""

    def hidden(self, x: Tensor) -> Tensor:
        first, second = self.projected(x)
        return first * second


class SwiGLUFeatures(_TwoProjections):
    """h = silu(A x) ⊙ (B x)."""

    def hidden(self, x: Tensor) -> Tensor:
        first, second = self.projected(x)
        return nn.functional.silu(first) * second


class PolynomialFeatures(_TwoProjections):
    """h = √m [a_0, a_1 x, a_2 (A x) ⊙ (B x) / √p], all polynomials of degree 2 in the numbers of x, sketched.

    On average over A and B, ⟨h(x), h(y)⟩ is m Σ a_i² (x · y)^i. The a_i of each head are learned and begin
    with a_i² = 1/i!, the first terms of exp(x · y). m is `feature_size`, of which p = m − 1 − head_dim are
    products.

    Source: the polynomial map of Atlas (arXiv 2505.23735), which does not say how many features it takes,
    with products of pairs of random directions (Kar and Karnick, 2012), here learned.
    """

    def __init__(self, num_heads: int, head_dim: int, feature_size: int) -> None:
        products = feature_size - 1 - head_dim
        if products < 1:
            raise ValueError(
                f"feature_size={feature_size} with features='polynomial': give at least head_dim + 2 = "
                f"{head_dim + 2}, for 1, the key and products"
            )
        FeatureMap.__init__(self, num_heads, head_dim, feature_size)
        self.weight = nn.Parameter(torch.empty(num_heads, 2 * products, head_dim))
        self.coefficients = nn.Parameter(torch.empty(num_heads, 3))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.coefficients.copy_(torch.tensor([1, 1, 0.5]).sqrt())

    def hidden(self, x: Tensor) -> Tensor:
        first, second = self.projected(x)
        constant, linear, square = self.coefficients.to(x.dtype)[..., None, None].unbind(1)
        ones = x.new_ones(*x.shape[:-1], 1)
        products = first * second / first.shape[-1] ** 0.5
        parts = (constant * ones, linear * x, square * products)
        return self.feature_size**0.5 * torch.cat(parts, -1)


class Identity(nn.Module):
    """φ(x) = x."""

    def __init__(self, num_heads: int, head_dim: int, feature_size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


IDENTITY = "identity"
# Name → class of a module made from (num_heads, head_dim, feature_size) that maps unit vectors (batch, time,
# heads, head_dim) to (batch, time, heads, feature_size), none longer than 1 and each token on its own.
FEATURES: dict[str, Callable[[int, int, int], nn.Module]] = {
    IDENTITY: Identity,
    "sin": SinFeatures,
    "product": ProductFeatures,
    "swiglu": SwiGLUFeatures,
    "polynomial": PolynomialFeatures,
}


def feature_width(features: str, feature_size: int | None, head_dim: int) -> int:
    """The width of φ(k); 4 · head_dim where feature_size is None."""
    if features == IDENTITY:
        return head_dim
    return 4 * head_dim if feature_size is None else feature_size


def refuses(features: str, feature_size: int | None, residual: bool) -> str | None:
    """The reason why a memory cannot have these features, or None if it can.

    residual: whether its network adds the key to the answer.
    """
    if not isinstance(features, str) or features not in FEATURES:
        return f"features={features!r}: choose one of {sorted(FEATURES)}, or import its file first"
    if features == IDENTITY:
        if feature_size is None:
            return None
        return (
            f"feature_size={feature_size!r} with features='identity': the features are the head_dim numbers "
            f"of the key; give None, or one of {sorted(FEATURES.keys() - {IDENTITY})} for features"
        )
    if feature_size is not None and (type(feature_size) is not int or feature_size < 1):
        return f"feature_size={feature_size!r}: give a whole number of at least 1, or None for 4 · head_dim"
    if residual:
        return (
            f"features={features!r} with residual=True in the form: a residual adds the key itself to the "
            "answer; give residual=False in the form, or features='identity'"
        )
    return None
