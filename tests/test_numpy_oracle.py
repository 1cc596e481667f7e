"""The independent oracle, examples/titans_in_numpy.py: right in itself, and equal to the reference."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from titans.memory import InnerProblem, MemoryNetwork, MemoryState, MomentumRule, memory_scan

SCRIPT = Path(__file__).parents[1] / "examples" / "titans_in_numpy.py"
BATCH, TIME, HEADS, HEAD_DIM, EXPANSION, CHUNK = 2, 15, 2, 8, 4, 4
FLAGS = list(itertools.product([False, True], repeat=2))


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module  # dataclasses look their own module up here
    spec.loader.exec_module(module)
    return module


oracle = load_example()


def initial_weights(rng: np.random.Generator, depth: int, *leading: int) -> list[np.ndarray]:
    widths = [HEAD_DIM] + [EXPANSION * HEAD_DIM] * (depth - 1) + [HEAD_DIM]
    shapes = [(*leading, wide, narrow) for narrow, wide in itertools.pairwise(widths)]
    return [rng.normal(size=shape) / np.sqrt(shape[-1]) for shape in shapes]


def random_tokens(rng: np.random.Generator, depth: int, largest_step: float) -> list[np.ndarray]:
    """Queries, keys, values, forget, momentum, step_size; some gates exactly 0, some exactly 1."""
    queries, keys, values = rng.normal(size=(3, BATCH, TIME, HEADS, HEAD_DIM)) / np.sqrt(HEAD_DIM)
    keys[:, 4:6] *= np.reshape([1e-4, 0.0], (2, 1, 1))  # c below its floor, and c = 0
    gates = rng.uniform(size=(3, BATCH, TIME, HEADS, depth)) * np.reshape([0.3, 0.9, 1.0], (3, 1, 1, 1, 1))
    kind = rng.uniform(size=gates.shape)
    gates = np.where(kind < 0.1, 0.0, np.where(kind > 0.95, 1.0, gates))
    return [queries, keys, values, *gates[:2], gates[2] * largest_step]


def assert_same(ours: torch.Tensor, numpys: np.ndarray, what: str) -> None:
    """Equal to 1e-12 of the largest number there (and exactly, where all are zero); worst seen: 2e-13."""
    assert ours.dtype == torch.float64 and tuple(ours.shape) == numpys.shape, what
    assert np.isfinite(numpys).all(), what
    largest = np.abs(numpys).max(initial=0)
    np.testing.assert_allclose(ours.numpy(), numpys, rtol=0, atol=1e-12 * largest, err_msg=what)


def assert_same_state(ours: MemoryState, row: int, numpys) -> None:
    assert ours.position[row].item() == numpys.position
    for part in ("weights", "momentum", "anchor"):
        for layer, (a, b) in enumerate(zip(getattr(ours, part), getattr(numpys, part), strict=True)):
            assert_same(a[row], b, f"{part}, layer {layer}")


def test_the_script_runs_and_the_memory_learns():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    recall_errors = [float(x) for x in re.findall(r"passes +mean recall error (\S+)", run.stdout)]
    surprises = [float(x) for x in re.findall(r"surprise ([\d.]+)", run.stdout)]
    for falling in (recall_errors, surprises):
        assert len(falling) >= 5 and falling == sorted(falling, reverse=True)
        assert falling[-1] < falling[0] / 10


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("residual", "norm"), FLAGS)
def test_hand_gradient_equals_finite_differences(depth, activation, residual, norm):
    rng = np.random.default_rng(depth)
    gain, bias = rng.normal(size=(2, HEAD_DIM)) if norm else (None, None)
    M = oracle.Memory(activation, residual, gain, bias)
    weights = initial_weights(rng, depth)
    key, value = rng.normal(size=(2, HEAD_DIM))
    nudged = M.finite_differences(weights, key, value)
    for by_hand, measured in zip(M.surprise(weights, key, value), nudged, strict=True):
        np.testing.assert_allclose(by_hand, measured, rtol=0, atol=1e-8 * np.abs(measured).max())


STEADY = {
    "literal": {},
    "normalised step": dict(normalize_step=True),
    "limits": dict(normalize_step=True, row_limit=0.9, length_floor=0.8),
}


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("steady", STEADY)
@pytest.mark.parametrize(("residual", "norm"), FLAGS)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_reference_equals_numpy(depth, activation, residual, norm, steady, offsets):
    """Reads and the whole state, also where the stretch is cut inside a chunk and the state handed on."""
    rng = np.random.default_rng([depth, residual, norm, list(STEADY).index(steady)])
    inputs = random_tokens(rng, depth, largest_step=0.2 if "normalize_step" in STEADY[steady] else 0.02)
    weights = initial_weights(rng, depth, BATCH, HEADS)
    gain, bias = rng.normal(size=(2, HEADS, HEAD_DIM)) if norm else (None, None)
    options = dict(activation=activation, residual=residual, **STEADY[steady])
    net = MemoryNetwork(HEAD_DIM, depth, EXPANSION, activation, residual, norm)
    inner = InnerProblem(net, rule=MomentumRule(**STEADY[steady]))
    slow = dict(norm_weight=torch.from_numpy(gain), norm_bias=torch.from_numpy(bias)) if norm else {}
    options |= dict(gain=gain, bias=bias)
    if offsets:
        options["base"] = initial_weights(rng, depth, HEADS)
        slow["base"] = [torch.from_numpy(b) for b in options["base"]]

    state = MemoryState.initial(tuple(map(torch.from_numpy, weights)))
    states = [oracle.State.initial([w[row] for w in weights]) for row in range(BATCH)]
    pieces = [[] for _ in range(BATCH)]
    for cut in (slice(0, 6), slice(6, 7), slice(7, TIME)):
        arguments = [torch.from_numpy(x[:, cut]) for x in inputs]
        reads, state = memory_scan(inner, *arguments, state, chunk_size=CHUNK, backend="reference", **slow)
        for row in range(BATCH):
            expected, states[row] = oracle.memory_scan(
                *(x[row, cut] for x in inputs), states[row], CHUNK, **options
            )
            pieces[row].append(expected)
            assert_same(reads[row], expected, f"reads {cut}")
            assert_same_state(state, row, states[row])

    for row in range(BATCH):  # and the cuts changed nothing
        start = oracle.State.initial([w[row] for w in weights])
        whole, _ = oracle.memory_scan(*(x[row] for x in inputs), start, CHUNK, **options)
        np.testing.assert_array_equal(whole, np.concatenate(pieces[row]))


def test_reference_masks_and_resets_as_numpy_leaves_tokens_out_and_starts_afresh():
    rng = np.random.default_rng(0)
    inputs = random_tokens(rng, depth=2, largest_step=0.02)
    weights, fresh = initial_weights(rng, 2, BATCH, HEADS), initial_weights(rng, 2, HEADS)
    gain, bias = rng.normal(size=(2, HEADS, HEAD_DIM))
    real = rng.uniform(size=(BATCH, TIME)) < 0.7
    restart = np.zeros((BATCH, TIME), dtype=bool)
    for row, begin in enumerate((6, 9)):
        restart[row, begin] = real[row, begin] = True

    net = MemoryNetwork(head_dim=HEAD_DIM, depth=2, expansion=EXPANSION)
    reads, state = memory_scan(
        net,
        *(torch.from_numpy(np.where(real[..., None, None], x, np.nan)) for x in inputs),
        MemoryState.initial(tuple(map(torch.from_numpy, weights))),
        chunk_size=CHUNK,
        norm_weight=torch.from_numpy(gain),
        norm_bias=torch.from_numpy(bias),
        mask=torch.from_numpy(real),
        reset=torch.from_numpy(restart),
        initial=tuple(map(torch.from_numpy, fresh)),
        backend="reference",
    )
    for row in range(BATCH):
        begin = int(restart[row].argmax())
        expected = np.zeros((TIME, HEADS, HEAD_DIM))
        for start, tokens in (([w[row] for w in weights], np.arange(begin)), (fresh, np.arange(begin, TIME))):
            tokens = tokens[real[row, tokens]]
            expected[tokens], end = oracle.memory_scan(
                *(x[row, tokens] for x in inputs), oracle.State.initial(start), CHUNK, gain=gain, bias=bias
            )
        assert_same(reads[row], expected, "reads")
        assert_same_state(state, row, end)
