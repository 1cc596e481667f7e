"""The trainings of `titans graft`, and what each of them reports."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from titans.cli.errors import UsageError
from titans.cli.graft_report import Progress, Training, finish, interruptible
from titans.cli.terminal import report
from titans.train.progress import clock

if TYPE_CHECKING:
    from titans.train.graft.loop import LoopResult

# With which an adaptation begins that is trained, unless others are given: all that training can change.
TRAINABLE = {"learned_start": True, "half_life": 200_000.0, "momentum": 0.05}


def train(command: Any, kind: str, documents: list[Any] | None, held_out: list[Any] | None) -> int:
    """Train and save, reporting to stderr.

    Args:
        command: a `Graft`. kind: what it trains, "both" for what a graft has of association and adaptation.
    """
    model, tokenizer = command.open_model(command.checkpoint)
    grafted = _grafted(command, kind, model, tokenizer)
    trainings = {
        "association": Training(command.training, _step_of_recall, _recalled, _recall_outcome),
        "adaptation": Training(command.meta, _step_of_text, _text, _text_outcome),
        "inside": Training(command.inside, _step_of_text, _text, _text_outcome),
    }
    progress = Progress(trainings)
    with interruptible():
        if kind == "inside":
            assert documents is not None and held_out is not None
            from titans.train.graft.through import fit_through

            result = fit_through(
                grafted,
                documents,
                held_out,
                command.output,
                tokenizer=tokenizer,
                training=command.inside,
                on_log=lambda line: progress.training(kind, line),
            )
            results: dict[str, LoopResult[Any]] = {kind: result}
        else:
            from titans.train.graft.run import fit_graft

            results = fit_graft(
                grafted,
                documents,
                held_out,
                command.output,
                trained=None if kind == "both" else [kind],
                tokenizer=tokenizer,
                features=command.features,
                cached=command.cached,
                training=command.training,
                meta=command.meta,
                on_plan=lambda plan: _report(command, plan),
                on_features=progress.features,
                on_log=progress.training,
            )
    finish(command, trainings, results)
    return 0


def _grafted(command: Any, kind: str, model: Any, tokenizer: Any) -> Any:
    from titans.hf.graft import GraftedForCausalLM, graft

    given = {name: getattr(command, name) for name in ("association", "adaptation", "residual", "lora")}
    if isinstance(model, GraftedForCausalLM):
        for name, settings in given.items():
            if settings:
                raise UsageError(f"{name}: a graft's own settings cannot change; leave it out")
        return model
    untrained: dict[str, dict[str, Any]] = {
        "both": {"association": True, "adaptation": TRAINABLE},
        "association": {"association": True, "adaptation": True},
        "adaptation": {"association": None, "adaptation": TRAINABLE},
        "inside": {"adaptation": False, "residual": None if command.lora else True},
    }
    return graft(
        model,
        tokenizer,
        window=command.window,
        **{**untrained[kind], **{name: settings for name, settings in given.items() if settings}},
    )


def _report(command: Any, plan: Any) -> None:
    seconds = plan.seconds()
    report(
        f"features: {plan.tokens:,} tokens, {plan.bytes / 1e9:.2f} GB in "
        f"{command.features or command.output / 'features'}; about {clock(seconds)} on this machine"
    )


def _step_of_recall(line: dict[str, Any]) -> list[str]:
    return [
        f"loss {line['loss']:+.4f}",
        f"text {line['text']:+.4f} nats",
        f"{line['tokens_per_second']:,.0f} tokens/s",
    ]


def _recalled(found: dict[str, Any]) -> str:
    recall = ", ".join(
        f"{share:.0%} of {group.replace('-', ' ')}" for group, share in found["recall"].items()
    )
    worst = max(found["text"].values(), default=0.0)
    mean = sum(found["text"].values()) / max(len(found["text"]), 1)
    return f"recalled {recall or 'nothing yet'} · held-out text {mean:+.2%}, worst {worst:+.2%}"


def _recall_outcome(result: LoopResult[Any]) -> str:
    return _recalled(dataclasses.asdict(result.held_out)) if result.held_out else "no evaluation"


def _step_of_text(line: dict[str, Any]) -> list[str]:
    return [f"loss {line['loss']:.4f}"]


def _text(line: dict[str, Any]) -> str:
    return f"held-out text {line['score']:+.2%} against the base"


def _text_outcome(result: LoopResult[Any]) -> str:
    assert result.untrained is not None and result.held_out is not None
    before, after = result.untrained.mean, result.held_out.mean
    if not result.best_step:
        return f"no step was better on all held-out text, so nothing changed ({before:+.2%} against the base)"
    return (
        f"held-out text {after:+.2%} against the base, {before:+.2%} before the training; kept are the "
        f"weights of step {result.best_step}"
    )
