"""The memories that `memory-forms` compares, at equal state or equal operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HEADS, CHUNK_SIZE = 2, 16
# How many slow projections a feature map computes.
PROJECTIONS = {"identity": 0, "sin": 1, "product": 2, "swiglu": 2}


@dataclass(frozen=True)
class Arm:
    """A memory of one size.

    head_dim, depth, expansion: of a head's network. activation: of its hidden layer. features, feature_size:
    the feature map of keys and queries, and its width; None for head_dim.
    """

    head_dim: int
    depth: int = 1
    expansion: int = 1
    activation: str = "silu"
    features: str = "identity"
    feature_size: int | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of each fast matrix of a head."""
        widths = [self.feature_size or self.head_dim]
        widths += [self.expansion * self.head_dim] * (self.depth - 1) + [self.head_dim]
        return [(widths[i + 1], widths[i]) for i in range(self.depth)]

    @property
    def numbers(self) -> int:
        """Fast weights of a head. Its momentum has as many."""
        return sum(out * width for out, width in self.shapes)

    @property
    def operations(self) -> int:
        """Multiply-adds of a head for each token, in the chunked form.

        A fast matrix of o × i numbers takes 5 o i: one product for the key at the chunk's start, two for the
        query (with weights and with momentum), and two for the updates of weights and momentum. It takes
        c (i + o) more for the products inside a chunk of c tokens. Every layer but the first takes o i more
        for the backward pass. The feature map's projections apply to key and query each.
        """
        every = sum(5 * o * i + CHUNK_SIZE * (o + i) for o, i in self.shapes)
        back = sum(o * i for o, i in self.shapes[1:])
        mapped = 2 * PROJECTIONS[self.features] * (self.feature_size or 0) * self.head_dim
        return every + back + mapped

    def config(self, start: str, form: str = "stable") -> dict[str, Any]:
        """Fields of `TitansConfig`."""
        memory: dict[str, Any] = {"form": {"name": form, "activation": self.activation}, "start": start}
        if self.features != "identity":
            memory |= {"features": self.features, "feature_size": self.feature_size}
        return dict(
            num_attention_heads=HEADS,
            head_dim=self.head_dim,
            chunk_size=CHUNK_SIZE,
            memory_depth=self.depth,
            memory_expansion=self.expansion,
            memory=memory,
        )


def _features(name: str, twice: int) -> dict[str, Arm]:
    """twice: the feature size with which a map has as many operations as sin features at 4k."""
    return {
        "4k": Arm(32, features=name, feature_size=128),
        "1k": Arm(16, features=name, feature_size=64),
        "equal operations": Arm(32, features=name, feature_size=twice),
    }


def _deep(activation: str) -> dict[str, Arm]:
    sizes = {"4k": 32, "1k": 16, "equal operations": 36, "equal heads": 64}
    return {size: Arm(head_dim, 2, 2, activation) for size, head_dim in sizes.items()}


# "deep" was the default of `NeuralMemory` when this was planned. Equal operations: as many as sin features at
# 4k. Equal heads: as wide as linear at 4k, with four times its state.
ARMS: dict[str, dict[str, Arm]] = {
    "linear": {"4k": Arm(64), "1k": Arm(32), "equal operations": Arm(76)},
    "sin features": _features("sin", 128),
    "deep": _deep("silu"),
    "product features": _features("product", 100),
    "deep sin": _deep("sin"),
    "swiglu features": _features("swiglu", 100),
}
