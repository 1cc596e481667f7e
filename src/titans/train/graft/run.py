"""From a graft and documents to a trained graft in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from titans.data import Document
from titans.hf.graft.base import WindowedBase
from titans.hf.graft.feature_cache import FeatureCache, FeatureProgress
from titans.hf.graft.modeling import GraftedForCausalLM
from titans.hf.graft.window import Window
from titans.train.graft.features import FeaturePlan
from titans.train.graft.fit import AssociationTraining
from titans.train.graft.loop import LoopResult
from titans.train.graft.meta import MetaTraining
from titans.train.graft.settings import AdaptationTraining, FeatureSettings, GraftTraining

# What is trained on cached features, in this order.
ON_FEATURES = ("association", "adaptation")


def fit_graft(
    grafted: GraftedForCausalLM,
    documents: Sequence[Document] | None,
    held_out: Sequence[Document] | None,
    output: Path,
    *,
    trained: Sequence[str] | None = None,
    tokenizer: Any = None,
    features: Path | None = None,
    cached: FeatureSettings | None = None,
    training: GraftTraining | None = None,
    meta: AdaptationTraining | None = None,
    on_plan: Callable[[FeaturePlan], None] = lambda _: None,
    on_features: Callable[[FeatureProgress], None] = lambda _: None,
    on_log: Callable[[str, dict[str, Any]], None] = lambda *_: None,
) -> dict[str, LoopResult[Any]]:
    """Train a graft's association and its adaptation, and save the graft; the same call continues what was
    interrupted.

    The base reads the documents, and for an association blocks with made-up facts, once; what it computes is
    kept on disk. The memories are trained on that, one after the other. Each of them ends with the weights
    that are best on what is held out, and the graft is saved.

    Args:
        grafted: changed in place.
        documents, held_out: for training, and for deciding what is best; they must share nothing. Both None
            for `features` that are complete.
        output: folder for the graft, and for checkpoints and metrics.jsonl of the first training; those of
            another one are in a folder of its name in it.
        trained: "association", "adaptation" or both; by default those that the graft has.
        tokenizer: by default the graft's own.
        features: folder for what the base computes; by default `output`/features.
        training: of the association. meta: of the adaptation.
        on_plan: called before anything is read; the plan knows its size and time.
        on_log: called with the name of what is trained, and a line of its metrics.jsonl.

    Returns how each training ended; without those that did not begin, because one before was interrupted.

    Raises:
        ValueError: for a graft without such a memory, settings or documents that cannot be used, or folders
            of another training.
        OSError: if a folder cannot be written, or has too little room.
        FloatingPointError: if a loss is not finite.
    """
    names = _trained(grafted, trained)
    training, meta = training or GraftTraining(), meta or AdaptationTraining()
    training.check()
    meta.check()
    tokenizer = grafted.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer: the graft has none; give the base's own")
    grafted.check_tokenizer(tokenizer)
    association, adaptation = grafted.association, grafted.adaptation
    base = WindowedBase(grafted.base, Window(grafted.config.window, grafted.config.sinks))
    folder = features or output / "features"
    if documents is None or held_out is None:
        cache = FeatureCache(folder)
        cache.check_base(base)
    else:
        layers = None if association is None or "association" not in names else association.layers
        plan = FeaturePlan(base, tokenizer, documents, held_out, layers, cached, training.seed)
        on_plan(plan)
        cache = plan.write(folder, on_features)
    if grafted.tokenizer is None:
        grafted.tokenizer = tokenizer
    results: dict[str, LoopResult[Any]] = {}
    for name in names:
        place = output if name == names[0] else output / name
        loop: AssociationTraining | MetaTraining
        if name == "association":
            assert association is not None
            loop = AssociationTraining(association, base.head, cache, place, training)
        else:
            assert adaptation is not None
            loop = MetaTraining(adaptation, base.head, cache, place, meta)
        results[name] = loop.run(partial(on_log, name))
        if not results[name].finished:
            break
        grafted.save_pretrained(output)
    return results


def _trained(grafted: GraftedForCausalLM, asked: Sequence[str] | None) -> list[str]:
    """What is trained, in order; ValueError for what the graft lacks."""
    if grafted.residual is not None:
        raise ValueError("residual branches change what is cached: train this graft through the model")
    names = [name for name in ON_FEATURES if getattr(grafted, name) is not None]
    for name in asked or ():
        if name not in ON_FEATURES:
            raise ValueError(f"trained has {name!r}: choose from {', '.join(ON_FEATURES)}")
        if name not in names:
            raise ValueError(f"this graft has no {name}: make it with titans.graft(…, {name}=True)")
    if not names:
        raise ValueError("this graft has no memory: make it with titans.graft(…, association=True)")
    return names if asked is None else [name for name in names if name in asked]
