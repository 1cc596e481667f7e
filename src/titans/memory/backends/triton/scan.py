"""What the kernels of the scan are launched with: slots for the states, the tape, and autograd's part.

Imports triton, so it is imported where a scan runs and not before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory.backends.triton.backward import backward_kernel
from titans.memory.backends.triton.constants import inner_constants
from titans.memory.backends.triton.forward import forward_kernel
from titans.memory.backends.triton.resident import resident_kernel
from titans.memory.chunkwise.groups import (
    Marks,
    Slow,
    Tokens,
    coefficients_of,
    refuse_second_derivatives,
)
from titans.memory.inner import InnerProblem
from titans.memory.network import MemoryNetwork
from titans.memory.precision import autocast_device
from titans.memory.state import MemoryState, Weights

# Bytes of states that a backward may keep; beyond, it keeps one in a group of chunks and recomputes the rest.
KEPT_BYTES = 2**31
# Hidden units at a time, at most. See `block_of`.
WIDEST_BLOCK = 64
# Weights of a matrix that stays in registers. Two of them and their momentum fill half of a processor's.
RESIDENT_SIZE = 64 * 128
# Tokens · head_dim of a chunk that leaves room for more hidden units. See `forward_tile`.
SMALL_SIZE = 32 * 64
_WARPS = 8
_PRECISIONS = {"highest": "tf32x3", "high": "tf32", "medium": "bf16"}


class _Marks(NamedTuple):
    """Of every chunk and row, (chunks, rows): whether it begins afresh, whether it ends complete, and the
    slot where its anchor lies: 0 for the one that was given, followed by the states before each chunk."""

    fresh: Tensor
    complete: Tensor
    slot: Tensor

    def of(self, chunks: slice) -> _Marks:
        """Of some chunks, whose given anchor is that of the first."""
        slot = (self.slot[chunks] - chunks.start).clamp_min(0)
        return _Marks(self.fresh[chunks], self.complete[chunks], slot)


def scan(
    inner: InnerProblem, tokens: Tokens, marks: Marks, slow: Slow, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    """Laid-out chunks, as `groups.scan_chunks` has them."""
    chunks, rows, width, _ = tokens.keys.shape
    # Tensor cores take 16 tokens at least. Slots that no token fills are written nothing.
    missing = max(16, 1 << (width - 1).bit_length()) - width
    if missing:
        filled = marks.filled
        if filled is None:
            filled = torch.ones(chunks, rows, width, dtype=torch.bool, device=tokens.keys.device)
        marks = marks._replace(filled=F.pad(filled, (0, missing)))
        tokens = Tokens(
            *(F.pad(x, (0, 0, 0, missing)) for x in tokens[:3]), *(F.pad(x, (0, missing)) for x in tokens[3:])
        )
    marked = None
    if marks.fresh is not None or marks.complete is not True or not state.is_shared:
        marked = _marked(tokens.keys, marks, state.is_shared)
    gain, bias, steepness = _affine(inner.network, slow, tokens.keys)
    fresh = () if slow.fresh is None else (*slow.fresh.weights, *slow.fresh.momentum)
    flat = (
        *tokens[:3], *coefficients_of(inner, tokens, marks), gain, bias, steepness, *slow.base,
        *fresh, *state.weights, *state.momentum,
        *(() if marked is None else state.anchor),
    )  # fmt: skip
    plan = _Plan(inner, marked, bool(slow.base), slow.fresh is not None)
    reads, surprise, *end = _Scan.apply(plan, *(x.contiguous() for x in flat))
    depth = inner.network.depth
    weights, momentum = tuple(end[:depth]), tuple(end[depth : 2 * depth])
    closed = marked is None or marks.complete is True
    after = MemoryState(weights, momentum, weights if closed else tuple(end[2 * depth :]))
    return reads[:, :, :width], surprise[:, :, :width], after


class Tile(NamedTuple):
    """Hidden units at a time, and the warps that a program has for them."""

    units: int
    warps: int


def forward_tile(chunk: int, dim: int, hidden: int, precision: str, on_hopper: bool) -> Tile:
    """16 hidden units for each warp, so that products take their tiles as they are loaded (`fragments.py`).

    As many as registers and shared memory have room for (lab notebook on these kernels, forward). Four of
    Hopper's warps multiply together, which takes 64.
    """
    if on_hopper:
        units = 64 if precision == "tf32x3" else 128
    else:
        room = {"tf32x3": SMALL_SIZE, "bf16": 4 * SMALL_SIZE}.get(precision, 2 * SMALL_SIZE)
        units = 64 if chunk * dim <= room else 32
    return Tile(min(units, hidden), 8 if min(units, hidden) > 64 else 4)


def block_of(chunk: int, hidden: int) -> int:
    """Hidden units at a time in the backward: more than tokens, and fewer than features where it can be.

    So that no product of tokens or weights is square or high (lab notebook on these kernels, spills).
    """
    return min(2 * chunk, WIDEST_BLOCK, hidden)


def fits_registers(chunk: int, dim: int, hidden: int, precision: str) -> bool:
    """Whether weights and momentum do, next to the products' operands (lab notebook, registers)."""
    return chunk == 16 and dim <= 64 and dim * hidden <= RESIDENT_SIZE and precision != "tf32x3"


def _precision(device: torch.device) -> str:
    """Products of float32 are as exact as the user has asked of PyTorch's own."""
    return "ieee" if device.type == "cpu" else _PRECISIONS[torch.get_float32_matmul_precision()]


def _is_hopper(device: torch.device) -> bool:
    """Whether four warps together can multiply. The interpreter does as such a device would."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] == 9


def _marked(keys: Tensor, marks: Marks, anchored: bool) -> _Marks:
    chunks, rows = keys.shape[:2]
    fresh = marks.fresh
    if fresh is None:
        fresh = torch.zeros(chunks, rows, dtype=torch.bool, device=keys.device)
    complete = marks.complete
    if not isinstance(complete, Tensor):
        complete = torch.full((chunks, rows), complete, dtype=torch.bool, device=keys.device)
    own = fresh | F.pad(complete[:-1], (0, 0, 1, 0), value=anchored)
    order = torch.arange(1, chunks + 1, device=keys.device)[:, None]
    slot = torch.where(own, order, 0).cummax(0).values
    return _Marks(
        fresh.to(torch.uint8).contiguous(), complete.to(torch.uint8).contiguous(), slot.to(torch.int32)
    )


def _affine(net: MemoryNetwork, slow: Slow, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gain and bias, (rows, head_dim), and the square of the largest gain, (rows,)."""
    shape = (keys.shape[1], net.head_dim)
    gain = keys.new_ones(shape) if slow.gain is None else slow.gain.reshape(shape)
    bias = keys.new_zeros(shape) if slow.bias is None else slow.bias.reshape(shape)
    return gain, bias, gain.abs().amax(-1).square()


class _Plan(NamedTuple):
    """What is not a tensor with a gradient, and how the flat tensors are put back together."""

    inner: InnerProblem
    marks: _Marks | None
    has_base: bool
    has_initial: bool

    @property
    def hidden(self) -> int:
        return self.inner.network.weight_shapes[-1][1]

    def options(self, keys: Tensor) -> dict[str, Any]:
        return dict(
            **inner_constants(self.inner),
            CHUNK=keys.shape[2],
            HAS_BASE=self.has_base,
            PRECISION=_precision(keys.device),
            num_stages=1,
        )

    def blocks(self, tile: Tile) -> dict[str, Any]:
        """Options of the kernels that go over the hidden units by blocks."""
        return dict(BLOCK=tile.units, num_warps=tile.warps, MARKED=self.marks is not None)

    def is_resident(self, keys: Tensor) -> bool:
        """Whether weights and momentum stay in registers from chunk to chunk."""
        return (
            self.marks is None
            and fits_registers(
                keys.shape[2], self.inner.network.head_dim, self.hidden, _precision(keys.device)
            )
            # Without its products of whole groups of warps the compiler spills thousands of numbers.
            and _is_hopper(keys.device)
        )

    def parts(self, flat: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        """Tokens and coefficients; gain, bias and steepness; and per layer base, initial weights and
        momentum, and the state: weights, momentum, anchor. What is not there is an empty list."""
        flat, depth = list(flat), self.inner.network.depth
        layered = iter([flat[i : i + depth] for i in range(14, len(flat), depth)])
        there = (self.has_base, self.has_initial, self.has_initial, True, True, self.marks is not None)
        return flat[:11], flat[11:14], [next(layered) if is_there else [] for is_there in there]


def _pair(layers: Sequence[Tensor], unused: Tensor) -> list[Tensor]:
    """What a kernel calls up and down."""
    return [*([unused] * (2 - len(layers))), *layers]


class _Kept(NamedTuple):
    """What a forward leaves for the backward. weights, momentum: slots. tape: what else it computed."""

    weights: list[Tensor]
    momentum: list[Tensor]
    tape: list[Tensor]


def _run(
    plan: _Plan, inputs: Sequence[Tensor], affine: Sequence[Tensor], layered: Sequence[Sequence[Tensor]],
    group: int,
) -> tuple[Tensor, Tensor, list[Weights], _Kept]:  # fmt: skip
    """All chunks from a state: reads, surprise, and weights, momentum and anchor after them.

    group: 1 to keep the tape; more to keep the state before every `group` chunks; 0 to keep nothing.
    """
    marks, keys, values = plan.marks, inputs[1], inputs[2]
    base, initial, initial_momentum, weights, momentum, anchor = layered
    chunks, rows, chunk, dim = values.shape
    hidden, taped, first = plan.hidden, group == 1, int(marks is not None)
    unused = keys.new_empty(1)

    def slots(start: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        made = [x.new_empty(first + (chunks + 1 if taped else 1), *x.shape) for x in start]
        for into, x in zip(made, start, strict=True):
            into[first] = x
        for into, x in zip(made, given, strict=False):
            into[0] = x
        return made

    weight_slots, moment_slots = slots(weights, anchor), slots(momentum, ())
    reads, surprise = torch.empty_like(values), keys.new_empty(chunks, rows, chunk)
    shapes = [
        (chunk, hidden), (chunk, hidden), (chunk, dim), (chunk, dim), (chunk, chunk), (chunk,), (), (hidden,),
        (dim,),
    ]  # fmt: skip
    tape = [keys.new_empty(chunks if taped else 1, rows, *shape) for shape in shapes]
    kept: list[list[Tensor]] = [[], [], []]
    if group > 1:
        parts = (weights, momentum, anchor)
        kept = [[x.new_empty(-(-chunks // group), *x.shape) for x in part] for part in parts]
    options = plan.options(keys) | dict(TAPE=taped, KEEP=group > 1)
    slotted = (*_pair(weight_slots, unused), *_pair(moment_slots, unused))
    kept_pairs = [_pair(part, unused) for part in kept]
    if plan.is_resident(keys):
        launch: Any = resident_kernel[(rows,)]
        launch(
            *inputs, *affine, *_pair(base, unused), *slotted, reads, surprise,
            *kept_pairs[0], *kept_pairs[1], *tape,
            chunks, rows, max(group, 1), **options, num_warps=_WARPS,
        )  # fmt: skip
    else:
        tile = forward_tile(chunk, dim, hidden, _precision(keys.device), _is_hopper(keys.device))
        with torch.autocast(autocast_device(keys), enabled=False):
            overlaps = inputs[0] @ keys.mT
        launch_wide: Any = forward_kernel[(rows,)]
        launch_wide(
            *inputs, overlaps, *affine, *_pair(base, unused), *([unused] * 3 if marks is None else marks),
            *_pair(initial, unused), *_pair(initial_momentum, unused), *slotted, reads, surprise,
            *kept_pairs[0], *kept_pairs[1], *kept_pairs[2], *tape,
            chunks, rows, hidden, max(group, 1), **options, **plan.blocks(tile),
        )  # fmt: skip
    end: list[Weights] = [tuple(x[-1] for x in weight_slots), tuple(x[-1] for x in moment_slots)]
    if marks is not None:
        at = torch.where(marks.complete[-1] != 0, chunks + 1, marks.slot[-1]) if taped else None
        every = torch.arange(rows, device=keys.device)
        end.append(tuple(x[0] if at is None else x[at.long(), every] for x in weight_slots))
    if group > 1:
        return reads, surprise, end, _Kept(kept[0], kept[1], kept[2])
    return reads, surprise, end, _Kept(weight_slots, moment_slots, tape)


class _Scan(torch.autograd.Function):
    """The flat tensors of a `_Plan` to reads, surprise, weights, momentum, and the anchor if it has marks."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *flat: Tensor) -> tuple[Tensor, ...]:
        inputs, affine, layered = plan.parts(flat)
        chunks = inputs[1].shape[0]
        ctx.plan, ctx.group = plan, 0
        if any(ctx.needs_input_grad):
            size = sum(x.nbytes for part in layered[3:5] for x in part)
            ctx.group = 1 if size * chunks <= KEPT_BYTES else max(math.isqrt(chunks - 1) + 1, 2)
        reads, surprise, end, kept = _run(plan, inputs, affine, layered, ctx.group)
        if ctx.group:
            ctx.sizes = [len(part) for part in kept]
            ctx.save_for_backward(*flat, *(x for part in kept for x in part))
        ctx.mark_non_differentiable(surprise)
        return reads, surprise, *(x for part in end for x in part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("triton")
        plan: _Plan = ctx.plan
        count = len(ctx.needs_input_grad) - 1
        saved = list(ctx.saved_tensors)
        inputs, affine, layered = plan.parts(saved[:count])
        rest = iter(saved[count:])
        kept = _Kept(*([next(rest) for _ in range(size)] for size in ctx.sizes))
        base, initial, initial_momentum, weights, momentum, anchor = layered
        chunks, rows, chunk, dim = inputs[2].shape
        depth, hidden, marks = plan.inner.network.depth, plan.hidden, plan.marks
        unused = inputs[1].new_empty(1)

        # Written in place, by one group of chunks after the other.
        state = [x.clone(memory_format=torch.contiguous_format) for x in grads[2:]]
        by_weights, by_momentum, by_anchor = state[:depth], state[depth : 2 * depth], state[2 * depth :]
        if marks is not None:
            closed = (marks.complete[-1] != 0)[:, None, None]
            for into, found in zip(by_weights, by_anchor, strict=True):
                into += torch.where(closed, found, 0)
                found.masked_fill_(closed, 0)
        slow = [[torch.zeros_like(x) for x in part] for part in (base, initial, initial_momentum, affine)]
        by_base, by_initial, by_initial_momentum, by_affine = slow
        by_inputs = [torch.empty_like(x) for x in inputs]
        work = [inputs[1].new_empty(rows, chunk, width) for width in (hidden, hidden, hidden, 3 * dim)]
        grad_reads = grads[0].contiguous()
        size = chunks if ctx.group == 1 else ctx.group
        for begin in reversed(range(0, chunks, size)):
            part = slice(begin, min(begin + size, chunks))
            here = [x[part] for x in inputs]
            some = plan._replace(marks=None if marks is None else marks.of(part))
            left = kept
            if ctx.group > 1:
                start = [[x[begin // size] for x in one] for one in kept]
                left = _run(some, here, affine, [*layered[:3], *start], group=1)[-1]
            flags = [unused] * 2 if some.marks is None else [some.marks.fresh, some.marks.slot]
            launch: Any = backward_kernel[(rows,)]
            launch(
                *here, *affine, *_pair(base, unused), *flags,
                *_pair(left.weights, unused), *_pair(left.momentum, unused), *left.tape, *work,
                grad_reads[part], *_pair(by_weights, unused), *_pair(by_momentum, unused),
                *_pair(by_anchor if marks is not None else by_weights, unused),
                *_pair(by_initial, unused), *_pair(by_initial_momentum, unused), *_pair(by_base, unused),
                *by_affine, *(x[part] for x in by_inputs),
                len(here[0]), rows, hidden, **some.options(inputs[1]),
                **some.blocks(Tile(block_of(chunk, hidden), _WARPS)),
            )  # fmt: skip
        return (
            None, *by_inputs, *by_affine, *by_base, *by_initial, *by_initial_momentum,
            *by_weights, *by_momentum, *by_anchor,
        )  # fmt: skip
