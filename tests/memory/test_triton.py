"""The Triton kernels under Triton's interpreter, in float64, for the shapes they know."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from titans.memory import BACKENDS, SquaredError
from titans.nn.conv import CausalConv

from ..tolerances import FLOAT64, assert_close
from .problems import assert_same, everything, make_problem, parts

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


class Mine(SquaredError):
    """An objective for which there is no kernel."""


# Keys as wide as values, wider and narrower; and a layer in between.
SHAPES = [
    dict(depth=1),
    dict(depth=1, key_dim=32),
    dict(depth=1, head_dim=32, key_dim=16),
    dict(depth=2, expansion=1),
    dict(depth=2, expansion=2),
]


def problem(**changes):
    known = dict(head_dim=16, depth=2, expansion=2, norm=False, chunk_size=16, heads=2, batch=1, time=48)
    return make_problem(**{**known, **changes})


def agree(tolerance: float = FLOAT64, **changes) -> None:
    call = problem(**changes)
    assert_same(everything(call, "triton"), everything(call, "reference"), tolerance)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**20),
    heads=st.sampled_from([1, 1, 2]),
    time=st.integers(1, 44),
    shape=st.sampled_from(SHAPES),
    norm=st.sampled_from([dict(norm=False), dict(norm=True), dict(norm=True, affine=False)]),
    activation=st.sampled_from(["gelu", "silu", "sin"]),
    residual=st.booleans(),
    normalize_step=st.booleans(),
    objective=st.sampled_from(["squared_error", {"name": "huber", "delta": 0.5}, {"name": "lp", "p": 2.5}]),
    row_limit=st.sampled_from([None, 0.7]),
    length_floor=st.sampled_from([0.0, 0.9]),
    base=st.booleans(),
    chunk_size=st.sampled_from([5, 16, 16, 20]),
    position=st.sampled_from(["zero", "same", "apart"]),
    mask=st.sampled_from(["none", "none", "random", "rows"]),
    reset=st.sampled_from(["none", "none", "random", "last"]),
    initial_momentum=st.booleans(),
)
def test_any_call(shape, norm, **call) -> None:
    agree(**call, **shape, **norm)


# What the search may miss: features of a key, in registers.
@example(
    resident=True,
    heads=2,
    seed=0,
    time=32,
    shape=dict(depth=1, key_dim=32),
    norm=dict(norm=True),
    activation="sin",
    residual=False,
    normalize_step=True,
    objective="squared_error",
    row_limit=0.7,
    base=True,
)
@settings(max_examples=9)
@given(
    resident=st.sampled_from([True, True, False]),
    heads=st.sampled_from([1, 1, 2]),
    seed=st.integers(0, 2**20),
    time=st.sampled_from([32, 64]),
    shape=st.sampled_from(SHAPES),
    norm=st.sampled_from([dict(norm=False), dict(norm=True)]),
    activation=st.sampled_from(["gelu", "silu", "sin"]),
    residual=st.booleans(),
    normalize_step=st.booleans(),
    objective=st.sampled_from(["squared_error", {"name": "huber", "delta": 0.5}, {"name": "lp", "p": 2.5}]),
    row_limit=st.sampled_from([None, 0.7]),
    base=st.booleans(),
)
def test_whole_chunks_in_registers_or_not(resident: bool, shape, norm, **call) -> None:
    from titans.memory.backends.triton import scan

    launched = []

    class Noted:
        def __getitem__(self, grid: tuple[int]):
            launched.append(grid)
            return kernel[grid]

    kernel, whole = scan.resident_kernel, problem(**call, **shape, **norm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "fits_registers", lambda *_: resident)
        patch.setattr(scan, "resident_kernel", Noted())
        # After the first chunk the weights are their own anchor.
        found = everything(whole, "triton", [16])
        assert len(launched) == resident
        with torch.no_grad():
            _, state, _ = whole.scan("triton", cut=slice(16))
            reads, state, _ = whole.scan("triton", state, slice(16, None))
    assert_same(found, everything(whole, "reference"), FLOAT64)
    assert_close(reads, found[0]["reads"][:, 16:], FLOAT64, "reads without gradients")
    for name, leaf in parts(state).items():
        assert_close(leaf, found[0][name], FLOAT64, f"{name} without gradients")


def test_wider_and_longer_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from titans.memory.backends.triton import scan

    monkeypatch.setattr(scan, "block_of", lambda *_: 16)
    monkeypatch.setattr(scan, "forward_tile", lambda *_: scan.Tile(16, 8))
    monkeypatch.setattr(scan, "fits_registers", lambda *_: False)
    every = dict(heads=1, norm=True, row_limit=0.7, normalize_step=True, base=True)
    agree(**every, expansion=4, activation="sin")
    agree(**every, depth=1, key_dim=64, mask="random", reset="random", position="apart")
    agree(depth=1, head_dim=32, row_limit=0.7, residual=True, reset="random")
    # So that rows of both layers are shortened.
    agree(chunk_size=64, time=130, heads=1, row_limit=0.02, normalize_step=False, base=False)


@pytest.mark.parametrize(
    ("base", "marks"),
    [(True, {}), (False, dict(reset="random", mask="random", position="apart", time=70))],
)
def test_states_kept_in_groups_are_recomputed(
    monkeypatch: pytest.MonkeyPatch, base: bool, marks: dict[str, object]
) -> None:
    from titans.memory.backends.triton import scan

    monkeypatch.setattr(scan, "KEPT_BYTES", 0)
    # Either kernel keeps states.
    monkeypatch.setattr(scan, "fits_registers", lambda *_: base)
    # Three groups, the last of them shorter.
    call = problem(**{**dict(time=16 * 7, heads=1, base=base, row_limit=0.7, normalize_step=True), **marks})
    # Three times as many inner updates as elsewhere.
    assert_same(everything(call, "triton", [16]), everything(call, "reference"), 1e-8)


def test_a_carried_state_is_its_own_anchor_from_call_to_call() -> None:
    call = problem(time=64)
    with torch.no_grad():
        _, state, _ = call.scan("triton", cut=slice(0, 32))
        assert state.is_shared
    whole = everything(call, "reference")
    assert_same(everything(call, "triton", [32]), whole, FLOAT64)
    assert_same(everything(call, "triton", [21]), whole, FLOAT64)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(depth=3), "depth 1 and 2, not 3"),
        (dict(chunk_size=65), "chunk_size is 65"),
        (dict(head_dim=24), "head_dim is 24"),
        (dict(head_dim=16, expansion=3), "expansion is 48"),
        (dict(depth=1, key_dim=24), "key_dim is 24"),
        (dict(key_dim=32), "key_dim is 32 and head_dim 16: at depth 2 it knows equal widths"),
        (dict(objective=Mine()), "SquaredError, Huber and Lp, and not Mine"),
    ],
)
def test_other_shapes_are_refused_with_the_reason(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        problem(**changes).scan("triton")


def test_a_small_device_has_room_for_small_tiles() -> None:
    from titans.memory.backends.triton import _refuses_tile

    ampere, ada = 163 * 1024, 99 * 1024
    assert _refuses_tile(64, 128, ampere) is None
    assert _refuses_tile(32, 64, ada) is None
    assert _refuses_tile(5, 128, ada) is None
    reason = _refuses_tile(33, 64, ada)
    assert reason is not None
    assert "99 KiB of shared memory it knows chunks of up to 32 tokens" in reason


def test_without_a_device_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="runs on a CUDA device"):
        problem().scan("triton")
    assert "triton" in BACKENDS


@pytest.mark.parametrize("shape", [(2, 70, 65, 16), (1, 600, 8, 4), (1, 3, 40, 5)])
def test_the_filter_is_the_convolution(shape: tuple[int, int, int, int]) -> None:
    from titans.nn.kernels.filter import causal_filter

    batch, time, channels, width = shape
    torch.manual_seed(0)
    x = torch.randn(batch, time + width - 1, channels, requires_grad=True)
    conv = CausalConv(channels, width)
    found, wanted = causal_filter(x, conv.weight), conv._filter(x, "reference")
    cotangent = torch.randn_like(found)
    assert_close(found, wanted, 1e-5, "the answer")
    for a, b in zip(
        torch.autograd.grad(found, (x, conv.weight), cotangent),
        torch.autograd.grad(wanted, (x, conv.weight), cotangent),
        strict=True,
    ):
        assert_close(a, b, 1e-5, "a gradient")
