"""One call's worth of checked, promoted inputs, as every backend receives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.memory.inner import InnerProblem
from titans.memory.state import MemoryState


@dataclass(frozen=True)
class ScanProblem:
    """The arguments of `memory_scan`, which describes them; as backends receive them, all floating tensors
    are in the compute dtype. Inputs of the objective follow the values in `values`."""

    inner: InnerProblem
    queries: Tensor
    keys: Tensor
    values: Tensor
    forget: Tensor
    momentum: Tensor
    step_size: Tensor
    state: MemoryState
    chunk_size: int
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    mask: Tensor | None
    reset: Tensor | None
    initial: Sequence[Tensor] | None
    initial_momentum: Sequence[Tensor] | None
    initial_extra: Sequence[Tensor] | None
    base: Sequence[Tensor] | None
    read_anchor: bool

    @property
    def gain(self) -> Tensor | None:
        """The norm's weight as it broadcasts against tokens, (heads, 1, head_dim)."""
        return None if self.norm_weight is None else self.norm_weight.unsqueeze(1)

    @property
    def bias(self) -> Tensor | None:
        """The norm's bias as it broadcasts against tokens, (heads, 1, head_dim)."""
        return None if self.norm_bias is None else self.norm_bias.unsqueeze(1)

    def promoted(self) -> ScanProblem:
        """The same with every floating tensor in promote_types(dtype, float32)."""
        dtype = compute_dtype(self.queries, self.keys, self.values, *self.state.weights)

        def raised(x: Tensor) -> Tensor:
            return x.to(dtype)

        def optional(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        def layers(tensors: Sequence[Tensor] | None) -> tuple[Tensor, ...] | None:
            return None if tensors is None else tuple(map(raised, tensors))

        return replace(
            self,
            queries=raised(self.queries),
            keys=raised(self.keys),
            values=raised(self.values),
            forget=raised(self.forget),
            momentum=raised(self.momentum),
            step_size=raised(self.step_size),
            state=self.state.map(raised, self.state.position),
            norm_weight=optional(self.norm_weight),
            norm_bias=optional(self.norm_bias),
            initial=layers(self.initial),
            initial_momentum=layers(self.initial_momentum),
            initial_extra=layers(self.initial_extra),
            base=layers(self.base),
        )

    @property
    def needs_grad(self) -> bool:
        """Whether autograd has to know of this scan."""
        if not torch.is_grad_enabled():
            return False
        slow = (
            self.norm_weight,
            self.norm_bias,
            self.initial,
            self.initial_momentum,
            self.initial_extra,
            self.base,
        )
        tokens = (self.queries, self.keys, self.values, self.forget, self.momentum, self.step_size)
        leaves = pytree.tree_leaves((tokens, self.state, slow))
        return any(x is not None and x.requires_grad for x in leaves)

    @property
    def forgets_by_row(self) -> bool:
        """Whether there is a forget gate for each row of the weights, and not one for each layer."""
        return self.forget.shape[-1] != self.inner.network.depth

    @property
    def forget_sizes(self) -> list[int]:
        """How many forget gates each layer has."""
        shapes = self.inner.network.weight_shapes
        return [out if self.forgets_by_row else 1 for out, _ in shapes]

    def no_reads(self) -> Tensor:
        """(batch, time, heads, head_dim) of zeros."""
        return self.values.new_zeros(*self.values.shape[:-1], self.inner.network.head_dim)

    def fresh_state(self) -> MemoryState:
        """The state in which a reset leaves a row, for every row."""
        assert self.initial is not None
        batch = self.keys.shape[0]

        def each(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(x.expand(batch, *x.shape) for x in tensors)

        momentum = self.initial_momentum
        if momentum is None:
            momentum = tuple(torch.zeros_like(w) for w in self.initial)
        extra = self.initial_extra
        if extra is None:
            extra = self.inner.rule.fresh_extra(tuple(self.initial))
        position = torch.zeros_like(self.state.position)
        return MemoryState(each(self.initial), each(momentum), None, position, each(extra))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which a scan computes: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
