"""Recall of facts after texts of several lengths, on cached features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from titans.hf.graft.feature_cache import FeatureCache, Features
from titans.nn.adaptation import LinearHead
from titans.nn.association import Association, AssociationState
from titans.state import map_state
from titans.train.graft.held_out import answered
from titans.train.graft.rows import Stretch

# Tokens that are read at once.
_AT_ONCE = 512


@torch.no_grad()
def recall_after(
    association: Association,
    head: LinearHead,
    cache: FeatureCache,
    group: str,
    text: Features,
    lengths: Sequence[int],
    together: int = 4,
) -> dict[int, np.ndarray]:
    """Whether facts are recalled after a text: for each length, 0 or 1 for each answer.

    Args:
        group: of the cache, with facts. Those of `together` episodes are stated in one memory, then it reads
            the text, then all are asked for.
        text: one row, of at least max(lengths) tokens; its last ones are read.
    """
    device = association.trained.device
    episodes = [(path, row) for path in cache.files(group) for row in range(cache.shape(path)[0])]
    episodes = episodes[: len(episodes) // together * together]
    found = [cache.load(path, slice(row, row + 1)) for path, row in episodes]
    memories = [found[i : i + together] for i in range(0, len(found), together)]
    stated, asked = (
        Stretch.of([[parts[part] for parts in memory] for memory in memories]).to(device)
        for part in ("statements", "questions")
    )
    state = association.read(stated.states, stated.hidden, stated.ids, head.weight).state
    hits = {}
    for length in lengths:
        after = _after(association, head, state, Stretch.of([[_last(text, length)]]).to(device))
        read = association.read(asked.states, asked.hidden, asked.ids, head.weight, after)
        hits[length] = answered(association, head, asked, read)[0]
    return hits


def _last(text: Features, count: int) -> Features:
    cut = slice(text.ids.shape[1] - count, None)
    rest = (x[:, cut] for x in (text.hidden, text.ids, text.flags, text.normaliser))
    return Features(tuple(state[:, cut] for state in text.states), *rest)


def _after(
    association: Association, head: LinearHead, state: AssociationState, text: Stretch
) -> AssociationState:
    """The states of all rows after the same text.

    Its words change the fast weights by an affine map, W ↦ W A + B, that does not depend on W. A and B are
    found by reading the text with W = 0 and with the parts of an identity: as many rows as 1 + F / hidden,
    however many memories there are. What the rows read before differs in the first keys alone, for which
    that of the first row stands.
    """
    size, features = association.hidden_size, association.feature_size
    eye = torch.eye(features, dtype=state.weight.dtype, device=state.weight.device)
    parts = eye.split(size)
    weights = [torch.zeros_like(state.weight[0]), *(F.pad(p, (0, 0, 0, size - len(p))) for p in parts)]
    rows = len(weights)
    probe = map_state(lambda x: x[:1].expand(rows, *x.shape[1:]), state)
    probe = replace(probe, weight=torch.stack(weights))
    for begin in range(0, text.ids.shape[1], _AT_ONCE):
        at = slice(begin, begin + _AT_ONCE)
        states = [x[:, at].expand(rows, -1, -1) for x in text.states]
        hidden, ids = text.hidden[:, at].expand(rows, -1, -1), text.ids[:, at].expand(rows, -1)
        probe = association.read(states, hidden, ids, head.weight, probe).state
    bias = probe.weight[0]
    linear = torch.cat([probe.weight[i + 1][: len(p)] - bias[: len(p)] for i, p in enumerate(parts)])
    after = map_state(lambda x: x[:1].expand(len(state.weight), *x.shape[1:]), probe)
    return replace(after, weight=state.weight @ linear + bias)
