"""docs/how/family.md and the pages after it: each setting computes what a reference op or a loop computes.

The ops are those of flash-linear-attention; where no code is published, they are naive.py's. The ops' files
are executed one by one, because to import the package takes Triton and a GPU's driver.
"""

from __future__ import annotations

import functools
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from titans.memory import Memora, MemoryNetwork, MemoryState, memory_read, memory_scan

from ..tolerances import assert_close
from . import naive

# In float64, and of the ops as they are, in float32.
EQUAL, SINGLE = 1e-14, 1e-6
# Of two layers behind a LayerNorm, whose roundings 48 updates amplify.
NAIVE = 1e-12
HOW = Path(__file__).parents[2] / "docs" / "how"
PAGES = [HOW / f"{name}.md" for name in ("family", "miras", "windows", "caching")]


def fla(name: str, replace: tuple[tuple[str, str], ...] = (), double: bool = True, **known: Any) -> Any:
    """The names that `fla/ops/<name>.py` defines, its source changed, and by default in float64."""
    pytest.importorskip("einops", reason="einops is missing: pip install fla-core==0.6.0 einops")
    try:
        file = Path(str(distribution("fla-core").locate_file(f"fla/ops/{name}.py")))
    except PackageNotFoundError:
        pytest.skip("fla-core is missing: pip install fla-core==0.6.0 einops")
    source = file.read_text()
    if double:
        source = source.replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    for old, new in replace:
        assert old in source, f"{name} has no {old!r}: this test is for fla-core 0.6.0"
        source = source.replace(old, new)
    names = dict(known)
    exec(compile(source, str(file), "exec"), names)
    return names


@functools.cache
def page() -> dict[str, list[dict[str, Any]]]:
    """The names known after each block of the pages, by heading."""
    found: dict[str, list[dict[str, Any]]] = {}
    names: dict[str, Any] = {}
    for page in PAGES:
        for section in re.split(r"^## ", page.read_text(), flags=re.MULTILINE):
            heading = section.partition("\n")[0]
            for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
                exec(compile(code, f"{page}: {heading}", "exec"), names)
                found.setdefault(heading, []).append(dict(names))
    return found


def test_every_block_of_the_pages_runs():
    assert sum(map(len, page().values())) == 19


def same(reads: Tensor, state: MemoryState, op: tuple[Tensor, Tensor], tolerance: float) -> None:
    assert_close(op[0].to(reads.dtype), reads, tolerance, "reads")
    assert_close(op[1].mT.to(reads.dtype), state.weights[0], tolerance, "weights")


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


EITHER = pytest.mark.parametrize(("double", "tolerance"), [(True, EQUAL), (False, SINGLE)])


@EITHER
def test_deltanet(double, tolerance):
    (x,) = page()["DeltaNet"]
    op = fla("delta_rule/naive", double=double)["delta_rule_recurrence"]
    # It divides queries by √width, which the others have an argument for.
    arguments = heads_first(x["queries"] * 8**0.5, x["keys"], x["values"], x["beta"])
    reads, weights = op(*arguments, initial_state=x["start"].weights[0].mT)
    same(x["reads"], x["state"], (reads.transpose(1, 2), weights), tolerance)


def gated_deltanet(x: dict[str, Any], double: bool, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    gamma = x["gamma"] if gamma is None else gamma
    return fla("gated_delta_rule/naive", double=double)["naive_recurrent_gated_delta_rule"](
        x["queries"], x["keys"], x["values"], x["beta"].squeeze(-1), gamma.log().squeeze(-1),
        scale=1.0, initial_state=x["start"].weights[0].mT, output_final_state=True,
    )  # fmt: skip


@EITHER
def test_gated_deltanet(double, tolerance):
    one, two = page()["Gated DeltaNet"]
    for x in (one, two):
        same(x["reads"], x["state"], gated_deltanet(x, double), tolerance)


def test_gated_deltanet_with_closed_gates():
    _, x = page()["Gated DeltaNet"]
    gamma = x["gamma"].clone()
    gamma[:, ::7] = 0
    twice, zero = x["twice"], x["zero"]
    both, state = memory_scan(
        x["linear"], *(twice(0 * y, y) for y in (x["queries"], x["keys"], x["values"])),
        twice(1 - gamma, zero), twice(zero, zero), twice(zero, x["beta"] / 2), x["start"], chunk_size=1,
    )  # fmt: skip
    same(both[:, 1::2], state, gated_deltanet(x, True, gamma), EQUAL)


def mdn(x: dict[str, Any], form: str, double: bool, replace: Any = (), **changes: Any) -> Any:
    """(reads, weights, M) of one of the two references for MDN."""
    arguments = dict(
        q=x["queries"], k=x["keys"], v=x["values"], p=x["alpha"] * x["keys"],
        log_alpha=x["alpha"].log().squeeze(-1), log_mu=x["mu"].log().squeeze(-1),
        beta=torch.full_like(x["beta"].squeeze(-1), x.get("b", 1.0)),
        eta=x.get("eta", x["beta"] / 2).squeeze(-1),
        scale=1.0, initial_S=x["start"].weights[0].mT, output_final_state=True,
    )  # fmt: skip
    op = fla("momentum_delta_rule/naive", replace, double)[f"{form}_momentum_delta_rule_ref"]
    reads, (weights, moved) = op(**(arguments | changes))
    return reads, weights, moved


@EITHER
def test_titans_with_a_linear_memory(double, tolerance):
    (x,) = page()["Titans with a linear memory"]
    # 2 θ = β / 2.
    *op, moved = mdn(x, "recurrent", double, p=x["keys"])
    same(x["reads"], x["state"], op, tolerance)
    assert_close(-moved.mT.double(), x["state"].momentum[0], tolerance, "momentum")


@EITHER
def test_momentum_deltanet(double, tolerance):
    (x,) = page()["Momentum DeltaNet"]
    *op, moved = mdn(x, "recurrent", double)
    same(x["reads"], x["state"], op, tolerance)
    assert_close(-x["b"] * moved.mT.double(), x["state"].momentum[0], tolerance, "momentum")


def test_of_two_references_for_mdn_the_recurrent_one_is_right():
    (x,) = page()["Momentum DeltaNet"]
    exact = x["reads"]

    def off(reads: Tensor) -> float:
        return ((reads.double() - exact).abs().max() / exact.abs().max()).item()

    assert off(mdn(x, "recurrent", False)[0]) < SINGLE
    assert off(mdn(x, "chunk", False, chunk_size=16)[0]) > 1e-3
    # The same formula with nothing added to β, in float64, where the cancellation costs less.
    plain = (("(beta + 1e-6)", "beta"),)
    assert off(mdn(x, "chunk", True, plain, chunk_size=16)[0]) < 1e-10
    closed = x["mu"].clone()
    closed[:, ::7] = 0
    shut = x | dict(mu=closed)
    assert mdn(shut, "chunk", True, chunk_size=16)[0].isnan().any()
    values, step = x["values"] / x["alpha"], x["alpha"] * x["eta"] * x["b"] / 2
    reads, state = memory_scan(
        x["linear"], x["queries"], x["keys"], values, 1 - x["alpha"], closed, step, x["start"], chunk_size=1
    )
    same(reads, state, mdn(shut, "recurrent", True)[:2], EQUAL)


@EITHER
def test_ttt_linear(double, tolerance):
    (x,) = page()["TTT-Linear"]
    first = x["fresh"].weights[0].mT.to(torch.float64 if double else torch.float32)
    reads, weights, bias = fla("ttt/naive", double=double)["chunk_ttt_linear_ref"](
        x["queries"].clone(), x["keys"], x["values"], x["gain"], x["offset"], x["step"], scale=1.0, eps=1e-5,
        mini_batch_size=16, initial_state=first[..., :8, :], initial_state_bias=first[..., 8:, :],
        output_final_state=True,
    )  # fmt: skip
    # Theirs is o + LN(o), ours q + LN(o).
    same(
        x["reads"] - x["queries"] + outputs(x), x["state"], (reads, torch.cat([weights, bias], 2)), tolerance
    )


def outputs(x: dict[str, Any]) -> Tensor:
    """o_t = W_t q_t of TTT-Linear, before LayerNorm, from the state after every token."""
    plain = MemoryNetwork(head_dim=8, key_dim=9, depth=1, residual=False, norm=False)
    queries, keys = (torch.cat([x[name], x["one"]], -1) for name in ("queries", "keys"))
    state, found = x["fresh"], []
    tokens = (queries, keys, x["values"] - x["keys"], x["zero"], x["zero"], x["step"] / 2)
    for t in range(keys.shape[1]):
        _, state = memory_scan(
            x["with_bias"], *(y[:, t : t + 1] for y in tokens), state, chunk_size=16,
            norm_weight=x["gain"], norm_bias=x["offset"],
        )  # fmt: skip
        found.append(memory_read(plain, queries[:, t : t + 1], state))
    return torch.cat(found, 1)


def test_the_titans_op_has_a_slip_and_divides_by_products_of_gates(monkeypatch):
    (x,) = page()["TTT-Linear"]
    net = MemoryNetwork(head_dim=8, depth=1, residual=False, norm=True)
    start = MemoryState.initial((x["start"].weights[0],))
    theta = x["beta"] / 8

    def ours(forget: Tensor) -> tuple[Tensor, MemoryState]:
        return memory_scan(
            net, x["queries"], x["keys"], x["values"] - x["keys"], forget, x["mu"], theta, start,
            chunk_size=16, norm_weight=x["gain"], norm_bias=x["offset"],
        )  # fmt: skip

    def theirs(forget: Tensor, in_chunks: bool, replace: Any = ()) -> Tensor:
        # Some of its tables are made in the default dtype.
        monkeypatch.setattr(torch, "zeros", functools.partial(torch.zeros, dtype=torch.float64))
        replace = (("from fla.ops.titans.log_impl import combine_params_log", ""), *replace)
        combine = fla("titans/log_impl", double=False)["combine_params_log"]
        op = fla("titans/naive", replace, combine_params_log=combine)["chunk_titans_linear_ref"]
        _, weights = op(
            x["queries"], x["keys"], x["values"], x["gain"], x["offset"], theta, forget, x["mu"], eps=1e-5,
            chunk_size=16, initial_state=start.weights[0].mT, output_final_state=True, use_chunk=in_chunks,
        )  # fmt: skip
        return weights.mT

    exact = ours(1 - x["alpha"])[1].weights[0]
    assert (theirs(1 - x["alpha"], False) - exact).abs().max() > exact.abs().max()
    slip = (
        ("v_new = D * grad - grad.sum(-1, keepdim=True) / (rstd * D)",
         "v_new = (D * grad - grad.sum(-1, keepdim=True)) / (rstd * D)"),
    )  # fmt: skip
    assert_close(theirs(1 - x["alpha"], False, slip), exact, EQUAL, "the op without the slip")
    closed = 1 - x["alpha"]
    closed[:, ::7] = 1
    assert_close(theirs(closed, False, slip), ours(closed)[1].weights[0], EQUAL, "closed gates")
    assert theirs(closed, True, slip).isnan().any()


def one_by_one(x: dict[str, Any], carried: list[Tensor], update: naive.Update) -> tuple[Tensor, list[Tensor]]:
    """The naive scan of the page's tokens with its LayerNorm."""
    return naive.scan(x["queries"], x["keys"], x["values"], carried, (x["gain"], x["offset"]), update)


def test_moneta():
    (x,) = page()["Moneta"]
    update = naive.moneta(x["alpha"].squeeze(-1), x["rate"][..., 0], p=3, q=4)
    reads, carried = one_by_one(x, list(x["first"].weights), update)
    assert_close(x["reads"], reads, NAIVE, "reads")
    for found, expected in zip(x["state"].weights, carried, strict=True):
        assert_close(found, expected, NAIVE, "A")


def test_yaad():
    (x,) = page()["Yaad"]
    update = naive.yaad(x["alpha"].squeeze(-1), x["rate"][..., 0], x["delta"].squeeze(-1))
    reads, carried = one_by_one(x, list(x["first"].weights), update)
    assert_close(x["reads"], reads, NAIVE, "reads")
    for found, expected in zip(x["state"].weights, carried, strict=True):
        assert_close(found, expected, NAIVE, "weights")
    # Both kinds of error are there.
    errors = naive.memory(carried, x["keys"][:, -1], x["gain"], x["offset"]) - x["values"][:, -1]
    long = errors.norm(dim=-1) > x["delta"][:, -1, :, 0]
    assert long.any() and not long.all()


def test_memora():
    (x,) = page()["Memora"]
    update = naive.memora(x["alpha"].squeeze(-1), x["rate"][..., 0], mass=1.0)
    reads, weights = one_by_one(x, [torch.softmax(w, -1) for w in x["first"].weights], update)
    assert_close(x["reads"], reads, NAIVE, "reads")
    for found, expected in zip(x["state"].weights, weights, strict=True):
        assert_close(Memora().network_weight(found), expected, NAIVE, "weights")


def test_titans_whose_rows_forget_at_their_own_pace():
    (x,) = page()["Channel-wise forgetting"]
    update = naive.titans(x["by_row"].split([16, 8], -1), x["mu"].squeeze(-1), x["rate"][..., 0], 16)
    reads, weights = one_by_one(x, list(x["first"].weights), update)
    assert_close(x["reads"], reads, NAIVE, "reads")
    for found, expected in zip(x["state"].weights, weights, strict=True):
        assert_close(found, expected, NAIVE, "weights")
