"""`titans graft`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from titans.cli.errors import UsageError
from titans.cli.models import ModelOptions
from titans.cli.outputs import check_run_folder
from titans.cli.train import FIELDS
from titans.train.graft.settings import (
    SETTINGS_FILE,
    AdaptationTraining,
    FeatureSettings,
    GraftTraining,
    ThroughTraining,
)

# What a graft has whose memories are trained; of those that are not named, settings would be for nothing.
_HAS = {
    "both": ("association", "adaptation"),
    "association": ("association", "adaptation"),
    "adaptation": ("adaptation",),
    "inside": ("adaptation", "residual", "lora"),
}


@dataclass(frozen=True)
class Graft(ModelOptions):
    """Give a pretrained model memories, and train them.

    Example: titans graft smollm2-135m --data books/ notes.txt --output grafted

    One memory recalls, and one learns the model's own loss. The model itself does not change. It reads the
    texts and blocks with made-up facts once, what it computes is kept on disk, and the memories are trained
    on that, one after the other. The output folder is then a graft, for `titans chat`, `memorize`,
    `generate`, `inspect` and `eval`. After Ctrl-C or a full disk the same command goes on.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a causal model of transformers, of a graft with such memories, or the name of a model."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the graft, checkpoints and metrics.jsonl."""
    train: Literal["association", "adaptation", "inside"] | None = None
    """What is trained, if not all that the graft has: the memory that recalls; the numbers and the start of
    the one that learns the model's own loss; or memories inside the model, through the model."""
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
    """Settings of titans.nn.adaptation.Adaptation, all that differ from the default; without them one that is
    trained has learned_start=true half_life=200000 momentum=0.05, and with --train inside there is none."""
    residual: Annotated[dict[str, Any], FIELDS] = field(default_factory=dict)
    """Train memories inside the model: layers and settings of titans.NeuralMemory that differ from the
    default."""
    lora: Annotated[dict[str, Any], FIELDS] = field(default_factory=dict)
    """Train low-rank changes of the model's linear layers through the model, such as rank=8."""
    cached: FeatureSettings = field(default_factory=FeatureSettings)
    """What the model reads."""
    training: GraftTraining = field(default_factory=GraftTraining)
    """How the memory that recalls is trained."""
    meta: AdaptationTraining = field(default_factory=AdaptationTraining)
    """How the memory that learns the model's own loss is trained."""
    inside: ThroughTraining = field(default_factory=ThroughTraining)
    """How memories inside the model and low-rank changes are trained."""
    threads: int | None = None
    """CPU threads; by default as many as there are free processors."""
    json: bool = False
    """Print the results as one JSON object."""

    def run(self) -> int:
        """Cache, train and save, reporting to stderr."""
        if self.graft:
            raise UsageError("graft: this command grafts the model anyway; leave it out")
        for settings in (self.cached, self.training, self.meta, self.inside):
            try:
                settings.check()
            except ValueError as error:
                raise UsageError(str(error)) from None
        kind = self._kind()
        for name in ("association", "adaptation", "residual", "lora"):
            if getattr(self, name) and name not in _HAS[kind]:
                raise UsageError(f"{name}: a graft for --train {kind} has none; leave it out")
        check_run_folder("output", self.output, SETTINGS_FILE)
        documents, held_out = self._documents(kind)
        from titans.cli.graft_trainings import train

        return train(self, kind, documents, held_out)

    def _kind(self) -> str:
        """What is trained; "both" is what a graft has of the two that learn from features."""
        if self.train is not None:
            return self.train
        if self.residual or self.lora:
            return "inside"
        # Of a graft that exists its configuration decides.
        if (self.checkpoint / "config.json").is_file():
            from titans.zoo.checkpoint import config_fields

            fields = config_fields(self.checkpoint)
            if fields.get("model_type") == "titans-graft" and (fields.get("residual") or fields.get("lora")):
                return "inside"
        return "both"

    def _documents(self, kind: str) -> tuple[list[Any] | None, list[Any] | None]:
        if not self.data:
            if kind == "inside":
                raise UsageError("data: none given; training through the model reads texts")
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
