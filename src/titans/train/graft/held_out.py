"""How well an association recalls held-out facts, and what it does to held-out text, on cached features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from titans.data.facts_blocks import ANSWER
from titans.hf.graft.feature_cache import FeatureCache, Features
from titans.nn.adaptation import LinearHead
from titans.nn.association import Association
from titans.train.graft.rows import Stretch
from titans.train.graft.vocabulary import SampledVocabulary

# Rows of an evaluation: so many episodes are stated in each, then blocks of text, then all are asked for.
_ROWS, _EPISODES, _BLOCKS_BETWEEN = 8, 4, 8
_TEXT_TOKENS, _DOCUMENTS = 4096, 4
_NEGATIVES = 2048
# What 1 % more loss on the worst document counts against a nat of an answer's token.
_HARM = 0.5


@dataclass(frozen=True)
class HeldOut:
    """recall: for each group of held-out facts the share of answers of which every token is the most probable
    one. answers: mean nats of an answer's token, over the groups. text: for each document the change of the
    loss against the base, as a share of it, estimated."""

    recall: dict[str, float]
    answers: float
    text: dict[str, float]

    @property
    def score(self) -> float:
        """Lower is better: recall, and no document worse than without the memory."""
        return self.answers + 100 * _HARM * max(self.text.values(), default=0.0)


@torch.no_grad()
def measure(association: Association, head: LinearHead, cache: FeatureCache) -> HeldOut:
    """Read the cache's groups whose names begin with "facts-", and "text-held-out"."""
    filler = _filler(cache)
    recall, answers = {}, []
    for group in cache.groups():
        if group.startswith("facts-") and cache.files(group):
            recall[group], nats = _facts(association, head, cache, group, filler)
            answers.append(nats)
    text = {}
    for path in cache.files("text-held-out")[:_DOCUMENTS]:
        features = cache.load(path, tokens=slice(0, _TEXT_TOKENS))["text"]
        text[cache.about(path) or path.stem] = _text(association, head, features)
    return HeldOut(recall, float(np.mean(answers)) if answers else 0.0, text)


def _filler(cache: FeatureCache) -> Features | None:
    """Text between statements and questions."""
    facts = [path for group in cache.groups() if group.startswith("facts-") for path in cache.files(group)]
    documents = cache.files("text-held-out")
    if not facts or not documents:
        return None
    wanted = _BLOCKS_BETWEEN * cache.shape(facts[0])[1]
    length = cache.shape(documents[0])[1]
    return cache.load(documents[0], tokens=slice(max(length - wanted, 0), length))["text"]


def _facts(
    association: Association, head: LinearHead, cache: FeatureCache, group: str, filler: Features | None
) -> tuple[float, float]:
    rows = []
    episodes = [(path, row) for path in cache.files(group) for row in range(cache.shape(path)[0])]
    for begin in range(0, min(len(episodes) // _EPISODES * _EPISODES, _ROWS * _EPISODES), _EPISODES):
        found = [cache.load(path, slice(row, row + 1)) for path, row in episodes[begin : begin + _EPISODES]]
        between = [] if filler is None else [filler]
        rows.append([*(p["statements"] for p in found), *between, *(p["questions"] for p in found)])
    if not rows:
        return 0.0, 0.0
    stretch = Stretch.of(rows).to(association.scale.device)
    changed = association(stretch.states, stretch.hidden, stretch.ids, head.weight)[0]
    asked = (stretch.flags[:, 1:] == ANSWER) & stretch.follows[:, :-1]
    labels = stretch.ids[:, 1:][asked]
    logits = torch.cat([head.logits(piece).float() for piece in changed[:, :-1][asked].split(256)])
    right = torch.zeros_like(asked)
    right[asked] = logits.argmax(-1) == labels
    hits = [_answers(row, hit) for row, hit in zip(asked, right, strict=True)]
    nats = logits.logsumexp(-1) - logits.gather(1, labels[:, None])[:, 0]
    return float(np.mean(np.concatenate(hits))), float(nats.mean())


def _answers(asked: Tensor, right: Tensor) -> np.ndarray:
    """For every run of `asked` (time,) whether all of it is right."""
    inside, hit = asked.cpu().numpy(), right.cpu().numpy()
    runs = np.split(np.arange(len(inside)), np.flatnonzero(np.diff(inside)) + 1)
    return np.array([hit[run].all() for run in runs if len(run) and inside[run[0]]], dtype=np.float64)


def _text(association: Association, head: LinearHead, features: Features) -> float:
    stretch = Stretch.of([[features]]).to(association.scale.device)
    changed = association(stretch.states, stretch.hidden, stretch.ids, head.weight)[0]
    vocabulary = SampledVocabulary(head, stretch.ids, _NEGATIVES, np.random.default_rng(0))
    changes, losses = [], []
    for begin in range(0, features.ids.shape[1] - 1, 256):
        part, following = slice(begin, begin + 256), slice(begin + 1, begin + 257)
        labels = stretch.ids[0, following]
        before, after, normaliser = (
            x[0, part][: len(labels)] for x in (stretch.hidden, changed, stretch.normaliser)
        )
        changes.append(vocabulary.changes(before, after, normaliser, labels))
        losses.append(vocabulary.losses(before, normaliser, labels))
    return float(torch.cat(changes).sum() / torch.cat(losses).sum())
