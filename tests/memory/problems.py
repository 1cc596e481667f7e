"""Random calls of `memory_scan` of any shape, and everything that can be compared about their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from titans.memory import (
    BACKENDS,
    OBJECTIVES,
    UPDATE_RULES,
    InnerProblem,
    MemoryNetwork,
    MemoryState,
    memory_scan,
)
from titans.memory.backends.native import missing
from titans.memory.objectives import num_inputs
from titans.nn.memory.form import RULE_FIELDS

from ..tolerances import assert_close

VECTORS = ("queries", "keys", "values")
GATES = ("forget", "momentum", "step_size")
TOKENS = (*VECTORS, *GATES)
STATE = ("weights", "momentum", "anchor")
# For a backend that knows no narrower heads.
NARROWEST = 1
# Where a test asks for no numbers of its own.
HEADS, EXPANSION = 2, 4


def unavailable(backend: str) -> str | None:
    """Why a compiled backend does not run here: it needs a compiler, and in bfloat16 matrix tiles."""
    if backend.startswith("native") and (reason := missing()):
        return reason
    if backend == "native_bfloat16" and not torch.ops.titans_native.has_tiles():
        return "this processor has no matrix tiles"
    return None


def quick_backends() -> list[str]:
    """Compared with the reference in hundreds of examples; an interpreted kernel takes seconds for each."""
    return [name for name in BACKENDS if name not in ("reference", "triton") and not unavailable(name)]


@dataclass(frozen=True)
class Problem:
    """One call; `leaves` has its floating tensors by name: queries, state.weights.0, norm_bias, initial.1."""

    inner: InnerProblem
    leaves: dict[str, Tensor]
    position: Tensor
    chunk_size: int
    flags: dict[str, Tensor] = field(default_factory=dict)

    @property
    def net(self) -> MemoryNetwork:
        return self.inner.network

    @property
    def time(self) -> int:
        return self.leaves["queries"].shape[1]

    @property
    def mask(self) -> Tensor:
        return self.flags.get("mask", torch.ones(self.leaves["queries"].shape[:2], dtype=torch.bool))

    def layers(self, name: str) -> tuple[Tensor, ...]:
        return tuple(x for key, x in self.leaves.items() if key.rpartition(".")[0] == name)

    @property
    def state(self) -> MemoryState:
        weights, momentum, anchor = (self.layers(f"state.{part}") for part in STATE)
        return MemoryState(weights, momentum, anchor, self.position, self.layers("state.extra"))

    @property
    def slow(self) -> dict[str, Tensor]:
        """norm_weight and norm_bias, where there are any."""
        return {name: self.leaves[name] for name in ("norm_weight", "norm_bias") if name in self.leaves}

    def scan(
        self, backend: str, state: MemoryState | None = None, cut: slice = slice(None), **changes: object
    ) -> tuple[Tensor, MemoryState, Tensor]:
        """`memory_scan` of the tokens in `cut`, from `state` (default: the problem's own)."""
        fresh = {
            name: self.layers(name)
            for name in ("initial", "initial_momentum", "initial_extra", "base")
            if f"{name}.0" in self.leaves
        }
        if "objective_inputs" in self.leaves:
            fresh["objective_inputs"] = self.leaves["objective_inputs"][:, cut]
        arguments = dict(
            chunk_size=self.chunk_size,
            backend=backend,
            return_surprise=True,
            **self.slow,
            **fresh,
            **{name: flag[:, cut] for name, flag in self.flags.items()},
        )
        return memory_scan(
            self.inner,
            *(self.leaves[name][:, cut] for name in TOKENS),
            self.state if state is None else state,
            **(arguments | changes),
        )

    def refused(self, backend: str) -> str | None:
        """Why a backend does not run this, or None; nothing is run."""
        try:
            self.scan(backend, cut=slice(0, 0))
        except ValueError as error:
            if "refuses this call" not in str(error):
                raise
            return str(error)
        return None

    def require_grad(self) -> Problem:
        return self.change(**{name: x.detach().clone().requires_grad_() for name, x in self.leaves.items()})

    def change(self, **leaves: Tensor) -> Problem:
        return replace(self, leaves=self.leaves | leaves)

    def to(self, dtype: torch.dtype) -> Problem:
        return self.change(**{name: x.to(dtype) for name, x in self.leaves.items()})


def parts(state: MemoryState) -> dict[str, Tensor]:
    """The floating leaves of a state by name."""
    return {
        f"state.{part}.{layer}": leaf
        for part in (*STATE, "extra")
        for layer, leaf in enumerate(getattr(state, part))
    }


def answers(reads: Tensor, state: MemoryState, surprise: Tensor) -> dict[str, Tensor]:
    return {"reads": reads, "surprise": surprise} | parts(state)


def gradients(problem: Problem, reads: Tensor, state: MemoryState, seed: int = 0) -> dict[str, Tensor]:
    """Of every leaf, from random cotangents on the reads and on every leaf of the returned state."""
    rng = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for output in (reads, *parts(state).values()):
        cotangent = torch.randn(output.shape, generator=rng, dtype=torch.float64).to(output.dtype)
        total = total + (output * cotangent).sum()
    found = torch.autograd.grad(
        total, list(problem.leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {f"gradient of {name}": x for name, x in zip(problem.leaves, found, strict=True)}


def everything(problem: Problem, backend: str, cuts: Sequence[int] = ()) -> tuple[dict[str, Tensor], Tensor]:
    """Answers and gradients by name, and the position after, of a scan cut before the given tokens."""
    problem = problem.require_grad()
    state, reads, surprise = problem.state, [], []
    for begin, end in zip((0, *cuts), (*cuts, problem.time), strict=True):
        read, state, wonder = problem.scan(backend, state, slice(begin, end))
        reads.append(read)
        surprise.append(wonder)
    found = answers(torch.cat(reads, 1), state, torch.cat(surprise, 1))
    return found | gradients(problem, found["reads"], state), state.position


def assert_same(
    actual: tuple[dict[str, Tensor], Tensor], expected: tuple[dict[str, Tensor], Tensor], tolerance: float
) -> None:
    assert actual[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert_close(actual[0][name], value, tolerance, name)
    assert torch.equal(actual[1], expected[1]), f"position {actual[1]}, not {expected[1]}"


def make_problem(
    seed: int = 0,
    *,
    batch: int = 2,
    time: int = 17,
    heads: int | None = None,
    head_dim: int = 3,
    key_dim: int | None = None,
    chunk_size: int = 4,
    affine: bool = True,
    mask: str = "none",
    reset: str = "none",
    initial_momentum: bool = False,
    base: bool = False,
    position: str = "zero",
    closed_gates: bool = True,
    objective: object = "squared_error",
    rule: str = "momentum",
    by_row: bool = False,
    **options: object,
) -> Problem:
    """A random call in float64, its numbers of moderate size.

    Args:
        key_dim: width of keys and queries; where it is not that of the values there is no residual.
        mask: "none", "random" or "rows" (random, and the first row has no real token). Masked inputs are NaN.
        reset: "none", "random" (masked tokens too) or "last" (random, and at the last token of every row).
        base: the fast weights are offsets.
        position: "zero", "same" (one place inside a chunk for all rows) or "apart" (each row at its own).
        closed_gates: make some gates exactly 0 and some exactly 1.
        by_row: a forget gate for each row of the weights.
        objective, rule: what the registries make parts of; a rule takes what it knows of `options`.
        options: fields of `MemoryNetwork` and of the rule.
    """
    rng = torch.Generator().manual_seed(seed)
    head_dim, heads = max(head_dim, NARROWEST), HEADS if heads is None else heads
    options.setdefault("expansion", EXPANSION)
    known = [field.name for field in fields(UPDATE_RULES[rule])]
    parameters = {name: options.pop(name) for name in known if name in options}
    # What a rule registered from outside does not have.
    options = {name: value for name, value in options.items() if name not in RULE_FIELDS}
    if key_dim is not None and (key_dim := max(key_dim, NARROWEST)) != head_dim:
        options["residual"] = False
    net = MemoryNetwork(head_dim=head_dim, key_dim=key_dim, **options)  # type: ignore[arg-type]
    inner = InnerProblem(net, OBJECTIVES.make(objective), UPDATE_RULES.make({"name": rule, **parameters}))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng, dtype=torch.float64)

    def weights(*leading: int) -> list[Tensor]:
        return [normal(*leading, *shape) / shape[1] ** 0.5 for shape in net.weight_shapes]

    widths = zip(VECTORS, (net.input_dim, net.input_dim, head_dim), strict=True)
    leaves = {name: normal(batch, time, heads, width) for name, width in widths}
    for name in ("queries", "keys"):
        leaves[name] = torch.nn.functional.normalize(leaves[name], dim=-1, eps=0.1)
    # Small enough to keep the inner loop tame: 1e-10 is to measure the backend and not chaos.
    largest_step = 0.3 / chunk_size if inner.rule.normalize_step else 0.01 if net.norm else 0.03
    for name, highest in (("forget", 0.3), ("momentum", 0.9), ("step_size", largest_step)):
        gate, kind = highest * uniform(batch, time, heads, net.depth), uniform(batch, time, heads, net.depth)
        if closed_gates:
            gate = torch.where(kind < 0.1, 0.0, gate)
            gate = torch.where(kind > 0.95, 1.0, gate) if name != "step_size" else gate
        leaves[name] = gate
    if by_row:
        shape = batch, time, heads, sum(out for out, _ in net.weight_shapes)
        leaves["forget"] = 0.3 * torch.where(uniform(*shape) < 0.1, 0.0, uniform(*shape))
        leaves["forget"] = torch.where(uniform(*shape) > 0.95, 1.0, leaves["forget"])
    if count := num_inputs(inner.objective):
        leaves["objective_inputs"] = uniform(batch, time, heads, count)
    far = torch.randint(3 * chunk_size, (batch,), generator=rng)
    at = {"zero": far * 0, "same": far[:1].expand(batch) // 3, "apart": far}[position].clone()
    current, anchor = weights(batch, heads), weights(batch, heads)
    opened = (at % chunk_size == 0)[:, None, None, None]
    for layer in range(net.depth):
        leaves[f"state.weights.{layer}"] = current[layer]
        leaves[f"state.momentum.{layer}"] = 0.1 * normal(*current[layer].shape)
        leaves[f"state.anchor.{layer}"] = torch.where(opened, current[layer], anchor[layer])
    if net.norm and affine:
        leaves["norm_weight"] = 0.5 + 0.3 * normal(heads, head_dim)
        leaves["norm_bias"] = 0.3 * normal(heads, head_dim)

    shapes = inner.rule.extra_shapes(net.weight_shapes)
    leaves |= {f"state.extra.{i}": normal(batch, heads, *shape) for i, shape in enumerate(shapes)}
    if base:
        leaves |= {f"base.{layer}": 0.5 * x for layer, x in enumerate(weights(heads))}
    flags = {}
    if reset != "none":
        flags["reset"] = uniform(batch, time) < 0.15
        if reset == "last":
            flags["reset"][:, -1:] = True
        leaves |= {f"initial.{layer}": x for layer, x in enumerate(weights(heads))}
        if initial_momentum:
            leaves |= {f"initial_momentum.{layer}": 0.1 * x for layer, x in enumerate(weights(heads))}
            leaves |= {f"initial_extra.{i}": normal(heads, *shape) for i, shape in enumerate(shapes)}
    if mask != "none":
        flags["mask"] = uniform(batch, time) < 0.7
        if mask == "rows":
            flags["mask"][0] = False
        for name in TOKENS + ("objective_inputs",) * ("objective_inputs" in leaves):
            leaves[name] = torch.where(flags["mask"][..., None, None], leaves[name], torch.nan)
    return Problem(inner, leaves, at, chunk_size, flags)
