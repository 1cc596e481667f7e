"""The fast path in plain torch: rows cut into chunks, chunks in sequence, each a handful of matrix products.

Read `chunk.py` for the algorithm and `groups.py` for what training keeps; here rows are laid out for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from titans.memory.chunkwise.anchored import scan_anchored_chunks
from titans.memory.chunkwise.columns import Columns, Run, cut
from titans.memory.chunkwise.delta import block_width, is_delta_rule, scan_delta_blocks
from titans.memory.chunkwise.formed import scan_formed_chunks
from titans.memory.chunkwise.groups import Marks, Slow, Tokens, scan_chunks
from titans.memory.inner import InnerProblem
from titans.memory.problem import ScanProblem
from titans.memory.state import MemoryState
from titans.state import where_rows

# `groups.scan_chunks` or what computes the same.
ScanChunks = Callable[[InnerProblem, Tokens, Marks, Slow, MemoryState], tuple[Tensor, Tensor, MemoryState]]


def _scan_columns(
    problem: ScanProblem, run: ScanChunks, tokens: Tokens, marks: Marks, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    """Run laid-out chunks; returns reads (chunks, rows, width, head_dim), surprise, and the state, at the
    position of before."""
    batch, _, heads, _ = problem.keys.shape
    rows = batch * heads

    def per_row(x: Tensor) -> Tensor:
        return x.expand(batch, *x.shape).reshape(rows, *x.shape[1:])

    def flat(state: MemoryState) -> MemoryState:
        return state.map(lambda x: x.reshape(rows, *x.shape[2:]))

    fresh = None if marks.fresh is None else flat(problem.fresh_state())
    gain, bias = (None if x is None else per_row(x) for x in (problem.gain, problem.bias))
    slow = Slow(gain, bias, fresh, tuple(map(per_row, problem.base or ())))
    reads, surprise, after = run(problem.inner, tokens, marks, slow, flat(state))
    return reads, surprise, after.map(lambda x: x.view(batch, heads, *x.shape[1:]), state.position)


def _by_chunk(x: Tensor, num_chunks: int) -> Tensor:
    """(batch, chunks · width, heads, features) to (chunks, batch · heads, width, features)."""
    batch, time, heads, features = x.shape
    x = x.view(batch, num_chunks, time // num_chunks, heads, features)
    return x.permute(1, 0, 3, 2, 4).reshape(num_chunks, batch * heads, time // num_chunks, features)


def _by_time(x: Tensor, batch: int) -> Tensor:
    """The inverse of `_by_chunk`."""
    num_chunks, rows, width, features = x.shape
    x = x.view(num_chunks, batch, rows // batch, width, features)
    return x.permute(1, 0, 3, 2, 4).reshape(batch, num_chunks * width, rows // batch, features)


def _tokens(problem: ScanProblem, select: Callable[[Tensor], Tensor], num_chunks: int) -> Tokens:
    vectors = (problem.queries, problem.keys, problem.values)
    gates = (problem.forget, problem.momentum, problem.step_size)
    return Tokens(
        *(_by_chunk(select(x), num_chunks) for x in vectors),
        *(_by_chunk(select(x), num_chunks).permute(0, 3, 1, 2).contiguous() for x in gates),
    )


def _scan_aligned(
    problem: ScanProblem, run: ScanChunks, parts: list[Run]
) -> tuple[Tensor, MemoryState, Tensor]:
    """Every token real and every row at the same place of its chunk."""
    (batch, time, _, _), state = problem.keys.shape, problem.state
    reads, surprises = [], []
    for part in parts:
        tokens = _tokens(problem, lambda x, p=part: x[:, p.begin : p.end].contiguous(), part.count)
        marks = Marks(None, None, part.complete)
        read, surprise, state = _scan_columns(problem, run, tokens, marks, state)
        reads.append(_by_time(read, batch))
        surprises.append(_by_time(surprise.unsqueeze(-1), batch).squeeze(-1))
    state = replace(state, position=problem.state.position + time)
    return torch.cat(reads, 1), state, torch.cat(surprises, 1)


def _scan_ragged(
    problem: ScanProblem, run: ScanChunks, columns: Columns
) -> tuple[Tensor, MemoryState, Tensor]:
    """Rows at different phases, masked tokens, resets: gather into columns, scan, put back."""
    batch, time, heads, _ = problem.keys.shape
    _, num_chunks, width = columns.filled.shape
    state = problem.state
    reads, surprises = problem.no_reads(), problem.keys.new_zeros(batch, time, heads)
    if num_chunks:
        filled = columns.filled.flatten(1)[..., None, None]

        def gather(x: Tensor) -> Tensor:
            # Masked inputs may hold NaN, and an empty slot points at some token: neither may get through.
            return torch.where(filled, columns.gather(x), 0)

        def per_row(x: Tensor) -> Tensor:
            return x.transpose(0, 1).repeat_interleave(heads, 1)

        marks = Marks(
            per_row(columns.filled),
            per_row(columns.fresh) if problem.reset is not None else None,
            per_row(columns.complete),
        )
        read, surprise, state = _scan_columns(
            problem, run, _tokens(problem, gather, num_chunks), marks, state
        )
        reads = columns.put_back(_by_time(read, batch))
        surprises = columns.put_back(_by_time(surprise.unsqueeze(-1), batch)).squeeze(-1)
    if problem.reset is not None:
        state = where_rows(columns.fresh_after, problem.fresh_state(), state)
    return reads, replace(state, position=columns.position), surprises


def chunkwise_scan(problem: ScanProblem) -> tuple[Tensor, MemoryState, Tensor]:
    """Reads (batch, time, heads, head_dim), new state, and surprise (batch, time, heads) of every token."""
    if is_delta_rule(problem):
        position = problem.state.position
        if problem.mask is None and problem.reset is None:
            # Unlike a chunk, a block may begin anywhere.
            position = torch.zeros_like(position)
        run = functools.partial(scan_delta_blocks, problem.read_anchor)
        return _cut_and_scan(problem, run, position, block_width(problem.inner.network))
    inner = problem.inner
    general = (
        problem.forgets_by_row or inner.rule.maps_weights or inner.rule.window > 1 or inner.network.gated
    )
    return scan_laid_out(problem, scan_formed_chunks if general else scan_chunks)


def scan_laid_out(problem: ScanProblem, run: ScanChunks) -> tuple[Tensor, MemoryState, Tensor]:
    """Cut the rows into chunks, have these run, and put the answers back where the tokens were.

    Whatever `run` is, chunks that read their anchor are run by `scan_anchored_chunks`.
    """
    run = scan_anchored_chunks if problem.read_anchor else run
    return _cut_and_scan(problem, run, problem.state.position, problem.chunk_size)


def _cut_and_scan(
    problem: ScanProblem, run: ScanChunks, position: Tensor, size: int
) -> tuple[Tensor, MemoryState, Tensor]:
    batch, time, heads, _ = problem.keys.shape
    if time == 0:
        return problem.no_reads(), problem.state, problem.keys.new_zeros(batch, 0, heads)
    parts = cut(position, time, size, problem.mask, problem.reset)
    if isinstance(parts, Columns):
        return _scan_ragged(problem, run, parts)
    return _scan_aligned(problem, run, parts)
