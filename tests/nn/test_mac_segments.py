"""Whole segments of MAC as one step: equal to the loop that reads them one by one, gradients included."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from titans.memory.backends.native import missing
from titans.nn import BlockContext
from titans.nn.blocks import BLOCKS, mac
from titans.nn.kernels import segment_reader, segments
from titans.state import expanded

from ..tolerances import assert_close
from .test_blocks import SETTINGS

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no compiled backend: {missing()}")

# The same products in another order, in float64.
SAME = 1e-10
SIZES = dict(hidden_size=12, head_dim=8, chunk_size=2, segment_length=6)
LIMITED = dict(objective="huber", form=dict(row_limit=0.8))
# Options of the block; how many tokens the two calls read.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "from the beginning": ({}, (0, 18)),
    "beginning and ending inside a segment": ({}, (4, 17)),
    "gates that see keys through a hidden layer": (dict(memory_options=dict(form="recall")), (6, 12)),
    "linear, no persistent tokens": (dict(memory_depth=1, num_persistent_tokens=0), (0, 12)),
    "many chunks, three layers, rows limited": (
        dict(segment_length=12, memory_depth=3, memory_options=LIMITED),
        (0, 24),
    ),
}


def block_of(**changes: Any) -> mac.MACBlock:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        block = BLOCKS["mac"](dataclasses.replace(SETTINGS, **{**SIZES, **changes})).double()
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read(block: mac.MACBlock, x: Tensor, calls: tuple[int, int], frozen: bool = False) -> list[Tensor]:
    """Outputs, and every tensor of the last state."""
    state, found = block.initial_state(x.shape[0]), []
    for part in x.split(calls, 1):
        y, state, _ = block(part, state, BlockContext(frozen=frozen))
        found.append(y)
    return [torch.cat(found, 1), *pytree.tree_leaves(expanded(state))]


# Tensors of one text have other strides.
@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_whole_segments_are_segments_one_by_one(
    case: str, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, calls = CASES[case]
    block, x = block_of(**changes), random(texts, sum(calls), SIZES["hidden_size"], seed=1).requires_grad_()
    steps: list[int] = []

    def count(*arguments: Any) -> segments.Found:
        steps.append(arguments[1].asked.shape[0])
        return read_segments(*arguments)

    read_segments = segments.read_segments
    monkeypatch.setattr(segments, "read_segments", count)
    monkeypatch.setattr(segment_reader, "_ROWS_AT_ONCE", 4)
    results = []
    for alone in (False, True):
        if alone:
            monkeypatch.setattr(mac, "sizes_of", lambda *arguments: None)
        found = read(block, x, calls)
        loss = sum((y * random(*y.shape, seed=n)).sum() for n, y in enumerate(found) if y.is_floating_point())
        grads = torch.autograd.grad(loss, [x, *block.parameters()], allow_unused=True)
        with torch.no_grad():
            results.append([found, grads, read(block, x, calls)])
    assert steps and len(steps) % 2 == 0, "no whole segments were read as one step"
    names = ["x", *(name for name, _ in block.named_parameters())]
    for mine, its in zip(results[0][0] + results[0][2], results[1][0] + results[1][2], strict=True):
        assert_close(mine.double().detach(), its.double().detach(), SAME, "outputs and states")
    for name, mine, its in zip(names, results[0][1], results[1][1], strict=True):
        assert (mine is None) == (its is None), name
        if mine is not None and mine.numel():
            assert_close(mine, its, SAME, f"gradient of {name}")


def test_gradients_pass_through_checkpointing() -> None:
    block, x = block_of(), random(1, 12, SIZES["hidden_size"]).requires_grad_()

    def output(x: Tensor) -> Tensor:
        return block(x, block.initial_state(1), BlockContext()).x

    plain, recomputed = (
        torch.autograd.grad(y.square().sum(), [x, *block.parameters()], allow_unused=True)
        for y in (output(x), checkpoint(output, x, use_reentrant=False))
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True) if a is not None)


def test_what_whole_segments_do_not_know_is_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, steps = random(1, 12, SIZES["hidden_size"]), []
    read_segments = segments.read_segments

    def count(*arguments: Any) -> segments.Found:
        steps.append(1)
        return read_segments(*arguments)

    monkeypatch.setattr(segments, "read_segments", count)

    def used(block: mac.MACBlock, **context: Any) -> bool:
        steps.clear()
        block(x, block.initial_state(1), BlockContext(**context))
        return bool(steps)

    block = block_of()
    assert used(block)
    assert used(block, frozen=True)
    assert not used(block, trace=True)
    heard: list[Tensor] = []
    handle = block.recall_output.register_forward_hook(lambda module, given, y: heard.append(y))
    assert not used(block) and heard
    handle.remove()
    block.memory.backend = "chunkwise"
    assert not used(block)
    assert not used(block_of(memory_options=dict(form="paper")))
    assert not used(block_of(chunk_size=4)), "segments that are no whole chunks"
