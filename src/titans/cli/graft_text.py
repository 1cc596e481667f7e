"""What `titans graft` does for `--train adaptation` and `--train inside`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from titans.cli.errors import UsageError
from titans.cli.graft_report import Progress, finish, interruptible

if TYPE_CHECKING:
    from titans.train.graft.loop import LoopResult
    from titans.train.graft.text import HeldOutText

# With which an adaptation begins that is trained, unless others are given: all that training can change.
TRAINABLE = {"learned_start": True, "half_life": 200_000.0, "momentum": 0.05}


def train_on_text(command: Any, documents: list[Any] | None, held_out: list[Any] | None) -> int:
    """Train and save, reporting to stderr."""
    settings = command.meta if command.train == "adaptation" else command.inside
    model, tokenizer = command.open_model(command.checkpoint)
    grafted, progress = _grafted(command, model, tokenizer), Progress(_step, _held_out)
    with interruptible():
        if command.train == "adaptation":
            result = _adaptation(command, grafted, tokenizer, documents, held_out, progress)
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
                on_log=progress.training,
            )
    finish(command, settings, result, lambda: _outcome(result))
    return 0


def _step(line: dict[str, Any]) -> list[str]:
    return [f"loss {line['loss']:.4f}"]


def _held_out(line: dict[str, Any]) -> str:
    return f"held-out text {line['score']:+.2%} against the base"


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
    command: Any, grafted: Any, tokenizer: Any, documents: Any, held_out: Any, progress: Progress
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
    return fit_adaptation(grafted, cache, command.output, command.meta, progress.training)
