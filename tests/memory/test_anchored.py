"""Chunks that read the weights they began with: the oracle's answers and gradients, at linear cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings

from titans.memory import BACKENDS, MomentumRule, memory_read, memory_scan
from titans.memory.rules import end_coefficients

from ..tolerances import FLOAT64, assert_close
from .problems import Problem, assert_same, everything, make_problem
from .test_conformance import calls, stretches, tame


class Anchored(Problem):
    def scan(self, backend, state=None, cut=slice(None), **changes):
        return super().scan(backend, state, cut, read_anchor=True, **changes)


def anchored(**call):
    return Anchored(**vars(make_problem(**call)))


@settings(max_examples=15)
@given(call=calls, stretch=stretches)
def test_any_call(call, stretch):
    assume(call["head_dim"] > 1 or call["row_limit"] is None)
    problem = anchored(**call, **stretch)
    expected = everything(problem, "reference")
    assume(tame(expected))
    assert_same(everything(problem, "chunkwise"), expected, FLOAT64)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if "native" in name])
def test_every_backend_reads_the_anchor(backend):
    problem = anchored(time=13, mask="random", norm=False)
    try:
        found = everything(problem, backend)
    except ValueError as error:
        pytest.skip(str(error))
    assert_same(found, everything(problem, "reference"), FLOAT64)


@pytest.mark.parametrize("backend", ["reference", "chunkwise"])
def test_it_writes_as_ever_and_reads_what_stood_at_the_chunks_start(backend):
    problem = make_problem(time=14, chunk_size=4, position="same", seed=3, reset="random")
    _, written, surprise = problem.scan(backend)
    _, state, wonder = problem.scan(backend, read_anchor=True)
    for name in ("weights", "momentum", "anchor"):
        for a, b in zip(getattr(state, name), getattr(written, name), strict=True):
            assert_close(a, b, FLOAT64, name)
    assert_close(wonder, surprise, FLOAT64, "surprise")
    plain, state = make_problem(time=14, chunk_size=4), None
    for t in range(plain.time):
        known = plain.state if state is None else state
        queries = plain.leaves["queries"][:, t : t + 1]
        reads, state, _ = plain.scan(backend, known, slice(t, t + 1), read_anchor=True)
        if t % 4 == 0:
            expected = memory_read(plain.net, queries, known, **plain.slow)
            assert_close(reads, expected, FLOAT64, "read at a chunk's start")


@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_blocks_of_a_long_chunk_write_what_one_table_does(time):
    rng = torch.Generator().manual_seed(time)
    forget, momentum, step_size = (
        torch.rand(2, 3, time, generator=rng, dtype=torch.float64) * most for most in (0.05, 0.99, 1)
    )
    forget[0, 0, ::31], momentum[0, 1, ::29] = 1.0, 1.0
    forget[1, 0], momentum[1, 1] = 0.0, 0.0
    written = torch.rand(2, 3, time, generator=rng) < 0.8
    rule = MomentumRule()
    for flags in (None, written):
        whole = rule.coefficients(forget, momentum, step_size, flags)
        for name, value in end_coefficients(rule, forget, momentum, step_size, flags)._asdict().items():
            assert_close(value, getattr(whole, name), 1e-13, name)


def test_a_chunk_of_thousands_needs_no_table_of_their_square():
    net, largest = make_problem(head_dim=2, norm=False, depth=1).net, 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(found):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return found

    time = 2048
    tokens = [0.1 * torch.randn(1, time, 1, 2) for _ in range(3)]
    gates = [0.01 * torch.rand(1, time, 1, 1) for _ in range(3)]
    state = make_problem(batch=1, heads=1, head_dim=2, norm=False, depth=1).state
    with Sizes():
        memory_scan(net, *tokens, *gates, state, time, read_anchor=True, backend="chunkwise")
    assert largest <= 65 * 65 * time // 64 < time**2 / 20
