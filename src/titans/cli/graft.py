"""`titans graft`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from titans.cli.errors import UsageError
from titans.cli.graft_report import Progress, finish, interruptible
from titans.cli.models import ModelOptions
from titans.cli.outputs import check_run_folder
from titans.cli.terminal import report
from titans.cli.train import FIELDS
from titans.train.graft.settings import (
    SETTINGS_FILE,
    AdaptationTraining,
    FeatureSettings,
    GraftTraining,
    ThroughTraining,
)
from titans.train.progress import clock


@dataclass(frozen=True)
class Graft(ModelOptions):
    """Give a pretrained model a memory, and train it.

    Example: titans graft smollm2-135m --data books/ notes.txt --output grafted

    By default the memory is one that recalls. The model itself does not change. It reads the texts and blocks
    with made-up facts once, what it computes is kept on disk, and the memory is trained on that. The output
    folder is then a graft, for `titans chat`, `memorize`, `generate`, `inspect` and `eval`. After Ctrl-C or a
    full disk the same command goes on.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a causal model of transformers, of a graft with such a memory, or the name of a model."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the graft, checkpoints and metrics.jsonl."""
    train: Literal["association", "adaptation", "inside"] = "association"
    """What is trained: the memory that recalls; the numbers and the start of the one that learns the model's
    own loss, also on what the model computes; or memories inside the model, through the model."""
    data: tuple[str, ...] = ()
    """Corpora to train on: text files, folders, hf:NAME, or built-in names such as shakespeare, bible or
    austen/emma. Documents are taken from each in turn until there are enough tokens. May be left out if the
    features of an earlier training are given."""
    held_out: tuple[str, ...] = ()
    """Corpora that decide which weights are best, instead of a tenth of the documents of data. Their
    documents are left out of data."""
    features: Path | None = None
    """Folder for what the model computes; by default features in the output folder. May be removed later."""
    window: int = 512
    """Tokens that the model's attention sees."""
    association: Annotated[dict[str, Any], FIELDS] = field(default_factory=dict)
    """Settings of titans.nn.association.Association that differ from the default, such as
    feature_size=576."""
    adaptation: Annotated[dict[str, Any], FIELDS] = field(default_factory=dict)
    """Settings of titans.nn.adaptation.Adaptation; with --train inside there is none without them."""
    residual: Annotated[dict[str, Any], FIELDS] = field(default_factory=dict)
    """With --train inside: layers and settings of titans.NeuralMemory that differ from the default."""
    lora: Annotated[dict[str, Any], FIELDS] = field(default_factory=dict)
    """With --train inside: also train low-rank changes of the model's linear layers, such as rank=8."""
    cached: FeatureSettings = field(default_factory=FeatureSettings)
    """What the model reads."""
    training: GraftTraining = field(default_factory=GraftTraining)
    """How the memory that recalls is trained."""
    meta: AdaptationTraining = field(default_factory=AdaptationTraining)
    """How --train adaptation trains."""
    inside: ThroughTraining = field(default_factory=ThroughTraining)
    """How --train inside trains."""
    threads: int | None = None
    """CPU threads; by default as many as there are free processors."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Cache, train and save, reporting to stderr."""
        if self.graft:
            raise UsageError("graft: this command grafts the model anyway; leave it out")
        for settings in (self.cached, self.training, self.meta, self.inside):
            try:
                settings.check()
            except ValueError as error:
                raise UsageError(str(error)) from None
        check_run_folder("output", self.output, SETTINGS_FILE)
        documents, held_out = self._documents()
        if self.train != "association":
            from titans.cli.graft_text import train_on_text

            return train_on_text(self, documents, held_out)
        model, tokenizer = self.open_model(self.checkpoint)
        from titans.train.graft.run import fit_graft

        progress = Progress(_step, _held_out)
        with interruptible():
            result = fit_graft(
                self._grafted(model, tokenizer),
                documents,
                held_out,
                self.output,
                tokenizer=tokenizer,
                features=self.features,
                cached=self.cached,
                training=self.training,
                on_plan=self._report,
                on_features=progress.features,
                on_log=progress.training,
            )
        finish(self, self.training, result, lambda: _outcome(result))
        return 0

    def _documents(self) -> tuple[list[Any] | None, list[Any] | None]:
        if not self.data:
            if self.features is None or not self.features.is_dir():
                raise UsageError("data: none given; name texts, or the folder of features that are there")
            return None, None
        from titans.data import hold_out, in_turn, load_corpus

        found = in_turn([load_corpus(source) for source in self.data])
        if self.held_out:
            held_out = [document for source in self.held_out for document in load_corpus(source)]
            texts = {document.data for document in held_out}
            return [document for document in found if document.data not in texts], held_out
        return hold_out(found)

    def _grafted(self, model: Any, tokenizer: Any) -> Any:
        from titans.hf.graft import GraftedForCausalLM, graft

        if not isinstance(model, GraftedForCausalLM):
            return graft(model, tokenizer, window=self.window, association=self.association or True)
        if self.association:
            raise UsageError("association: a graft's own settings cannot change; leave it out")
        return model

    def _report(self, plan: Any) -> None:
        seconds = plan.seconds()
        report(
            f"features: {plan.tokens:,} tokens, {plan.bytes / 1e9:.2f} GB in "
            f"{self.features or self.output / 'features'}; about {clock(seconds)} on this machine"
        )


def _step(line: dict[str, Any]) -> list[str]:
    return [
        f"loss {line['loss']:+.4f}",
        f"text {line['text']:+.4f} nats",
        f"{line['tokens_per_second']:,.0f} tokens/s",
    ]


def _outcome(result: Any) -> str:
    assert result.held_out is not None
    return _held_out(dataclasses.asdict(result.held_out))


def _held_out(found: dict[str, Any]) -> str:
    recall = ", ".join(
        f"{share:.0%} of {group.replace('-', ' ')}" for group, share in found["recall"].items()
    )
    worst = max(found["text"].values(), default=0.0)
    mean = sum(found["text"].values()) / max(len(found["text"]), 1)
    return f"recalled {recall or 'nothing yet'} · held-out text {mean:+.2%}, worst {worst:+.2%}"
