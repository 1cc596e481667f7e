"""From a graft and documents to a trained graft in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from titans.data import Document
from titans.hf.graft.base import WindowedBase
from titans.hf.graft.feature_cache import FeatureCache, FeatureProgress
from titans.hf.graft.modeling import GraftedForCausalLM
from titans.hf.graft.window import Window
from titans.train.graft.features import FeaturePlan, FeatureSettings
from titans.train.graft.fit import AssociationTraining
from titans.train.graft.held_out import HeldOut
from titans.train.graft.loop import LoopResult
from titans.train.graft.settings import GraftTraining


def fit_graft(
    grafted: GraftedForCausalLM,
    documents: Sequence[Document] | None,
    held_out: Sequence[Document] | None,
    output: Path,
    *,
    tokenizer: Any = None,
    features: Path | None = None,
    cached: FeatureSettings | None = None,
    training: GraftTraining | None = None,
    on_plan: Callable[[FeaturePlan], None] = lambda _: None,
    on_features: Callable[[FeatureProgress], None] = lambda _: None,
    on_log: Callable[[dict[str, Any]], None] = lambda _: None,
) -> LoopResult[HeldOut]:
    """Train a graft's association, and save the graft; the same call continues what was interrupted.

    The base reads the documents and blocks with made-up facts once; what it computes is kept on disk. Then
    the association is trained on that. At the end the graft has the best weights by held-out facts and text.

    Args:
        grafted: with an association; changed in place.
        documents, held_out: for training, and for deciding what is best; they must share nothing. Both None
            for `features` that are complete.
        output: folder for the graft, its checkpoints and metrics.jsonl.
        tokenizer: by default the graft's own.
        features: folder for what the base computes; by default `output`/features.
        on_plan: called before anything is read; the plan knows its size and time.

    Raises:
        ValueError: for a graft without an association, settings or documents that cannot be used, or folders
            of another training.
        OSError: if a folder cannot be written, or has too little room.
        FloatingPointError: if a loss is not finite.
    """
    tokenizer = grafted.tokenizer if tokenizer is None else tokenizer
    if (association := grafted.association) is None:
        raise ValueError("this graft has no association: make it with titans.graft(…, association=True)")
    if grafted.residual is not None:
        raise ValueError("residual branches change what is cached: train the association without them")
    if tokenizer is None:
        raise ValueError("tokenizer: the graft has none; give the base's own")
    training = training or GraftTraining()
    training.check()
    base = WindowedBase(grafted.base, Window(grafted.config.window, grafted.config.sinks))
    folder = features or output / "features"
    if documents is None or held_out is None:
        cache = FeatureCache(folder)
        cache.check_base(base)
    else:
        plan = FeaturePlan(base, tokenizer, documents, held_out, association.layers, cached, training.seed)
        on_plan(plan)
        cache = plan.write(folder, on_features)
    result = AssociationTraining(association, base.head, cache, output, training).run(on_log)
    if result.finished:
        if grafted.tokenizer is None:
            grafted.tokenizer = tokenizer
        grafted.save_pretrained(output)
    return result
