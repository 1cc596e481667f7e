"""How well a model predicts documents that it reads once, from beginning to end, at constant memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.stream.reader import Reader, StateReader, reader_of
from titans.stream.session import PIECE_LENGTH
from titans.stream.text import token_ids

TokenIds = Tensor | np.ndarray | Sequence[int]
POSITION_BOUNDS = (256, 1024, 4096, 16384, 65536, 262144, 1048576)
# Logits of one call: 256 MB in float32.
_MAX_LOGITS = 2**26


@dataclass(frozen=True)
class PositionLoss:
    """The loss of the tokens at positions begin to end − 1 of their documents; end is None for all the
    rest."""

    begin: int
    end: int | None
    tokens: int
    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True)
class Perplexity:
    """What `bits_per_byte` found.

    tokens: how many were predicted. perplexity: exp(nats_per_token). by_position: the ranges that occur.
    """

    bits_per_byte: float
    nats_per_token: float
    perplexity: float
    tokens: int
    by_position: tuple[PositionLoss, ...]


@dataclass(frozen=True)
class _Text:
    ids: Tensor
    bytes_per_token: float

    @property
    def num_predictions(self) -> int:
        return len(self.ids) - 1


def bits_per_byte(
    model: Any,
    documents: Sequence[tuple[TokenIds, int]],
    *,
    batch_size: int = 8,
    piece_length: int = PIECE_LENGTH,
    context_length: int | None = None,
    freeze_memory: bool = False,
    beginning: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Predict every token of every document from all that stands before it there, the cache carried along.

    Without a `beginning` a document's first token is read but not predicted; its bytes do not count (they are
    taken as the average of the document's tokens, which for a byte model is exact).

    Args:
        model: a Titans model or any causal LM of transformers with a cache; see `reader_of`.
        documents: token ids (n,) and the number of bytes they stand for.
        batch_size: documents read side by side.
        piece_length: most tokens of a document in one call; changes the speed alone.
        context_length: forget everything whenever so many tokens of a document have been read.
        freeze_memory: no memory learns, see `TitansModel.forward`; what persistent tokens have written stays.
            Titans models and grafts only.
        beginning: token ids that the model reads where a document begins and after it has forgotten
            everything, see `titans.data.leading_tokens`; they are not predicted and have no position.
        progress: called with the number of tokens predicted so far and in all.

    Raises:
        ValueError: for documents without a token to predict, or longer than the model has positions; foreign
            token ids, or numbers below 1; a memory to freeze where there is none.
    """
    for name, value in dict(
        batch_size=batch_size, piece_length=piece_length, context_length=context_length
    ).items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: give a whole number of at least 1")
    reader = _with_frozen_memory(reader_of(model)) if freeze_memory else reader_of(model)
    special = token_ids(list(beginning), None, reader.vocab_size).long()
    first, last = special[:-1], special[-1:]
    texts = sorted(_texts(reader, documents, context_length, last), key=lambda text: len(text.ids))
    total = sum(text.num_predictions for text in texts)
    if not total:
        raise ValueError(
            f"documents hold no token to predict: give at least one of {2 - len(last)} tokens or more"
        )
    reader.check_room(len(first) + texts[-1].num_predictions)
    bounds = torch.tensor(POSITION_BOUNDS)
    nats, num_bytes, tokens = (torch.zeros(len(bounds) + 1, dtype=torch.float64) for _ in range(3))
    done = 0
    for begin in range(0, len(texts), batch_size):
        group, position = texts[begin : begin + batch_size], 0
        cache = reader.start()
        # States as they are before the first token, persistent tokens read.
        reader.read(first.expand(len(group), -1), cache)
        while group := _drop_finished(group, cache, position):
            # A shorter piece where a document ends, then up to the next multiple again.
            most = max(1, min(piece_length, _MAX_LOGITS // (len(group) * reader.vocab_size)))
            length = min(most - position % most, group[0].num_predictions - position)
            ids = torch.stack([text.ids[position : position + length + 1].long() for text in group])
            losses = _losses(reader, ids, cache).cpu().double()
            predicted = torch.arange(position, position + length) + 1 - len(last)
            place = torch.bucketize(predicted, bounds, right=True)
            rates = torch.tensor([text.bytes_per_token for text in group], dtype=torch.float64)
            nats.index_add_(0, place, losses.sum(0))
            num_bytes.index_add_(0, place, rates.sum().expand(length))
            tokens.index_add_(0, place, torch.full((length,), len(group), dtype=torch.float64))
            position += length
            done += length * len(group)
            if progress is not None:
                progress(done, total)
    begins, ends = (0, *POSITION_BOUNDS), (*POSITION_BOUNDS, None)
    by_position = tuple(
        PositionLoss(begins[i], ends[i], int(tokens[i]), *_rates(nats[i], tokens[i], num_bytes[i]))
        for i in range(len(tokens))
        if tokens[i]
    )
    nats_per_token, bits = _rates(nats.sum(), tokens.sum(), num_bytes.sum())
    return Perplexity(bits, nats_per_token, math.exp(nats_per_token), done, by_position)


def score(
    model: Any,
    ids: TokenIds,
    cache: Any = None,
    *,
    piece_length: int = PIECE_LENGTH,
) -> Tensor:
    """The loss in nats of every token but the first, (n − 1,) on the CPU, each predicted from all before it.

    A cache of one row is what the model's reader read before; afterwards it has read ids[:-1], too.

    Raises:
        ValueError: for fewer than two tokens, or foreign token ids.
    """
    reader = reader_of(model)
    tokens = token_ids(ids, None, reader.vocab_size)
    if len(tokens) < 2:
        raise ValueError(f"ids holds {len(tokens)} token(s): give two or more, the first is not predicted")
    cache = reader.start() if cache is None else cache
    most = max(1, min(piece_length, _MAX_LOGITS // reader.vocab_size))
    losses = [
        _losses(reader, tokens[None, begin : begin + most + 1].long(), cache)[0].cpu()
        for begin in range(0, len(tokens) - 1, most)
    ]
    return torch.cat(losses)


def _texts(
    reader: Reader,
    documents: Sequence[tuple[TokenIds, int]],
    context_length: int | None,
    before: Tensor,
) -> list[_Text]:
    """Documents cut into windows; before: no token, or one that stands before each of them."""
    texts = []
    for ids, num_bytes in documents:
        tokens = token_ids(ids, None, reader.vocab_size)
        step = context_length or max(len(tokens), 1)
        # Without a token before it, a window begins with the last one that the window before predicted.
        shared = 1 - len(before)
        windows = [tokens[begin : begin + step + shared] for begin in range(0, len(tokens) - shared, step)]
        if len(before):
            windows = [torch.cat([before, window]) for window in windows]
        texts += [_Text(window, num_bytes / len(tokens)) for window in windows]
    return texts


def _with_frozen_memory(reader: Reader) -> Reader:
    if not isinstance(reader, StateReader):
        raise ValueError("freeze_memory=True: this model has no memory that could be frozen; leave it out")
    return reader.frozen()


def _drop_finished(group: list[_Text], cache: Any, position: int) -> list[_Text]:
    """The texts that go on, in ascending length, as they were; their rows remain in the cache."""
    going_on = [row for row, text in enumerate(group) if text.num_predictions > position]
    if going_on and len(going_on) < len(group):
        cache.batch_select_indices(torch.tensor(going_on))
    return [group[row] for row in going_on]


@torch.no_grad()
def _losses(reader: Reader, ids: Tensor, cache: Any) -> Tensor:
    """ids (rows, n + 1) int64, read up to the last: losses (rows, n)."""
    logits = reader.read(ids[:, :-1], cache, all_logits=True).logits
    assert logits is not None
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:].to(logits.device), reduction="none")


def _rates(nats: Tensor, tokens: Tensor, num_bytes: Tensor) -> tuple[float, float]:
    """Nats per token and bits per byte."""
    return float(nats / tokens), float(nats / math.log(2) / num_bytes)
