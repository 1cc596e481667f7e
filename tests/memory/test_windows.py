"""Rules with a window, with orthogonalised steps and with rows of constant length, and gated networks: the
papers' equations, the oracle's answers in every corner, and models that carry a window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from titans.evaluate.hostile import hostile_cases, stressed_memory
from titans.evaluate.stress import perturbation_growth, state_bound
from titans.hf import TitansCache
from titans.memory import (
    BACKENDS,
    Atlas,
    DotProduct,
    InnerProblem,
    LaCT,
    MemoryNetwork,
    MomentumRule,
    Omega,
    Yaad,
)
from titans.memory.rules.orthogonal import orthogonalized
from titans.nn import NeuralMemory

from ..hf.models import assert_near, filled_cache, logits_of, random_ids, small_model
from ..tolerances import FLOAT64, assert_close
from . import naive_windows as naive
from .problems import assert_same, everything, make_problem, parts
from .test_family import NAIVE, page

RAGGED = dict(mask="random", reset="last", position="apart", time=11, chunk_size=3, initial_momentum=True)
GATED = dict(gated=True, depth=3, activation="silu", expansion=2)
CORNERS = {
    "omega": dict(rule="omega", window=4, normalize_step=True),
    "omega, longer than chunks": dict(rule="omega", window=6, depth=1, norm=False, residual=False, key_dim=4),
    "omega by row": dict(rule="omega", window=3, by_row=True, base=True),
    "atlas": dict(rule="atlas", window=4, normalize_step=True, row_limit=0.7),
    "atlas by row": dict(rule="atlas", window=2, by_row=True, norm=False),
    "lact": dict(rule="lact", objective="dot_product", norm=False, residual=False),
    "lact, swiglu": dict(rule="lact", objective="dot_product", norm=False, residual=False, **GATED),
    "a gated network": dict(**GATED, base=True),
    "a gated network with a window": dict(**GATED, rule="omega", window=3),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_corner(corner):
    """In calls of any length; where all tokens are real, also of one token each."""
    problem = make_problem(**RAGGED, **CORNERS[corner])
    expected = everything(problem, "reference")
    assert_same(everything(problem, "chunkwise", (2, 2, 7)), expected, FLOAT64)
    if corner in ("omega", "atlas", "lact, swiglu"):
        plain = make_problem(time=7, chunk_size=3, position="same", seed=3, batch=1, **CORNERS[corner])
        whole = everything(plain, "chunkwise")
        assert_same(everything(plain, "chunkwise", range(1, 7)), whole, FLOAT64)


@pytest.mark.parametrize("corner", ["omega, longer than chunks", "lact, swiglu"])
def test_gradcheck(corner):
    problem = make_problem(
        batch=1, heads=1, time=3, chunk_size=2, closed_gates=False, head_dim=2, **CORNERS[corner]
    ).require_grad()

    def function(*leaves):
        reads, state, _ = problem.change(**dict(zip(problem.leaves, leaves, strict=True))).scan("chunkwise")
        return reads, *parts(state).values()

    assert torch.autograd.gradcheck(function, tuple(problem.leaves.values()), fast_mode=True)


@pytest.mark.parametrize("corner", ["omega", "lact, swiglu"])
def test_a_compiled_graph_takes_it(corner, monkeypatch):
    problem = make_problem(**RAGGED, **CORNERS[corner])
    expected = everything(problem, "chunkwise")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_same(everything(problem, "chunkwise"), expected, FLOAT64)


@pytest.mark.parametrize("backend", sorted(BACKENDS.keys() - {"reference", "chunkwise"}))
@pytest.mark.parametrize(
    ("corner", "name"),
    [("omega", "Omega"), ("atlas", "Atlas"), ("lact", "DotProduct"), ("a gated network", "gated network")],
)
def test_kernels_refuse_it_by_name_with_the_remedy(corner, name, backend):
    with pytest.raises(ValueError, match=f"backend='{backend}' refuses this call: ") as caught:
        make_problem(time=3, **CORNERS[corner]).scan(backend)
    if backend.startswith("native"):
        assert name in str(caught.value) and "give backend='auto' or 'chunkwise'" in str(caught.value)


def test_a_window_of_one_token_is_the_momentum_rule():
    plain = everything(make_problem(**RAGGED), "chunkwise")
    assert_same(everything(make_problem(**RAGGED, rule="omega", window=1), "chunkwise"), plain, FLOAT64)


def test_omeganet():
    (x,) = page()["OmegaNet"]
    reads, weights = naive.omega_net(
        x["start"].weights[0], x["queries"], x["keys"], x["values"], *gates(x, "alpha", "weight"), window=4
    )
    assert_close(x["reads"], reads, NAIVE, "reads")
    assert_close(x["state"].weights[0], weights, NAIVE, "weights")


def test_atlas():
    one, chunked = page()["Atlas"]
    for x, chunk_size in ((one, 1), (chunked, 16)):
        reads, weights = naive.atlas(
            x["start"].weights[0], x["queries"], x["keys"], x["values"], *gates(x, "alpha", "mu", "weight"),
            window=4, rate=0.2, floor=x["atlas"].rule.floor, chunk_size=chunk_size,
        )  # fmt: skip
        assert_close(x["reads"], reads, NAIVE, f"reads in chunks of {chunk_size}")
        assert_close(x["state"].weights[0], weights, NAIVE, "weights")


def test_lact():
    (x,) = page()["LaCT"]
    reads, weights = naive.lact(
        list(x["fresh"].weights), x["queries"], x["keys"], x["values"], x["rates"],
        x["carried"].squeeze(-1), 16, x["lact"].rule.floor,
    )  # fmt: skip
    assert_close(x["reads"], reads, NAIVE, "reads")
    for found, expected in zip(x["state"].weights, weights, strict=True):
        assert_close(found, expected, NAIVE, "weights")


def gates(x, *names: str) -> list[torch.Tensor]:
    return [x[name].squeeze(-1) for name in names]


def test_orthogonalised_steps_keep_directions_and_never_exceed_one():
    step = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for matrix in (step, step.mT):
        found = orthogonalized(matrix, 1e-9, 30)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        assert_close(found, u @ v, 1e-9, "the nearest orthogonal matrix")
    singular = torch.linalg.svdvals(orthogonalized(step, 1.0, 8))
    assert (singular < 1 + 1e-12).all() and (singular > 0.5).all()
    assert (orthogonalized(0 * step, 1.0, 8) == 0).all()


class Quintic(Atlas):
    """With the iteration of Muon, which is not monotone."""

    def orthogonalized(self, step: torch.Tensor) -> torch.Tensor:
        x = step / (step.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)
        for _ in range(5):
            square = x @ x.mT
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return x


STABLE = dict(normalize_step=True, length_floor=1.0, row_limit=8.0)


@pytest.mark.parametrize("rule", [Omega(**STABLE), Atlas(**STABLE), Quintic(**STABLE)])
def test_a_small_change_grows_with_no_rule_but_the_quintic(rule):
    memory = stressed_memory(8, 1, 16, rule=rule)
    found = perturbation_growth(memory, hostile_cases(memory, 512, gates=[("all at max", "0")]))
    if isinstance(rule, Quintic):
        assert found.weights.max() > 1e6
        return
    assert found.weights.max() <= 1
    bound = state_bound(memory)
    assert (found.longest_weights.amax(0) <= torch.tensor(bound.weights)).all()
    assert (found.longest_momentum.amax(0) <= torch.tensor(bound.momentum)).all()
    assert found.longest_weights.max() > 1


@pytest.mark.parametrize("rule", [{"name": "omega", "window": 5}, {"name": "atlas", "window": 5}, "lact"])
@torch.no_grad()
def test_a_model_carries_it_through_caches_and_files(rule, tmp_path: Path):
    form = {"name": "paper", "max_momentum": 0.5} if rule == "lact" else "stable"
    model, ids = small_model("lmm", memory={"rule": rule, "form": form}), random_ids(2, 20)
    expected = logits_of(model, ids)
    assert (expected - logits_of(small_model("lmm", memory={"form": form}), ids)).abs().max() > 1e-4
    cache = filled_cache(model, ids[:, :11])
    cache.save(tmp_path / "memory")
    loaded = TitansCache.load(tmp_path / "memory", model.config)
    cache.reorder_cache(torch.tensor([1, 0]))
    for held, rows in ((loaded, [0, 1]), (cache, [1, 0])):
        rest = model(ids[rows, 11:], past_key_values=held).logits
        assert_near(rest, expected[rows, 11:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Omega(window=0), "window=0: give a whole number of at least 1"),
        (lambda: LaCT(floor=0.0), "floor=0.0: give a finite number above 0"),
        (lambda: LaCT(iterations=0), "iterations=0: give a whole number"),
        (lambda: MemoryNetwork(gated=True), "gated=True with depth=2 .*: give depth=3"),
        (lambda: NeuralMemory(8, 2, 4, rule="lact"), "give decay_to_initial=False in the form"),
        (lambda: InnerProblem(MemoryNetwork(), Yaad(), Omega()), "window=16 with the objective Yaad"),
        (
            lambda: InnerProblem(MemoryNetwork(gated=True, depth=3), rule=MomentumRule(normalize_step=True)),
            "normalize_step=True with network.gated=True",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert NeuralMemory(8, 2, 4, 3, rule="lact", form=SWIGLU, objective=DotProduct()).network.gated


SWIGLU = dict(name="paper", norm=False, residual=False, gated=True, activation="silu")
