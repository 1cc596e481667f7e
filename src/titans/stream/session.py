"""A session with one reader: feed it text of any length, generate, save what it has read, go on later."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from torch import Tensor

from titans.hf.fingerprint import same_weights, weights_sample
from titans.hf.state_file import StateFile, damaged_header, open_state_file
from titans.memory_file import SessionStats, recent_tokens, surprise_so_far
from titans.stream.live import generated
from titans.stream.reader import CausalReader, GraftReader, StateReader, TitansReader, reader_of
from titans.stream.saved import fingerprint, graft_stats, stats_of, summary_of
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
    the model read meanwhile: it is one less than that, because the last token waits for the next call.
    mean_surprise: mean over the tokens read, layers and heads of ‖M(k) − v‖² before each write, of a graft
    with an adaptation its loss in nats; None without a memory or when nothing was read. surprises: (tokens
    read, layers) float32, mean over heads, where asked for.
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

    cache: Any
    recent: tuple[int, ...] = ()
    surprise: float = 0.0
    count: int = 0
    seconds: float = 0.0
    read: int = 0

    @property
    def num_tokens(self) -> int:
        return self.cache.num_columns + bool(self.recent)


class Session:
    """A reader of one text, of any length, in any pieces.

    A Titans model with a memory reads at constant memory, and so do recurrent models and those whose
    attention has a window. Full attention (the variant "transformer", Llama and most others) keeps its whole
    past and grows with it; where such a model has a last position, a text that goes beyond is refused.

    The last token is kept back until more is known, so that `generate` has something to start from; how a
    text is cut into feeds changes nothing, up to the rounding of the model's kernels (see `CausalReader`).

    Threads may share a session: each feed is read as a whole. While a stream of generated text is open, it
    takes in nothing else.

    Args:
        model: a `TitansForCausalLM`, a graft, or any causal LM of transformers with a cache, also wrapped by
            PEFT or torch.compile; it is not changed.
        tokenizer: a Hugging Face tokenizer, or None to work in token ids.

    Raises:
        ValueError: for a model that cannot read a text in pieces; see `reader_of`.

    Example:
        session = Session(model, tokenizer)
        session.feed(Path("book.txt").read_text())
        session.save("book.memory")
        print(session.generate(max_new_tokens=200, do_sample=True))
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self._begin(reader_of(model), tokenizer)
        self._check_tokenizer()

    def _begin(self, reader: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.reader: StateReader | CausalReader = reader
        self.tokenizer = tokenizer
        self._now = _Now(reader.start())
        self._lock, self._stream_is_open = threading.RLock(), False

    def _check_tokenizer(self) -> None:
        """ValueError for a graft's tokenizer with another vocabulary."""
        if self.tokenizer is not None and isinstance(self.reader, GraftReader):
            self.reader.inner.check_tokenizer(self.tokenizer)

    @property
    def model(self) -> Any:
        """The model that reads."""
        return self.reader.model

    @property
    def cache(self) -> Any:
        """A copy of the reader's cache (`TitansCache` of a Titans model): all is read but the last token."""
        return self._now.cache.clone()

    @property
    def num_tokens(self) -> int:
        """Tokens taken in so far, fed or generated."""
        return self._now.num_tokens

    @property
    def recent(self) -> tuple[int, ...]:
        """The last tokens taken in, a few of them."""
        return self._now.recent

    @property
    def state_bytes(self) -> int:
        """Bytes held by all states."""
        return int(self._now.cache.nbytes())

    @property
    def mean_surprise(self) -> float | None:
        """Of all that was fed, over tokens, layers and heads; None where nothing is known of it."""
        return self._now.surprise / self._now.count if self._now.count else None

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
            ValueError: for a string without a tokenizer, bytes that are not UTF-8, ids that the model has
                not, or more tokens than it has positions.
            FloatingPointError: if the model answers NaN; nothing of the call is taken in.
            RuntimeError: while a stream of generated text is open.
        """
        with self._alone():
            before = self._now
            try:
                return self._feed(text, collect_surprise, progress)
            except FloatingPointError:
                self._now = before
                raise

    def _feed(self, text: Any, collect_surprise: bool, progress: Callable[[int], None] | None) -> FeedResult:
        began, before, taken = time.perf_counter(), self._now, 0
        collected: list[Tensor] = []
        for part in _parts(text):
            ids = token_ids(part, self.tokenizer, self.reader.vocab_size)
            self._check_no_stream()
            for surprise in self._pieces(ids):
                taken = self.num_tokens - before.num_tokens
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

    def _pieces(self, ids: Tensor) -> Iterator[Tensor | None]:
        """Take in (n,) ids, piece by piece, and give the surprise of each; see `_read`."""
        self.reader.check_room(self.num_tokens + len(ids))
        while len(ids):
            # Pieces end at multiples of their length, where chunks and segments do, too.
            room = PIECE_LENGTH - self._now.cache.num_columns % PIECE_LENGTH
            piece, ids = ids.split([n := min(room + (not self._now.recent), len(ids)), len(ids) - n])
            yield self._read(piece.long())

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
            RuntimeError: while a stream of generated text is open.
        """
        if stream:
            return self._stream(kwargs)
        with self._alone():
            return self._generate(**kwargs)

    def _stream(self, kwargs: dict[str, Any]) -> Iterator[str | int]:
        with self._alone():
            # The thread that generates holds no lock, so that whoever calls meanwhile learns why to wait.
            self._stream_is_open = True
        try:
            recent = self._now.recent
            for token in generated(self._generate, kwargs):
                if self.tokenizer is None:
                    yield token
                    continue
                if piece := text_after(self.tokenizer, recent, (token,)):
                    yield piece
                recent = (*recent, token)[-NUM_RECENT:]
        finally:
            self._stream_is_open = False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for other threads; RuntimeError while a stream is open, because its end may never come."""
        with self._lock:
            self._check_no_stream()
            yield

    def _check_no_stream(self) -> None:
        if self._stream_is_open:
            raise RuntimeError(
                "a stream of generated text is open: read it to its end or close() it first, because what it "
                "generates becomes part of the session"
            )

    def _generate(self, **kwargs: Any) -> str | Tensor:
        for name in _SET_BY_SESSION:
            if name in kwargs:
                raise ValueError(f"{name}={kwargs[name]!r}: a session sets this itself; leave it out")
        now = self._now
        if not now.recent:
            raise ValueError("the session has no token to start from: feed() it at least one first")
        cache = now.cache.clone()
        settings = kwargs.get("generation_config") or self.reader.inner.generation_config
        cache.batch_repeat_interleave(kwargs.get("num_beams") or settings.num_beams or 1)
        found = self.reader.generate(torch.tensor([[now.recent[-1]]]), cache, **kwargs)
        # More than the tokens where the generation config asks for it.
        new = getattr(found, "sequences", found)[0, 1:]
        ids = tuple(new.tolist())
        if cache.batch_size == 1 and cache.num_columns == now.cache.num_columns + len(ids):
            self._go_on(cache, ids)
        else:
            # Beam search leaves the states of all beams, in no order to rely on.
            for _ in self._pieces(new.cpu()):
                pass
        return new.unsqueeze(0) if self.tokenizer is None else text_after(self.tokenizer, now.recent, ids)

    def _go_on(self, cache: Any, ids: tuple[int, ...]) -> None:
        """Stand after generated ids, all but the last of which the cache has read."""
        self._now = replace(self._now, cache=cache, recent=(self._now.recent + ids)[-NUM_RECENT:])

    def _begin_stream(self) -> Any:
        """A copy of the cache for somebody else to generate with, who calls `_end_stream` next; until then
        nothing is taken in. ValueError before anything was fed, RuntimeError while a stream is open."""
        with self._alone():
            if not self.recent:
                raise ValueError("the session has no token to start from: feed() it at least one first")
            self._stream_is_open = True
            return self.cache

    def _end_stream(self, cache: Any, ids: tuple[int, ...]) -> None:
        self._go_on(cache, ids)
        self._stream_is_open = False

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
        if cache.batch_size < 0:
            cache = cache.clone()
            self.reader.read(torch.zeros(1, 0, dtype=torch.int64), cache)
        own = {
            "fingerprint": fingerprint(self.model),
            "weights": weights_sample(self.reader.inner),
            "recent_tokens": json.dumps(now.recent),
            "surprise": json.dumps([now.surprise, now.count]),
        }
        try:
            self.reader.save(cache, Path(path), {**(about or {}), **own, **summary_of(cache, now.num_tokens)})
        except safetensors.SafetensorError as error:
            raise OSError(
                f"{path} could not be written ({error}): give a folder that exists and has room"
            ) from None

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Any,
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
        reader = reader_of(model)
        with open_state_file(path) as file:
            session = cls.__new__(cls)
            session._begin(reader, tokenizer)
            session._check_tokenizer()
            session._now = session._restored(file, strict)
        return session

    def _restored(self, file: StateFile, strict: bool) -> _Now:
        cache = self.reader.load(file)
        if cache.batch_size > 1:
            raise ValueError(f"{file.path} holds {cache.batch_size} rows: a session reads one")
        if strict and not self._has_weights_of(file):
            raise ValueError(
                f"{file.path} was made with another checkpoint of the same sizes: load it with that one, or "
                "pass strict=False if the two understand each other"
            )
        recent = recent_tokens(file.path, file.about, self.reader.vocab_size)
        return _Now(cache, recent, *surprise_so_far(file.path, file.about))

    def _has_weights_of(self, file: StateFile) -> bool:
        """Whether the model has the weights that a file was made with, in whatever precision."""
        name, sample = file.about.get("fingerprint", ""), file.about.get("weights")
        if name in ("", fingerprint(self.model)):
            return True
        try:
            return sample is not None and same_weights(self.reader.inner, name, sample)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise damaged_header(file.path) from None

    def fork(self) -> Session:
        """An independent session that has read the same; it costs nothing until one of them reads on."""
        other = type(self).__new__(type(self))
        other._begin(self.reader, self.tokenizer)
        other._now = self._now
        return other

    def reset(self) -> None:
        """Forget everything; RuntimeError while a stream of generated text is open."""
        with self._alone():
            self._now = _Now(self.reader.start())

    def stats(self) -> SessionStats:
        """Tokens read, bytes held, mean surprise, speed, and the norms of every layer's memory."""
        now = self._now
        if isinstance(self.reader, TitansReader):
            found = stats_of(now.cache, now.num_tokens, self.reader.inner)
        else:
            layers = graft_stats(now.cache) if isinstance(self.reader, GraftReader) else ()
            found = SessionStats(now.num_tokens, now.cache.nbytes(), layers)
        return replace(
            found,
            mean_surprise=self.mean_surprise,
            tokens_per_second=now.read / now.seconds if now.seconds else None,
        )

    def _read(self, piece: Tensor) -> Tensor | None:
        """Take in (n,) ids; the surprise (tokens read, layers) of what the model read, or None if it has no
        memory."""
        began = time.perf_counter()
        unread, cache, surprise = self._unread(piece), self._now.cache.clone(), None
        if len(unread):
            read = self.reader.read(unread.unsqueeze(0), cache, output_surprise=True)
            if read.logits is not None and bool(read.logits.isnan().any()):
                raise _no_number(self.num_tokens)
            if found := read.surprises:
                surprise = torch.stack([s[0].mean(-1).float() for s in found], -1)
        self._now = self._after(piece, cache, surprise, time.perf_counter() - began)
        return surprise

    def _unread(self, piece: Tensor) -> Tensor:
        """What the model reads when (n,) ids come in: the token kept back, and all of them but the last."""
        return torch.cat([torch.tensor(self._now.recent[-1:], dtype=torch.int64), piece])[:-1]

    def _after(self, piece: Tensor, cache: Any, surprise: Tensor | None, seconds: float) -> _Now:
        """What the session holds after (n,) new ids, of which the cache has read all but the last.

        Raises:
            FloatingPointError: where the surprise is NaN.
        """
        now = self._now
        total = 0.0 if surprise is None else float(surprise.sum(dtype=torch.float64))
        if math.isnan(total):
            raise _no_number(now.num_tokens)
        return _Now(
            cache=cache,
            recent=(now.recent + tuple(piece[-NUM_RECENT:].tolist()))[-NUM_RECENT:],
            surprise=now.surprise + total,
            count=now.count + (0 if surprise is None else surprise.numel()),
            seconds=now.seconds + seconds,
            read=now.read + len(piece),
        )


def _no_number(tokens: int) -> FloatingPointError:
    return FloatingPointError(
        f"the model answers NaN to the text after token {tokens:,}: load it in another precision, or check "
        "its weights; the session is unchanged"
    )


def _parts(text: Any) -> Iterable[Any]:
    """Several texts unchanged, anything else as the only one."""
    if isinstance(text, (str, bytes, Tensor)) or hasattr(text, "__array__"):
        return (text,)
    if isinstance(text, Sequence) and not (text and isinstance(text[0], (str, bytes))):
        return (text,)
    return text
