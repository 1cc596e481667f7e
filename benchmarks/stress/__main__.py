"""Can the memory be broken? Hostile streams at the limits of its gates, a search for worse, whole models.

    python benchmarks/stress            # everything, about ten minutes on one core
    python benchmarks/stress --quick    # a subset, one or two minutes; writes only where --results points to
    python benchmarks/stress --long     # also a stream of 10⁶ tokens through each whole model

The default form of `NeuralMemory`, and forms that are known to break, which shows that the checks can fail.
Tables go to benchmarks/results/stress.md and .json.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from report import DISTANCES, HEAD_DIM, PARTS, TOKENS, kept_results, report, write_results

from titans.evaluate.hostile import PAPER_FORM, StressedMemory, hostile_cases, stressed_memory
from titans.evaluate.stress import key_gradients, perturbation_growth, search_growth, state_bound
from titans.hf import TitansConfig, TitansForCausalLM
from titans.memory import OBJECTIVES, UPDATE_RULES, Atlas, LaCT
from titans.nn import NeuralMemory

RESULTS = Path(__file__).resolve().parents[1] / "results"
SCHEDULES = (
    "all at max", "no momentum", "write, then coast", "momentum every other chunk", "random", "switching",
)  # fmt: skip
FORGETS = ("0", "0.001", "0.05", "1 now and then", "1 as a chunk starts")
THOROUGH = [(s, "0") for s in SCHEDULES] + [(s, f) for s in ("all at max", "switching") for f in FORGETS[1:]]
FEW = [("all at max", "0"), ("switching", "0.001")]
COUNTER = [(s, f) for s in ("all at max", "write, then coast") for f in FORGETS[:3]]
NORMED: dict[str, Any] = PAPER_FORM | dict(norm=True, residual=True, gain=1.0)
Row = dict[str, Any]


class Progress:
    """Lines on stderr: what was done, and the time left, by the expected seconds of each part."""

    def __init__(self, expected: float) -> None:
        self.expected, self.done, self.started = expected, 0.0, time.perf_counter()

    def __call__(self, name: str, seconds: float) -> None:
        self.done += seconds
        spent = time.perf_counter() - self.started
        left = round(spent / self.done * max(0.0, self.expected - self.done))
        print(f"{name} · {left // 60}:{left % 60:02} left", file=sys.stderr, flush=True)


def measure(
    memory: StressedMemory,
    name: Row,
    gates: list[tuple[str, str]],
    tokens: int,
    periods: tuple[int, ...] = (),
    gradient_gates: list[tuple[str, str]] = FEW,
) -> Row:
    """Growth, state and gradients of one memory over the whole list of streams."""
    cases = hostile_cases(memory, tokens, gates=gates, periods=periods)
    growth = perturbation_growth(memory, cases)
    worst = int(growth.weights.argmax())
    distances = [d for d in DISTANCES if d <= tokens]
    few = hostile_cases(memory, tokens + 16, gates=gradient_gates, periods=periods)
    lengths, finite = key_gradients(memory, few, distances)
    row = name | {
        "cases": len(cases.names),
        "growth": float(growth.weights[worst]),
        "growth_of_key": float(growth.first_key.max()),
        "worst": cases.names[worst],
        "weights": growth.longest_weights.amax(0).tolist(),
        "momentum": growth.longest_momentum.amax(0).tolist(),
        "gradients": dict(zip(distances, lengths.amax(0).tolist(), strict=True)),
        "finite": finite and bool(growth.longest_weights.isfinite().all()),
    }
    try:
        bound = state_bound(memory)
    except ValueError:
        return row
    return row | {"bound_weights": bound.weights, "bound_momentum": bound.momentum}


def default_form(quick: bool, progress: Progress) -> list[Row]:
    """The defaults of `NeuralMemory` with the gates at their limits, over depths and chunk sizes."""
    rows = []
    depths, chunks = ((1, 2), (4, 16)) if quick else ((1, 2, 3, 4), (1, 4, 16, 64, 256))
    for depth in depths:
        for chunk in chunks:
            # As initialised (the base's last layer empty), and as if that had been learned.
            for last in (0.0, 1.0) if chunk == 16 else (0.0,):
                memory = stressed_memory(HEAD_DIM, depth, chunk, last=last)
                name = {"depth": depth, "chunk_size": chunk, "last": last}
                long_chunks = chunk > 16
                gates = FEW if quick or long_chunks else THOROUGH
                rows.append(measure(memory, name, gates, 1024 if quick else TOKENS))
                progress(
                    f"default form, depth {depth}, chunks of {chunk}: growth {rows[-1]['growth']:.3g}",
                    8 * depth,
                )
    return rows


def feature_memories(quick: bool, progress: Progress) -> list[Row]:
    """One matrix on slow features, with the gates at their limits; the enemy holds keys, or the features."""
    rows = []
    for chunk in (4, 16) if quick else (1, 4, 16, 64, 256):
        memories = {
            name: stressed_memory(HEAD_DIM, 1, chunk, features=name, feature_size=4 * HEAD_DIM)
            for name in ("sin", "product", "swiglu")
        }
        memories["any"] = replace(memories["sin"], features=None)
        memories["two fast layers, sine"] = stressed_memory(HEAD_DIM, 2, chunk, activation="sin")
        for features, memory in memories.items():
            few = quick or chunk > 16 or features not in ("sin", "any")
            name = {"features": features, "chunk_size": chunk}
            rows.append(measure(memory, name, FEW if few else THOROUGH, 1024 if quick else TOKENS))
            progress(f"features {features}, chunks of {chunk}: growth {rows[-1]['growth']:.3g}", 6)
    return rows


def registered_parts(quick: bool, progress: Progress) -> list[Row]:
    """Every registered rule and every registered objective in the default form, the other part being the
    usual one; rules also in the paper's form without momentum, which has a LayerNorm."""
    rows = []
    paper: Row = dict(name="paper", max_momentum=0.0, max_step_size=0.1 / 16)
    # Those that need a form of their own are in other parts.
    rules = [name for name, rule in UPDATE_RULES.items() if not rule.needs_first_weights]
    parts: list[tuple[str, Row, Row]] = [(f"rule {name}", dict(rule=name), {}) for name in rules]
    parts += [(f"rule {name}, paper", dict(rule=name), paper) for name in rules]
    parts += [(f"objective {name}", dict(objective=name), {}) for name in OBJECTIVES]
    for name, part, form in parts:
        for depth, chunk in ((1, 16),) if quick else ((1, 1), (1, 16), (2, 16)):
            memory = stressed_memory(HEAD_DIM, depth, chunk, **part, **form)
            row = measure(memory, {"of": name, "depth": depth, "chunk_size": chunk}, FEW, 1024)
            rows.append(row)
            progress(f"{name}, depth {depth}, chunks of {chunk}: growth {row['growth']:.3g}", 4 * depth)
    return rows


class Quintic(Atlas):
    """Atlas with the iteration that Muon uses for the weights of models."""

    def orthogonalized(self, step: torch.Tensor) -> torch.Tensor:
        x = step / (step.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)
        for _ in range(5):
            square = x @ x.mT
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return x


def orthogonal_steps(quick: bool, progress: Progress) -> list[Row]:
    """Rules that move the weights once a chunk by an orthogonalised step."""
    stable: Row = dict(normalize_step=True, length_floor=1.0, row_limit=8.0)
    plain: Row = dict(name="paper", norm=False, residual=False, max_momentum=0.5, max_step_size=0.05)
    swiglu = plain | dict(gated=True, activation="silu")
    arms: list[tuple[str, int, Any, Row]] = [
        ("Atlas", 1, Atlas(**stable), {}),
        ("Atlas, window 1", 1, Atlas(window=1, **stable), {}),
        ("Atlas, window 1, quintic", 1, Quintic(window=1, **stable), {}),
    ]
    for name, depth, form in (("linear", 1, plain), ("two layers", 2, plain), ("SwiGLU", 3, swiglu)):
        for rate in (1.0, 0.1):
            arms.append((f"LaCT, {name}, rate {rate:g}", depth, LaCT(rate=rate), form))
    rows = []
    for name, depth, rule, form in arms:
        objective = "dot_product" if isinstance(rule, LaCT) else "squared_error"
        for chunk in (16,) if quick else (16, 64):
            memory = stressed_memory(HEAD_DIM, depth, chunk, rule=rule, objective=objective, **form)
            rows.append(measure(memory, {"of": name, "chunk_size": chunk}, FEW, 1024 if quick else TOKENS))
            progress(f"{name}, chunks of {chunk}: growth {rows[-1]['growth']:.3g}", 6 * depth)
    return rows


def counter_examples(quick: bool, progress: Progress) -> list[Row]:
    """Forms that are known to break, and one of the same kind that does not."""
    all_at_max, coast = [("all at max", "0")], [("write, then coast", "0")]
    swing = (14, 20, 26, 32, 44)
    linear = [
        (
            f"paper, linear, η {eta}, θ = {part}(1 − η)/chunk",
            (HEAD_DIM, 1, 4),
            PAPER_FORM | dict(max_momentum=eta, max_step_size=factor * (1 - eta) / 4),
            all_at_max,
            swing,
            True,
        )
        for eta in (0.95, 0.97, 0.99)
        for part, factor in (("", 1.0), ("½ ", 0.5))
    ]
    others = [
        ("paper, linear, write at η 0, then coast at 0.99, θ = 1/chunk", (HEAD_DIM, 1, 16),
         PAPER_FORM | dict(max_momentum=0.99, max_step_size=1 / 16), coast, (), True),
        ("paper, two layers, η 0.9, θ = (1 − η)/chunk", (HEAD_DIM, 2, 16),
         PAPER_FORM | dict(max_momentum=0.9, max_step_size=0.1 / 16), COUNTER, (), True),
        ("paper, residual + LayerNorm, η 0.9, θ = (1 − η)/chunk", (HEAD_DIM, 2, 16),
         NORMED | dict(max_momentum=0.9, max_step_size=0.1 / 16), COUNTER, (), True),
        ("default with a step limit of 8 (1 − η)/chunk", (HEAD_DIM, 2, 16),
         dict(max_step_size=0.5 * 8 / 16), COUNTER, (), True),
        ("default with length_floor 0", (HEAD_DIM, 2, 16), dict(length_floor=0.0), COUNTER, (), True),
        ("default with length_floor 0, decaying to 0", (HEAD_DIM, 2, 16),
         dict(length_floor=0.0, decay_to_initial=False), COUNTER, (), True),
        ("default, decaying to 0", (HEAD_DIM, 2, 16), dict(decay_to_initial=False), COUNTER, (), False),
    ]  # fmt: skip
    rows = []
    forms: list[tuple[str, tuple[int, int, int], Row, list[tuple[str, str]], tuple[int, ...], bool]]
    forms = [*linear, *others]
    for name, shape, options, gates, periods, breaks in forms:
        memory = stressed_memory(*shape, **options)
        row = measure(memory, {"form": name, "breaks": breaks}, gates, TOKENS, periods, gates)
        rows.append(row)
        progress(f"{name}: growth {row['growth']:.3g}", 5)
    return rows


def searches(quick: bool, progress: Progress) -> list[Row]:
    """Gradient ascent on the growth, at the default limits and others of the step size."""
    rows = []
    for depth in (1, 2):
        for chunk in (4,) if quick else (4, 16):
            for times in (0.25, 1.0, 2.0):
                usual = stressed_memory(4, depth, chunk)
                memory = stressed_memory(4, depth, chunk, max_step_size=times * usual.max_step_size)
                tokens = 128 if quick else 256
                best: Row = {"repeated": [-math.inf]}
                for period in (None, 4 * chunk):
                    growth, stream = search_growth(memory, tokens, 30 if quick else 60, 12, period=period)
                    over = [
                        float(perturbation_growth(memory, stream.repeated(n)).weights) for n in (4096, 16384)
                    ]
                    row: Row = {"depth": depth, "chunk_size": chunk, "step": times, "tokens": tokens}
                    row |= {"period": period or tokens, "growth": growth, "repeated": over}
                    best = row if max(over) > max(best["repeated"]) else best
                rows.append(best)
                name = f"search, depth {depth}, chunks of {chunk}, {times:g} × the step"
                progress(f"{name}: {max(best['repeated']):.3g}", 6 * depth)
    return rows


def layer_inputs(progress: Progress) -> list[Row]:
    """Activations of any size into a layer, with and without a LayerNorm whose input starts at 0."""
    rows = []
    for norm in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            layer = NeuralMemory(64, 4, 16, depth=2, form=dict(norm=norm)).to(dtype)
            x = torch.randn(2, 512, 64)
            for scale in (0.0, 1e-4, 1e-2, 1.0, 1e2, 1e4):
                layer.zero_grad()
                leaf = (scale * x).to(dtype).requires_grad_()
                y, state = layer(leaf)
                y.float().square().mean().backward()
                grads = [p.grad for p in layer.parameters() if p.grad is not None]
                found = [y, leaf.grad, *grads, *state.memory.momentum]
                rows.append(
                    {
                        "norm": norm,
                        "dtype": str(dtype).removeprefix("torch."),
                        "scale": scale,
                        "finite": all(t is not None and bool(t.isfinite().all()) for t in found),
                        "output": y.abs().max().item(),
                        "longest_row": max(w.norm(dim=-1).max().item() for w in state.memory.weights),
                        "gradient": max(g.abs().max().item() for g in grads),
                    }
                )
            progress(f"layer, norm {norm}, {dtype}", 2)
    return rows


def texts(quick: bool, long: bool) -> dict[str, torch.Tensor]:
    """Streams of bytes, (1, n)."""
    generator = torch.Generator().manual_seed(0)
    most, some = (4096, 2048) if quick else (65536, 16384)
    phrase = torch.tensor(list(b"All work and no play makes Jack a dull boy. "))
    streams = {
        "random bytes": torch.randint(256, (1, most), generator=generator),
        "one byte": torch.full((1, some), 97),
        "one phrase": phrase.repeat(-(-some // len(phrase)))[None, :some],
    }
    if long:
        streams["10⁶ random bytes"] = torch.randint(256, (1, 10**6), generator=generator)
    return streams


def read_text(model: TitansForCausalLM, ids: torch.Tensor, piece: int = 1024) -> Row:
    """Read a stream piece by piece with the memories carried on, the last piece with a backward pass."""
    states, loss, finite, worst = None, None, True, 0.0
    pieces = ids.split(piece, dim=1)
    for number, part in enumerate(pieces):
        last = number == len(pieces) - 1
        with torch.set_grad_enabled(last):
            output = model(
                input_ids=part, labels=part, memory_states=states, return_memory_states=True, use_cache=False
            )
        states, loss = output.memory_states, output.loss
        finite &= bool(output.logits.isfinite().all())
        worst = max(worst, loss.item())
    model.zero_grad()
    assert loss is not None
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    finite &= all(bool(g.isfinite().all()) for g in grads)
    return {
        "tokens": ids.shape[1],
        "finite": finite,
        "worst_loss": worst if math.isfinite(worst) else None,
        "gradient": max(g.abs().max().item() for g in grads),
    }


def models(quick: bool, long: bool, progress: Progress) -> list[Row]:
    """Every variant as a small untrained model, in float32 and bfloat16."""
    rows = []
    streams = texts(quick, long)
    for variant in ("mac", "mag", "mal", "lmm"):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            config = TitansConfig(
                variant=variant,
                vocab_size=256,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                head_dim=16,
                memory_depth=2,
                memory_expansion=2,
                segment_length=64,
                sliding_window=64,
                num_persistent_tokens=4,
            )
            model: Any = TitansForCausalLM(config)
            model = model.to(dtype)
            for name, ids in streams.items():
                began = time.perf_counter()
                row = {"variant": variant, "dtype": str(dtype).removeprefix("torch."), "stream": name}
                rows.append(row | read_text(model, ids))
                taken = time.perf_counter() - began
                progress(
                    f"{variant}, {row['dtype']}, {name}: finite {rows[-1]['finite']}, {taken:.0f} s",
                    ids.shape[1] / 6000,
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a subset")
    parser.add_argument("--long", action="store_true", help="also 10⁶ tokens through every model")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="the others are kept")
    parser.add_argument("--results", type=Path, default=None, help=f"where to write, by default {RESULTS}")
    arguments = parser.parse_args()
    quick, long = arguments.quick, arguments.long
    folder = arguments.results or (None if quick else RESULTS)
    kept: dict[str, Any] = {}
    if len(arguments.parts) < len(PARTS):
        if folder is None or not (folder / "stress.json").exists():
            parser.error("--parts keeps the other parts of earlier results, and there are none")
        kept = kept_results(folder)
    torch.set_num_threads(1)
    per_model = (8192 if quick else 98304) + (10**6 if long else 0)
    seconds = {
        "default": 48 if quick else 480,
        "features": 60 if quick else 150,
        "registered": 40 if quick else 160,
        "steps": 75 if quick else 180,
        "counter_examples": 75,
        "search": 54 if quick else 108,
        "layer": 8,
        "models": 8 * per_model / 6000,
    }
    progress = Progress(sum(seconds[part] for part in arguments.parts))
    run: dict[str, Callable[[], list[Row]]] = {
        "default": lambda: default_form(quick, progress),
        "features": lambda: feature_memories(quick, progress),
        "registered": lambda: registered_parts(quick, progress),
        "steps": lambda: orthogonal_steps(quick, progress),
        "counter_examples": lambda: counter_examples(quick, progress),
        "search": lambda: searches(quick, progress),
        "layer": lambda: layer_inputs(progress),
        "models": lambda: models(quick, long, progress),
    }
    began = time.perf_counter()
    found: dict[str, Any] = {part: run[part]() if part in arguments.parts else kept[part] for part in PARTS}
    flags = "".join(f" --{name}" for name in ("quick", "long") if getattr(arguments, name))
    found["machine"] = kept.get("machine") or (
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; "
        f"`python benchmarks/stress{flags}`, one thread, {time.perf_counter() - began:.0f} s."
    )
    if kept:
        found["machine"] += f" Again on {datetime.date.today()}: {', '.join(arguments.parts)}."
    text = report(found)
    print(text)
    if folder is not None:
        write_results(folder, found, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
