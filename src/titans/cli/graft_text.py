"""What `titans graft` does for `--train adaptation` and `--train inside`."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Any

from titans.cli.errors import UsageError
from titans.cli.terminal import report
from titans.train.progress import clock

if TYPE_CHECKING:
    from titans.train.graft.loop import LoopResult
    from titans.train.graft.text import HeldOutText

SECONDS_BETWEEN_LINES = 10.0
# With which an adaptation begins that is trained, unless others are given: all that training can change.
TRAINABLE = {"learned_start": True, "half_life": 200_000.0, "momentum": 0.05}


def train_on_text(
    command: Any, documents: list[Any] | None, held_out: list[Any] | None, progress: Any
) -> int:
    """Train and save, reporting to stderr."""
    settings = command.meta if command.train == "adaptation" else command.inside
    model, tokenizer = command.open_model(command.checkpoint)
    grafted, lines = _grafted(command, model, tokenizer), _Lines()
    try:
        if command.train == "adaptation":
            result = _adaptation(command, grafted, tokenizer, documents, held_out, progress, lines)
        else:
            if documents is None or held_out is None:
                raise UsageError("data: none given; training through the model reads texts")
            from titans.train.graft.through import fit_through

            result = fit_through(
                grafted,
                documents,
                held_out,
                command.output,
                tokenizer=tokenizer,
                training=command.inside,
                on_log=lines,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; what was computed is kept: the same command goes on") from None
    if not result.finished:
        message = (
            f"stopped after step {result.step} of {settings.steps}, which is saved: the same command goes on"
        )
        if settings.minutes is None:
            raise KeyboardInterrupt(message)
        report(message)
    else:
        report(f"done: {_outcome(result)}; {command.output} holds the graft")
    if command.json:
        print(json.dumps({**dataclasses.asdict(result), "output": str(command.output)}))
    return 0


def _outcome(result: LoopResult[HeldOutText]) -> str:
    assert result.untrained is not None and result.held_out is not None
    before, after = result.untrained.mean, result.held_out.mean
    if not result.best_step:
        return f"no step was better on all held-out text, so nothing changed ({before:+.2%} against the base)"
    return (
        f"held-out text {after:+.2%} against the base, {before:+.2%} before the training; kept are the "
        f"weights of step {result.best_step}"
    )


def _grafted(command: Any, model: Any, tokenizer: Any) -> Any:
    from titans.hf.graft import GraftedForCausalLM, graft

    given = {"adaptation": command.adaptation, "residual": command.residual, "lora": command.lora}
    if isinstance(model, GraftedForCausalLM):
        for name, settings in given.items():
            if settings:
                raise UsageError(f"{name}: a graft's own settings cannot change; leave it out")
        return model
    if command.train == "adaptation":
        return graft(model, tokenizer, window=command.window, adaptation=command.adaptation or TRAINABLE)
    return graft(
        model,
        tokenizer,
        window=command.window,
        adaptation=command.adaptation or False,
        residual=command.residual or (True if not command.lora else None),
        lora=command.lora or None,
    )


def _adaptation(
    command: Any, grafted: Any, tokenizer: Any, documents: Any, held_out: Any, progress: Any, lines: _Lines
) -> LoopResult[HeldOutText]:
    from titans.hf.graft.feature_cache import FeatureCache, write_features
    from titans.train.graft.features import units_without_facts
    from titans.train.graft.meta import fit_adaptation

    folder = command.features or command.output / "features"
    if documents is None or held_out is None:
        cache = FeatureCache(folder)
    else:
        units = units_without_facts(tokenizer, documents, held_out, command.cached)
        cache = write_features(grafted._windowed, units, folder, (), progress.features)
    if grafted.tokenizer is None:
        grafted.tokenizer = tokenizer
    return fit_adaptation(grafted, cache, command.output, command.meta, lines)


class _Lines:
    """A line on stderr now and then."""

    def __init__(self) -> None:
        self._last = 0.0
        self._first: tuple[int, float] | None = None

    def __call__(self, line: dict[str, Any]) -> None:
        step, steps, now = line["step"], line["steps"], time.perf_counter()
        if line["kind"] == "held out":
            report(f"step {step}/{steps} · held-out text {line['score']:+.2%} against the base")
            return
        if self._first is None:
            self._first = step, now
        if now - self._last < SECONDS_BETWEEN_LINES and step < steps:
            return
        self._last = now
        parts = [f"step {step}/{steps}", f"loss {line['loss']:.4f}"]
        if (done := step - self._first[0]) > 0:
            parts.append(f"{clock((now - self._first[1]) / done * (steps - step))} left")
        report(" · ".join(parts))
