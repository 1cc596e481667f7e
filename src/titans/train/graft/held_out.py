"""How well an association recalls held-out facts, and what it does to held-out text, on cached features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.data.facts_blocks import ANSWER
from titans.hf.graft.feature_cache import FeatureCache, Features
from titans.nn.adaptation import LinearHead
from titans.nn.association import Association, AssociationRead
from titans.train.graft.rows import Stretch
from titans.train.graft.vocabulary import SampledWords, label_log_probs, mixture_changes

# Rows of an evaluation: so many episodes are stated in each, then blocks of text, then all are asked for.
_ROWS, _EPISODES, _BLOCKS_BETWEEN = 8, 4, 8
_TEXT_TOKENS, _DOCUMENTS = 4096, 4
_OTHER_WORDS = 2048
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
        text[cache.about(path) or path.stem] = text_change(association, head, features)
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
    stretch = Stretch.of(rows).to(association.trained.device)
    found = association.read(stretch.states, stretch.hidden, stretch.ids, head.weight)
    hits, nats = answered(association, head, stretch, found)
    return float(hits.mean()), float(nats.mean())


def answered(
    association: Association, head: LinearHead, stretch: Stretch, found: AssociationRead
) -> tuple[np.ndarray, Tensor]:
    """Whether each answer of the stretch is recalled, (answers,) of 0 and 1, and −log p of all their tokens.

    An answer is recalled if each of its tokens is the most probable one.
    """
    asked = (stretch.flags[:, 1:] == ANSWER) & stretch.follows[:, :-1]
    labels = stretch.ids[:, 1:][asked]
    right, nats = torch.zeros_like(asked), []
    at = torch.nonzero(asked)
    for piece, wanted in zip(at.split(256), labels.split(256), strict=True):
        rows, times = piece.T
        before = head.logits(stretch.hidden[rows, times]).float().log_softmax(-1)
        recalled = association.word_logits(found.reads[rows, times], head.weight).float().log_softmax(-1)
        mixing = found.mixing[rows, times, None].float()
        log_probs = torch.logaddexp(F.logsigmoid(-mixing) + before, F.logsigmoid(mixing) + recalled)
        right[rows, times] = log_probs.argmax(-1) == wanted
        nats.append(-log_probs.gather(1, wanted[:, None])[:, 0])
    hits = [_answers(row, hit) for row, hit in zip(asked, right, strict=True)]
    return np.concatenate(hits), torch.cat(nats)


def _answers(asked: Tensor, right: Tensor) -> np.ndarray:
    """For every run of `asked` (time,) whether all of it is right."""
    inside, hit = asked.cpu().numpy(), right.cpu().numpy()
    runs = np.split(np.arange(len(inside)), np.flatnonzero(np.diff(inside)) + 1)
    return np.array([hit[run].all() for run in runs if len(run) and inside[run[0]]], dtype=np.float64)


@torch.no_grad()
def text_change(association: Association, head: LinearHead, features: Features) -> float:
    """How the memory changes the loss of a text, one row, as a share of it: better if negative. Estimated."""
    stretch = Stretch.of([[features]]).to(association.trained.device)
    found = association.read(stretch.states, stretch.hidden, stretch.ids, head.weight)
    sample = SampledWords(stretch.ids, len(head.weight), _OTHER_WORDS, np.random.default_rng(0))
    at = torch.arange(stretch.ids.shape[1] - 1, device=stretch.ids.device)
    changes = torch.cat(
        [changes_at(association, head, stretch, found, piece, sample) for piece in at.split(256)]
    )
    log_probs = label_log_probs(head, stretch.hidden[0, :-1], stretch.normaliser[0, :-1], stretch.ids[0, 1:])
    return float(changes.sum() / -log_probs.sum())


def changes_at(
    association: Association,
    head: LinearHead,
    stretch: Stretch,
    found: AssociationRead,
    at: Tensor,
    sample: SampledWords,
) -> Tensor:
    """How the memory changes −log p of the next token, in nats, at places (n,) of the stretch.

    Args:
        at: int64, places in (rows, time − 1), flattened.
    """

    def chosen(x: Tensor) -> Tensor:
        return x[:, :-1].flatten(0, 1)[at]

    labels = stretch.ids[:, 1:].flatten()[at]
    log_probs = label_log_probs(head, chosen(stretch.hidden), chosen(stretch.normaliser), labels)
    rows = head.weight[sample.ids].to(found.reads.dtype)
    words = association.word_logits(chosen(found.reads), rows, sample.ids)
    return mixture_changes(log_probs, chosen(found.mixing), words, labels, sample)
