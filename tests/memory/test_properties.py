"""What holds of every scan: causal, row by row, in full precision, and finite where numbers degenerate."""

from __future__ import annotations

import pytest
import torch

from titans.memory import BACKENDS, memory_read

from ..tolerances import FLOAT32, FLOAT64, assert_close
from .problems import GATES, TOKENS, answers, everything, make_problem

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def full_precision(backend):
    if backend == "native_bfloat16":
        pytest.skip("it rounds the operands of float32 products; test_native.py bounds the error")


RAGGED = dict(mask="random", reset="random", position="apart")


@pytest.mark.parametrize("options", [{}, RAGGED | dict(normalize_step=True, row_limit=0.7)])
def test_no_token_reaches_back(backend, options):
    """Changing everything about the tokens from t on changes no bit of any earlier read or surprise."""
    problem = make_problem(time=18, chunk_size=5, **options)
    other = make_problem(time=18, chunk_size=5, seed=1, **options)
    reads, _, surprise = problem.scan(backend)
    # Every place in a chunk, and every chunk.
    for t in (1, 3, 5, 7, 9, 14, 15, 17):
        changed = problem.change(
            **{
                name: torch.cat([problem.leaves[name][:, :t], other.leaves[name][:, t:].nan_to_num(0.5)], 1)
                for name in TOKENS
            }
        )
        new_reads, _, new_surprise = changed.scan(backend)
        assert torch.equal(new_reads[:, :t], reads[:, :t])
        assert torch.equal(new_surprise[:, :t], surprise[:, :t])
        assert "mask" in options or (new_reads[:, t] != reads[:, t]).all()


@pytest.mark.parametrize("options", [{}, RAGGED])
def test_rows_and_heads_are_strangers(backend, options):
    """A row alone equals the row in company, and no bit of it depends on what the others read."""
    problem = make_problem(batch=3, heads=2, time=18, **options)
    together = answers(*problem.scan(backend))
    for row in range(3):
        leaves = {
            name: x if name.startswith(("norm", "initial")) else x[row : row + 1]
            for name, x in problem.leaves.items()
        }
        flags = {name: x[row : row + 1] for name, x in problem.flags.items()}
        alone = type(problem)(
            problem.inner, leaves, problem.position[row : row + 1], problem.chunk_size, flags
        )
        for name, value in answers(*alone.scan(backend)).items():
            assert_close(value, together[name][row : row + 1], FLOAT64, name)
    shaken = {name: problem.leaves[name].clone() for name in TOKENS}
    for name in TOKENS:
        shaken[name][0] *= 0.9
        shaken[name][1:, :, 0] *= 0.9
    apart = problem.change(**shaken).scan(backend)[0]
    both = problem.mask[1:]
    assert torch.equal(apart[1:, :, 1], together["reads"][1:, :, 1])
    assert (apart[1:, :, 0] != together["reads"][1:, :, 0])[both].any()


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, RAGGED])
def test_low_precision_inputs_full_precision_inside(backend, dtype, options):
    """The state is float32 and the reads have the queries' dtype; nothing is rounded in between."""
    problem = make_problem(time=20, **options).to(dtype)
    reads, state, surprise = problem.scan(backend)
    assert reads.dtype == dtype and surprise.dtype == torch.float32
    assert {x.dtype for part in ("weights", "momentum", "anchor") for x in getattr(state, part)} == {
        torch.float32
    }
    raised = answers(*problem.to(torch.float32).scan(backend))
    raised["reads"] = raised["reads"].to(dtype)
    for name, value in answers(reads, state, surprise).items():
        assert torch.equal(value, raised[name]), name
    exact = answers(*problem.to(torch.float64).scan(backend))
    for name, value in raised.items():
        if name != "reads":
            assert_close(value.double(), exact[name], FLOAT32, name)
    assert memory_read(problem.net, problem.leaves["queries"], state).dtype == dtype


@pytest.mark.parametrize("options", [{}, RAGGED])
def test_autocast_changes_no_bit(backend, options):
    problem = make_problem(time=20, head_dim=16, **options).to(torch.float32).require_grad()
    plain = answers(*problem.scan(backend))
    with torch.autocast("cpu", torch.bfloat16):
        cast = answers(*problem.scan(backend))
        read = memory_read(problem.net, problem.leaves["queries"], problem.state)
    for name, value in cast.items():
        assert torch.equal(value, plain[name]), name
    assert torch.equal(
        read[problem.mask], memory_read(problem.net, problem.leaves["queries"], problem.state)[problem.mask]
    )


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("depth", [1, 2])
def test_a_long_constant_stream_in_float32(backend, depth):
    """One token repeated 300 times at slow gates: finite, and near the float64 run."""
    problem = make_problem(batch=1, heads=1, time=1, depth=depth, head_dim=4, chunk_size=16, norm=False)
    problem = problem.change(**{name: problem.leaves[name].expand(-1, 300, -1, -1) for name in TOKENS})
    slow = zip(GATES, (7e-7, 0.9, 1e-3), strict=True)
    problem = problem.change(**{name: torch.full_like(problem.leaves[name], x) for name, x in slow})
    with torch.no_grad():
        single = answers(*problem.to(torch.float32).scan(backend))
        double = answers(*problem.scan(backend))
    for name, value in single.items():
        assert_close(value.double(), double[name], 1e-3, name)


@pytest.mark.parametrize("row_limit", [None, 0.7])
@pytest.mark.parametrize("normalize_step", [False, True])
@pytest.mark.parametrize("zero", ["queries keys values", "keys", "state", "everything"])
def test_zeros_are_finite_forward_and_backward(backend, zero, normalize_step, row_limit):
    """LayerNorm of zeros, rows of zeros, curvature 0: no division by any of them."""
    problem = make_problem(time=10, normalize_step=normalize_step, row_limit=row_limit)
    names = [name for name in problem.leaves if zero == "everything" or name.startswith(tuple(zero.split()))]
    problem = problem.change(**{name: torch.zeros_like(problem.leaves[name]) for name in names})
    for name, value in everything(problem, backend)[0].items():
        assert value.isfinite().all(), name
