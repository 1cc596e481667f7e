"""Hostile input: streams and gates chosen to break a memory, and a memory put in their hands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.memory import InnerProblem, MemoryNetwork, UpdateRule
from titans.memory.objectives import num_inputs
from titans.nn import NeuralMemory
from titans.nn.memory.features import IDENTITY
from titans.nn.norm import shorten

# The paper's equations with the plain network: nothing that `NeuralMemory` adds for stability.
PAPER_FORM: dict[str, Any] = dict(name="paper", norm=False, residual=False)


@dataclass(frozen=True)
class StressedMemory:
    """One head of a `NeuralMemory`, taken out of its layer and put in the hands of an enemy.

    Attributes:
        inner, chunk_size, max_momentum, max_step_size: as in the layer.
        initial: the fast weights of a memory that has read nothing, (1, out, in) for each layer.
        base: the weights on which the fast ones are offsets, if they are, (1, out, in) for the first layers.
        norm_weight: gain of the LayerNorm, (1, head_dim), or None.
        features: what maps keys (rows, time, 1, head_dim) to those that the network takes, (rows, time, 1,
            feature_size); None for a memory that takes its keys unchanged. Replaced by None in a memory that
            has such a map, it puts the features themselves in the enemy's hands.
    """

    inner: InnerProblem
    chunk_size: int
    max_momentum: float
    max_step_size: float
    initial: tuple[Tensor, ...]
    base: tuple[Tensor, ...] | None
    norm_weight: Tensor | None
    features: Callable[[Tensor], Tensor] | None = None

    @property
    def network(self) -> MemoryNetwork:
        return self.inner.network

    @property
    def key_dim(self) -> int:
        """The width of the keys in the enemy's hands."""
        return self.network.input_dim if self.features is None else self.network.head_dim

    def objective_inputs(self, keys: Tensor) -> Tensor | None:
        """What else the objective takes of each token, if anything: what an untrained layer gives it, as
        (rows, time, 1, num_inputs)."""
        if not (count := num_inputs(self.inner.objective)):
            return None
        return self.inner.objective.from_logits(keys.new_zeros(*keys.shape[:-1], count))  # type: ignore[attr-defined]

    def fast(self, rows: int) -> list[Tensor]:
        """`initial` for so many rows, (rows, 1, out, in) for each layer."""
        return [w.expand(rows, *w.shape).clone() for w in self.initial]


def stressed_memory(
    head_dim: int,
    depth: int,
    chunk_size: int,
    *,
    expansion: int = 2,
    features: str = IDENTITY,
    feature_size: int | None = None,
    objective: str | Mapping[str, Any] = "squared_error",
    rule: UpdateRule | str | Mapping[str, Any] | None = None,
    last: float = 0.0,
    gain: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **form: Any,
) -> StressedMemory:
    """The memory of a `NeuralMemory` of these sizes.

    Args:
        head_dim, depth, chunk_size, expansion, features, feature_size, objective, rule: of `NeuralMemory`.
        form: fields of `MemoryForm` that differ from those of "stable", or of the form with this `name`.
        last: the last layer of a base is zero at first but is learned; draw it with this many times the usual
            standard deviation, fan_in^-½.
        gain: of the LayerNorm, instead of the layer's initial one.
        seed: of the weights.
        dtype: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = head_dim, depth, expansion, chunk_size
        parts: dict[str, Any] = dict(objective=objective, rule=rule, form=form)
        layer = NeuralMemory(2, 1, *sizes, features=features, feature_size=feature_size, **parts).to(dtype)
        if layer.base is not None:
            nn.init.normal_(layer.initial_weights[-1], std=last * layer.base[-1].shape[-1] ** -0.5)
    norm_weight = None if layer.norm_weight is None else layer.norm_weight.detach()
    if norm_weight is not None and gain is not None:
        norm_weight = torch.full_like(norm_weight, gain)
    return StressedMemory(
        layer.inner,
        chunk_size,
        layer.form.max_momentum,
        layer.max_step_size,
        tuple(w[0].detach() for w in layer.initial_state(1).memory.weights),
        None if layer.base is None else tuple(w.detach() for w in layer.base),
        norm_weight,
        None if features == IDENTITY else layer.feature_map.requires_grad_(False),
    )


@dataclass(frozen=True)
class Cases:
    """Streams under gates, one to a row.

    keys: (rows, time, 1, key_dim). values: (rows, time, 1, head_dim). forget, momentum, step_size: (rows,
    time, 1, depth).
    """

    names: list[str]
    keys: Tensor
    values: Tensor
    forget: Tensor
    momentum: Tensor
    step_size: Tensor

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.forget, self.momentum, self.step_size

    def row(self, index: int) -> Cases:
        return Cases([self.names[index]], *(x[index : index + 1] for x in self.tokens))

    def repeated(self, tokens: int) -> Cases:
        """Every stream over and over, until it has that many tokens."""
        times = -(-tokens // self.keys.shape[1])
        return Cases(self.names, *(x.repeat(1, times, 1, 1)[:, :tokens] for x in self.tokens))


def hostile_streams(
    head_dim: int,
    tokens: int,
    chunk_size: int,
    generator: torch.Generator,
    periods: Sequence[int] = (),
    key_dim: int | None = None,
    of_features: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys (tokens, key_dim) of unit length, and values (tokens, head_dim), by name.

    What is written again and again, with answers that change in time with the chunks, resonates with a step
    that is too long; values go through `shorten` as in `NeuralMemory`.

    Args:
        periods: in tokens, in addition to the chunk's.
        key_dim: head_dim if not given.
        of_features: add what only memories of features meet: keys that resemble each other, which features
            are to distinguish, and keys shorter than 1.
    """
    key_dim = head_dim if key_dim is None else key_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def unit(*shape: int) -> Tensor:
        return F.normalize(normal(*shape), dim=-1)

    def pick(pairs: int) -> Tensor:
        return torch.randint(pairs, (tokens,), generator=generator)

    first = unit(key_dim)
    second = normal(key_dim)
    second = F.normalize(second - (second @ first) * first, dim=-1)
    close = F.normalize(first + 0.5 * second, dim=-1)
    value, other = 0.5 * normal(head_dim), 0.5 * normal(head_dim)
    always = first.expand(tokens, key_dim)
    time = torch.arange(tokens)

    def every(period: int, a: Tensor, b: Tensor) -> Tensor:
        return torch.where((time // period % 2 == 0)[:, None], a, b)

    streams = {
        "constant": (always, value.expand(tokens, head_dim)),
        "one key, random values": (always, 0.5 * normal(tokens, head_dim)),
        "random": (unit(tokens, key_dim), 0.5 * normal(tokens, head_dim)),
        "four keys, random values": (unit(4, key_dim)[pick(4)], 0.5 * normal(tokens, head_dim)),
    }
    pairs = pick(8)
    streams["eight pairs"] = (unit(8, key_dim)[pairs], 0.5 * normal(8, head_dim)[pairs])
    for period in sorted({1, chunk_size, max(1, 3 * chunk_size // 2), 2 * chunk_size, *periods}):
        streams |= {
            f"orthogonal keys, every {period}": (every(period, first, second), every(period, value, other)),
            f"value flips, every {period}": (always, every(period, value, -value)),
            f"close keys, flips, every {period}": (every(period, first, close), every(period, value, -value)),
        }
    for scale in (1e-4, 1e-2, 1e2, 1e4):
        for name in ("random", f"value flips, every {2 * chunk_size}"):
            keys, values = streams[name]
            streams[f"{name}, × {scale:g}"] = (keys, scale * values)
    if of_features:
        near = F.normalize(3 * first + unit(tokens, key_dim), dim=-1)
        drifting = F.normalize(first + 0.05 * normal(tokens, key_dim).cumsum(0), dim=-1)
        flips = every(2 * chunk_size, value, -value)
        lengths = torch.rand(tokens, 1, generator=generator, dtype=torch.float64)
        streams |= {
            "keys of cosine 0.9, random values": (near, 0.5 * normal(tokens, head_dim)),
            "keys of cosine 0.9, flips": (near, flips),
            "drifting key, flips": (drifting, flips),
            "lengths 0 to 1": (lengths * unit(tokens, key_dim), 0.5 * normal(tokens, head_dim)),
            "one key of lengths 0 to 1, flips": (lengths * always, flips),
            f"length 1 or 0.01, every {chunk_size}": (every(chunk_size, always, 0.01 * always), flips),
        }
    return {name: (keys, shorten(values, head_dim**0.5)) for name, (keys, values) in streams.items()}


def gate_schedules(
    tokens: int,
    depth: int,
    chunk_size: int,
    max_momentum: float,
    max_step_size: float,
    generator: torch.Generator,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Momentum and step size at their limits, (tokens, depth) each, by name."""

    def uniform() -> Tensor:
        return torch.rand(tokens, depth, generator=generator, dtype=torch.float64)

    full = torch.ones(tokens, depth, dtype=torch.float64)
    even = (torch.arange(tokens) // chunk_size % 2 == 0)[:, None]
    coast = torch.where(even, 0.0, max_momentum * full)
    return {
        "all at max": (max_momentum * full, max_step_size * full),
        "no momentum": (0 * full, max_step_size * full),
        "write, then coast": (coast, torch.where(even, max_step_size * full, 0.0)),
        "momentum every other chunk": (coast, max_step_size * full),
        "random": (max_momentum * uniform(), max_step_size * uniform()),
        "switching": (max_momentum * (uniform() < 0.5), max_step_size * (uniform() < 0.5)),
    }


def forget_schedules(tokens: int, chunk_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Forgetting, (tokens,) each, by name."""
    wipes = torch.rand(tokens, generator=generator) < 0.01
    return {
        "0": torch.zeros(tokens, dtype=torch.float64),
        "0.001": torch.full((tokens,), 1e-3, dtype=torch.float64),
        "0.05": torch.full((tokens,), 0.05, dtype=torch.float64),
        "1 now and then": wipes.double(),
        # What was written before is gone when the chunk ends, and the chunk's writes assume that it is not.
        "1 as a chunk starts": (torch.arange(tokens) % chunk_size == 0).double(),
    }


def hostile_cases(
    memory: StressedMemory,
    tokens: int,
    *,
    gates: Sequence[tuple[str, str]] | None = None,
    periods: Sequence[int] = (),
    seed: int = 0,
) -> Cases:
    """Every stream under gates at the memory's limits.

    Args:
        memory: for its sizes and limits.
        tokens: length of the streams.
        gates: pairs of a name in `gate_schedules` and one in `forget_schedules`; every pair by default.
        periods: see `hostile_streams`.
        seed: of the streams and gates.
    """
    generator = torch.Generator().manual_seed(seed)
    net, chunk = memory.network, memory.chunk_size
    streams = hostile_streams(
        net.head_dim, tokens, chunk, generator, periods, memory.key_dim, net.key_dim is not None
    )
    schedules = gate_schedules(tokens, net.depth, chunk, memory.max_momentum, memory.max_step_size, generator)
    forget = forget_schedules(tokens, chunk, generator)
    chosen = [(s, *pair) for s in streams for pair in (gates or product(schedules, forget))]
    dtype = memory.initial[0].dtype

    def stack(rows: list[Tensor]) -> Tensor:
        return torch.stack(rows).unsqueeze(2).to(dtype)

    return Cases(
        [f"{s}; gates: {g}; forget: {f}" for s, g, f in chosen],
        stack([streams[s][0] for s, _, _ in chosen]),
        stack([streams[s][1] for s, _, _ in chosen]),
        stack([forget[f][:, None].expand(-1, net.depth) for _, _, f in chosen]),
        stack([schedules[g][0] for _, g, _ in chosen]),
        stack([schedules[g][1] for _, g, _ in chosen]),
    )
