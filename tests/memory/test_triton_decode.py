"""The kernel for single tokens under Triton's interpreter, in float64, against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from titans.memory.backends import triton as backend
from titans.nn import NeuralMemory

from ..tolerances import FLOAT64, assert_close
from .problems import Problem, answers, assert_same, everything, make_problem, parts

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def refusing(name: str) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise AssertionError(f"taken: {name}")

    return refuse


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other path answers."""
    monkeypatch.setattr(backend, "scan_laid_out", refusing("another path"))


def problem(**changes: object) -> Problem:
    known = dict(head_dim=16, depth=2, norm=False, chunk_size=4, heads=1, batch=2, time=9, position="apart")
    return make_problem(**{**known, **changes})


@torch.no_grad()
def scan(call: Problem, name: str, cuts: Sequence[int] = ()) -> tuple[dict[str, Tensor], Tensor]:
    state, reads, surprises = call.state, [], []
    for begin, end in zip((0, *cuts), (*cuts, call.time), strict=True):
        read, state, surprise = call.scan(name, state, slice(begin, end))
        reads.append(read)
        surprises.append(surprise)
    return answers(torch.cat(reads, 1), state, torch.cat(surprises, 1)), state.position


# The square of the floor is exact in float32, which the interpreter makes of constants.
HUBER, LP = dict(objective={"name": "huber", "delta": 0.5}), dict(objective={"name": "lp", "p": 2.5})
NORMALIZED = dict(base=True, normalize_step=True, length_floor=0.875)
# Each call in one of these ways: the second is the first with a loop in the kernel.
ONE_BY_ONE, SOME = range(1, 9), [1, 6, 7]
# Keys that are narrower than the values.
NARROW = dict(head_dim=32, key_dim=16)


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize(
    "tile, changes, cuts",
    [
        (64, dict(depth=1), ONE_BY_ONE),
        (2048, dict(depth=1, **NORMALIZED, **LP, key_dim=64, mask="random"), SOME),
        (128, dict(depth=1, row_limit=0.7, mask="rows", chunk_size=3, seed=1, key_dim=32), ONE_BY_ONE),
        (256, dict(expansion=1, chunk_size=1, row_limit=0.7, objective="lp", heads=2), SOME),
        (256, dict(expansion=2, activation="silu", residual=False, mask="random", row_limit=0.7), ONE_BY_ONE),
        (512, dict(expansion=4, **NORMALIZED, **HUBER, row_limit=0.7, chunk_size=5, activation="sin"), SOME),
        (2048, dict(expansion=2, base=True, normalize_step=True, mask="random", row_limit=0.7), ONE_BY_ONE),
        (
            64,
            dict(depth=1, norm=True, heads=2, **NORMALIZED, mask="random", reset="random", row_limit=0.7),
            ONE_BY_ONE,
        ),
        (512, dict(depth=1, **NARROW, norm=True, affine=False, reset="last", initial_momentum=True), SOME),
        (
            256,
            dict(norm=True, expansion=2, **NORMALIZED, **LP, mask="random", reset="random", row_limit=0.7),
            SOME,
        ),
        (2048, dict(norm=True, expansion=1, mask="rows", reset="random", initial_momentum=True), ONE_BY_ONE),
    ],
)
def test_it_is_the_oracle(
    monkeypatch: pytest.MonkeyPatch, tile: int, changes: dict[str, object], cuts: Sequence[int]
) -> None:
    from titans.memory.backends.triton import decode

    monkeypatch.setattr(decode, "TILE", tile)
    call = problem(**changes)
    assert_same(scan(call, "triton", cuts), scan(call, "reference"), FLOAT64)


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize("depth", [1, 2])
def test_gates_may_be_closed(depth: int) -> None:
    call = problem(depth=depth, time=8, row_limit=0.7)
    bits = torch.arange(8)
    gates = {
        name: (bits >> bit & 1).double().view(1, 8, 1, 1).expand_as(call.leaves[name]) * highest
        for bit, (name, highest) in enumerate((("forget", 1.0), ("momentum", 1.0), ("step_size", 0.03)))
    }
    call = call.change(**gates)
    assert_same(scan(call, "triton", range(1, 8)), scan(call, "reference"), FLOAT64)


@pytest.mark.parametrize("position", ["zero", "same", "apart"])
def test_any_path_goes_on_from_any_state(position: str) -> None:
    call = problem(chunk_size=16, time=75, position=position, row_limit=0.7, base=True)
    # One by one, a few, and stretches with whole chunks in them, of which some begin where a chunk does.
    cuts = [1, 2, 8, 16, 48, 49, 66, 67]
    assert_same(scan(call, "triton", cuts), scan(call, "reference"), FLOAT64)


@pytest.mark.usefixtures("decoded")
def test_a_state_is_a_value_and_masked_tokens_leave_every_bit_of_it() -> None:
    call = problem(mask="rows", time=1, row_limit=0.7)
    call = call.change(**{name: x.clone() for name, x in call.leaves.items()})
    before = {name: x.clone() for name, x in parts(call.state).items()}
    with torch.no_grad():
        reads, after, surprise = call.scan("triton")
    for name, x in parts(call.state).items():
        assert torch.equal(x, before[name]), f"{name} was written to"
        assert torch.equal(parts(after)[name][0], before[name][0]), f"{name} has moved"
    assert after.position[0] == call.position[0]
    assert not reads[0].any() and not surprise[0].any()


@pytest.mark.parametrize(
    "changes, options",
    [
        (dict(), dict(read_anchor=True)),
        (dict(time=backend.FEW_TOKENS + 1), {}),
        (dict(time=0), {}),
    ],
)
def test_what_is_not_decoded(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], options: dict[str, object]
) -> None:
    from titans.memory.backends.triton import decode

    monkeypatch.setattr(decode, "decode", refusing("decode"))
    call = problem(**{"time": 3, "chunk_size": 16, **changes})
    with torch.no_grad():
        found, wanted = (call.scan(name, **options) for name in ("triton", "reference"))
    assert_same((answers(*found), found[1].position), (answers(*wanted), wanted[1].position), FLOAT64)


@pytest.mark.parametrize(
    "changes",
    [dict(depth=3), dict(head_dim=24), dict(expansion=3), dict(head_dim=128, expansion=8), dict(key_dim=32)],
)
def test_other_networks_are_refused(changes: dict[str, object]) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="refuses this call"):
        problem(time=1, chunk_size=16, **changes).scan("triton")


def test_gradients_take_the_path_that_has_them() -> None:
    call = problem(chunk_size=16, time=4)
    assert_same(everything(call, "triton", [1, 2]), everything(call, "reference"), FLOAT64)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@torch.no_grad()
def test_so_do_tangents() -> None:
    call = problem(chunk_size=16, time=1)
    found = []
    with fwAD.dual_level():
        dual = call.change(keys=fwAD.make_dual(call.leaves["keys"], torch.ones_like(call.leaves["keys"])))
        for name in ("triton", "reference"):
            found.append(fwAD.unpack_dual(dual.scan(name)[0]).tangent)
    assert_close(*found, FLOAT64, "the tangent")


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_a_layer_decodes(depth: int) -> None:
    """From a state that rows share, with tensors that are laid out as the layer has them."""
    torch.manual_seed(0)
    layer = NeuralMemory(32, 2, head_dim=16, depth=depth, chunk_size=4, form=dict(row_limit=0.5))
    x = torch.randn(3, 10, 32)
    layer.backend = "reference"
    wanted, _ = layer(x)
    layer.backend, state, found = "triton", layer.initial_state(3), []
    for t in range(x.shape[1]):
        y, state = layer(x[:, t : t + 1], state)
        found.append(y)
    assert_close(torch.cat(found, 1), wanted, 1e-5, "the answers")
