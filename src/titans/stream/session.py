"""A session with one reader: feed it text of any length, generate, save what it has learned, go on later."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from titans.hf import TitansCache, TitansForCausalLM
from titans.hf.state_file import open_state_file
from titans.stream.live import generated
from titans.stream.saved import (
    SessionStats,
    fingerprint,
    initial_states,
    recent_tokens,
    stats_of,
    surprise_so_far,
)
from titans.stream.text import NUM_RECENT, text_after, token_ids

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

PIECE_LENGTH = 2048
_SET_BY_SESSION = (
    "inputs", "input_ids", "inputs_embeds", "attention_mask", "past_key_values", "use_cache",
    "num_return_sequences", "return_dict_in_generate",
)  # fmt: skip


@dataclass(frozen=True)
class FeedResult:
    """What `Session.feed` reports.

    tokens: how many were taken in. seconds: how long it took. start: index in the session of the first token
    the model read meanwhile: it is one behind, because the last token waits for the next call.
    mean_surprise: mean over the tokens read, layers and heads of ‖M(k) − v‖² before each write; None without
    a memory or when nothing was read. surprises: (tokens read, layers) float32, mean over heads, where asked
    for.
    """

    tokens: int
    seconds: float
    start: int
    mean_surprise: float | None
    surprises: Tensor | None = None


@dataclass(frozen=True)
class _Now:
    """Where a session stands; replaced as a whole, so that whatever is interrupted has not happened.

    cache: has read all tokens but the last, and is never written to again. recent: the last tokens.
    surprise, count: its sum over tokens read, layers and heads, and of how many. seconds, read: how long
    this process has read, and how many tokens.
    """

    cache: TitansCache
    recent: tuple[int, ...] = ()
    surprise: float = 0.0
    count: int = 0
    seconds: float = 0.0
    read: int = 0

    @property
    def num_tokens(self) -> int:
        return self.cache.num_columns + bool(self.recent)


class Session:
    """A reader with a memory: one text, of any length, in any pieces, at constant memory.

    The last token is kept back until more is known, so that `generate` has something to start from; how a
    text is cut into feeds changes nothing. A variant without a memory ("transformer") keeps its whole past
    and grows with it.

    Args:
        model: any `TitansForCausalLM`; it is left as it is.
        tokenizer: a Hugging Face tokenizer, or None to work in token ids.

    Example:
        session = Session(model, tokenizer)
        session.feed(Path("book.txt").read_text())
        session.save("book.memory")
        print(session.generate(max_new_tokens=200, do_sample=True))
    """

    def __init__(self, model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._now = _Now(TitansCache(model.config))

    @property
    def cache(self) -> TitansCache:
        """A copy of the cache; it has read everything but the last token."""
        return self._now.cache.clone()

    @property
    def num_tokens(self) -> int:
        """Tokens taken in so far, fed or generated."""
        return self._now.num_tokens

    def feed(
        self,
        text: str | bytes | Tensor | Sequence[int] | np.ndarray | Iterable[str | bytes],
        *,
        collect_surprise: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> FeedResult:
        """Read on, in pieces of 2048 tokens; an interrupted feed ends after its last whole piece.

        Args:
            text: a string (needs the tokenizer; no special tokens are added), token ids (n,) or (1, n), or
                bytes: token ids for a byte model, UTF-8 for any other tokenizer; or several of these, such
                as the lines of an open file, of which only one is held at a time.
            collect_surprise: return the surprise at every token.
            progress: called after every piece with the number of tokens taken in by this call.

        Raises:
            ValueError: for a string without a tokenizer, bytes that are not UTF-8, or ids that the model has
                not.
        """
        began, before, taken = time.perf_counter(), self._now, 0
        collected: list[Tensor] = []
        for part in _parts(text):
            ids = token_ids(part, self.tokenizer, self.model.config.vocab_size)
            while len(ids):
                # Pieces end at multiples of their length, where chunks and segments do, too.
                room = PIECE_LENGTH - self._now.cache.num_columns % PIECE_LENGTH
                piece = ids[: room + (not self._now.recent)]
                surprise = self._read(piece.long())
                ids, taken = ids[len(piece) :], taken + len(piece)
                if collect_surprise and surprise is not None and surprise.numel():
                    collected.append(surprise.cpu())
                if progress is not None:
                    progress(taken)
        count = self._now.count - before.count
        return FeedResult(
            tokens=taken,
            seconds=time.perf_counter() - began,
            start=before.cache.num_columns,
            mean_surprise=(self._now.surprise - before.surprise) / count if count else None,
            surprises=torch.cat(collected) if collected else None,
        )

    def generate(self, *, stream: bool = False, **kwargs: Any) -> Any:
        """Continue the text; what is generated becomes part of the session.

        Args:
            stream: give the text as it comes. Whoever stops asking stops the model; what it has generated by
                then is part of the session.
            kwargs: of transformers' `generate`: max_new_tokens, do_sample, temperature, streamer, …

        Returns:
            With a tokenizer the new text; a last character that is not complete yet is given by the next
            call. Without one the new ids (1, n). With `stream` an iterator, of pieces of text or of ids.

        Raises:
            ValueError: before anything was fed, or for an argument that the session sets itself.
        """
        return self._stream(kwargs) if stream else self._generate(**kwargs)

    def _stream(self, kwargs: dict[str, Any]) -> Iterator[str | int]:
        recent = self._now.recent
        for token in generated(self._generate, kwargs):
            if self.tokenizer is None:
                yield token
                continue
            if piece := text_after(self.tokenizer, recent, (token,)):
                yield piece
            recent = (*recent, token)[-NUM_RECENT:]

    def _generate(self, **kwargs: Any) -> str | Tensor:
        for name in _SET_BY_SESSION:
            if name in kwargs:
                raise ValueError(f"{name}={kwargs[name]!r}: a session sets this itself; leave it out")
        now = self._now
        if not now.recent:
            raise ValueError("the session has no token to start from: feed() it at least one first")
        cache = now.cache.clone()
        settings = kwargs.get("generation_config") or self.model.generation_config
        cache.batch_repeat_interleave(kwargs.get("num_beams") or settings.num_beams or 1)
        with reading(self.model):
            start = torch.tensor([[now.recent[-1]]], device=self.model.device)
            found = self.model.generate(start, past_key_values=cache, **kwargs)
        # More than the tokens where the generation config asks for it.
        new = getattr(found, "sequences", found)[0, 1:]
        ids = tuple(new.tolist())
        if cache.batch_size == 1 and cache.num_columns == now.cache.num_columns + len(ids):
            self._now = replace(now, cache=cache, recent=(now.recent + ids)[-NUM_RECENT:])
        else:
            # Beam search leaves the states of all beams, in no order to rely on.
            self.feed(ids)
        return new.unsqueeze(0) if self.tokenizer is None else text_after(self.tokenizer, now.recent, ids)

    def save(self, path: str | Path, about: Mapping[str, str] | None = None) -> None:
        """Write everything that was read to one safetensors file, through a temporary name.

        Args:
            about: more entries for the file's header.

        Raises:
            ValueError: before anything was fed.
            OSError: if the file cannot be written.
        """
        now = self._now
        if not now.num_tokens:
            raise ValueError("the session is empty: feed() something before saving it")
        cache = now.cache
        if cache.states is None:
            cache = cache.clone()
            with reading(self.model):
                self.model(
                    torch.zeros(1, 0, dtype=torch.int64, device=self.model.device), past_key_values=cache
                )
        own = {
            "fingerprint": fingerprint(self.model),
            "recent_tokens": json.dumps(now.recent),
            "surprise": json.dumps([now.surprise, now.count]),
        }
        try:
            cache.save(path, {**(about or {}), **own})
        except safetensors.SafetensorError as error:
            raise OSError(
                f"{path} could not be written ({error}): give a folder that exists and has room"
            ) from None

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: TitansForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        strict: bool = True,
    ) -> Session:
        """Go on where `save` was called; nothing in the file is executed.

        Args:
            strict: refuse a memory that was made with other weights of the same sizes.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for a damaged file, or one of another configuration, checkpoint or number of rows.
        """
        cache = TitansCache.load(path, model.config, model.device)
        with open_state_file(path) as file:
            about = file.about
        if cache.batch_size != 1:
            raise ValueError(f"{path} holds {cache.batch_size} rows: a session reads one")
        if strict and about.get("fingerprint", "") not in ("", fingerprint(model)):
            raise ValueError(
                f"{path} was made with another checkpoint of the same sizes: load it with that one, or pass "
                "strict=False if the two understand each other"
            )
        session = cls(model, tokenizer)
        # The precision of the running model decides, not that of the one that wrote the file.
        wanted = pytree.tree_leaves(initial_states(model))
        held, structure = pytree.tree_flatten(cache.states)
        leaves = [leaf.to(like.dtype) for leaf, like in zip(held, wanted, strict=True)]
        for layer, state in zip(cache.layers, pytree.tree_unflatten(leaves, structure), strict=True):
            layer.state = state
        recent = recent_tokens(path, about, model.config.vocab_size)
        session._now = _Now(cache, recent, *surprise_so_far(path, about))
        return session

    def fork(self) -> Session:
        """An independent session that has read the same; it costs nothing until one of them reads on."""
        other = Session(self.model, self.tokenizer)
        other._now = self._now
        return other

    def reset(self) -> None:
        """Forget everything."""
        self._now = _Now(TitansCache(self.model.config))

    def stats(self) -> SessionStats:
        """Tokens read, bytes held, mean surprise, speed, and the norms of every layer's memory."""
        now = self._now
        found = stats_of(now.cache, self.num_tokens, self.model)
        return replace(
            found,
            mean_surprise=now.surprise / now.count if now.count else None,
            tokens_per_second=now.read / now.seconds if now.seconds else None,
        )

    def _read(self, piece: Tensor) -> Tensor | None:
        """Take in (n,) ids; the surprise (tokens read, layers) of what the model read, or None if it has no
        memory."""
        began = time.perf_counter()
        unread, cache, surprise = self._unread(piece), self._now.cache.clone(), None
        if len(unread):
            with reading(self.model):
                output = self.model(
                    input_ids=unread.unsqueeze(0).to(self.model.device),
                    past_key_values=cache,
                    logits_to_keep=1,
                    output_surprise=True,
                )
            if output.surprises:
                surprise = torch.stack([s[0].mean(-1).float() for s in output.surprises], -1)
        self._took_in(piece, cache, surprise, time.perf_counter() - began)
        return surprise

    def _unread(self, piece: Tensor) -> Tensor:
        """What the model reads when (n,) ids come in: the token kept back, and all of them but the last."""
        return torch.cat([torch.tensor(self._now.recent[-1:], dtype=torch.int64), piece])[:-1]

    def _took_in(self, piece: Tensor, cache: TitansCache, surprise: Tensor | None, seconds: float) -> None:
        """Go on from a cache that has read all but the last of (n,) new ids."""
        now = self._now
        self._now = _Now(
            cache=cache,
            recent=(now.recent + tuple(piece[-NUM_RECENT:].tolist()))[-NUM_RECENT:],
            surprise=now.surprise + (0.0 if surprise is None else float(surprise.sum(dtype=torch.float64))),
            count=now.count + (0 if surprise is None else surprise.numel()),
            seconds=now.seconds + seconds,
            read=now.read + len(piece),
        )


def _parts(text: Any) -> Iterable[Any]:
    """Several texts as they are, anything else as the only one."""
    if isinstance(text, (str, bytes, Tensor)) or hasattr(text, "__array__"):
        return (text,)
    if isinstance(text, Sequence) and not (text and isinstance(text[0], (str, bytes))):
        return (text,)
    return text


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """No gradients, and evaluation mode for as long as it lasts."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
