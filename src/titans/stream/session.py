"""A session with one reader: feed it text of any length, generate, save what it has read, go on later."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from titans.hf.state_file import open_state_file
from titans.memory_file import SessionStats
from titans.stream.live import generated
from titans.stream.reader import CausalReader, GraftReader, StateReader, reader_of
from titans.stream.session_state import FeedResult, SessionState
from titans.stream.text import NUM_RECENT, text_after, token_ids

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

PIECE_LENGTH = 2048
_SET_BY_SESSION = (
    "inputs", "input_ids", "inputs_embeds", "attention_mask", "past_key_values", "use_cache",
    "num_return_sequences", "return_dict_in_generate",
)  # fmt: skip


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
        self._now = SessionState(reader.start())
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
        return self._now.mean_surprise

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
                if collect_surprise and surprise is not None:
                    collected.append(surprise.cpu())
                if progress is not None:
                    progress(taken)
        seconds = time.perf_counter() - began
        return self._now.since(before, seconds, collected if collect_surprise else None)

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
            self._now = self._now.after_generated(cache, ids)
        else:
            # Beam search leaves the states of all beams, in no order to rely on.
            for _ in self._pieces(new.cpu()):
                pass
        return new.unsqueeze(0) if self.tokenizer is None else text_after(self.tokenizer, now.recent, ids)

    def _begin_stream(self) -> Any:
        """A copy of the cache for somebody else to generate with, who calls `_end_stream` next; until then
        nothing is taken in. ValueError before anything was fed, RuntimeError while a stream is open."""
        with self._alone():
            if not self.recent:
                raise ValueError("the session has no token to start from: feed() it at least one first")
            self._stream_is_open = True
            return self.cache

    def _end_stream(self, cache: Any, ids: tuple[int, ...]) -> None:
        self._now = self._now.after_generated(cache, ids)
        self._stream_is_open = False

    def save(self, path: str | Path, about: Mapping[str, str] | None = None) -> None:
        """Write everything that was read to one safetensors file, through a temporary name.

        Args:
            about: more entries for the file's header.

        Raises:
            ValueError: before anything was fed.
            OSError: if the file cannot be written.
        """
        self._now.save(self.reader, Path(path), about or {})

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
            session._now = SessionState.load(file, session.reader, strict)
        return session

    def fork(self) -> Session:
        """An independent session that has read the same; it costs nothing until one of them reads on."""
        other = type(self).__new__(type(self))
        other._begin(self.reader, self.tokenizer)
        other._now = self._now
        return other

    def reset(self) -> None:
        """Forget everything; RuntimeError while a stream of generated text is open."""
        with self._alone():
            self._now = SessionState(self.reader.start())

    def stats(self) -> SessionStats:
        """Tokens read, bytes held, mean surprise, speed, and the norms of every layer's memory."""
        return self._now.stats(self.reader)

    def _read(self, piece: Tensor) -> Tensor | None:
        """Take in (n,) ids; the surprise (tokens read, layers) of what the model read, or None if it has no
        memory."""
        began, now = time.perf_counter(), self._now
        unread, cache, surprise = now.unread(piece), now.cache.clone(), None
        if len(unread):
            read = self.reader.read(unread.unsqueeze(0), cache, output_surprise=True)
            if read.logits is not None and bool(read.logits.isnan().any()):
                raise now.no_number()
            if found := read.surprises:
                surprise = torch.stack([s[0].mean(-1).float() for s in found], -1)
        self._now = now.after(piece, cache, surprise, time.perf_counter() - began)
        return surprise


def _parts(text: Any) -> Iterable[Any]:
    """Several texts unchanged, anything else as the only one."""
    if isinstance(text, (str, bytes, Tensor)) or hasattr(text, "__array__"):
        return (text,)
    if isinstance(text, Sequence) and not (text and isinstance(text[0], (str, bytes))):
        return (text,)
    return text
