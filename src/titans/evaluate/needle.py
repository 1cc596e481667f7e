"""Can a model recall what it has read, at any distance? Needles in a haystack, answers generated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from titans.data import leading_tokens
from titans.data.needles import FILLER, TASKS, Needles, NeedleTask, make_needles
from titans.evaluate.ask import answered, read
from titans.hf import GraftConfig, TitansConfig, causal_cache
from titans.stream.model import unwrapped
from titans.stream.reader import Reader, reader_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class NeedleCell:
    """Accuracy at one length and depth.

    length: tokens from the start of the text to the end of the question; num_bytes: the same in bytes. depth:
    where the needle stands, 0 for the start; None for several needles, which stand anywhere.
    beyond_attention: whether all of them are out of attention's reach, so that only a memory or another state
    holds them. accuracy with a Wilson interval of 95 %, low to high.
    """

    length: int
    num_bytes: int
    depth: float | None
    beyond_attention: bool
    correct: int
    samples: int
    accuracy: float
    low: float
    high: float


class Haystack:
    """A text to hide needles in, from anywhere in it and around its end as often as a length takes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.ids = np.asarray(tokenizer.encode(text, add_special_tokens=False))
        if not len(self.ids):
            raise ValueError("the haystack is empty: give a text")
        self.bytes_per_token = len(text.encode()) / len(self.ids)
        words = {int(i): str(tokenizer.decode([int(i)])) for i in np.unique(self.ids)}
        opens = np.isin(self.ids, [i for i, word in words.items() if word[:1].isspace() and len(word) > 1])
        closes = np.isin(self.ids, [i for i, word in words.items() if word[-1:].isspace()])
        self._begins_word = np.flatnonzero(opens | np.roll(closes, 1))

    def hide(
        self, needles: Sequence[np.ndarray], depths: Sequence[float], length: int, offset: int
    ) -> tuple[np.ndarray, list[int]]:
        """(length,) ids with the needles at their depths, at the next word's beginning, and where each ends.

        Raises:
            ValueError: if the needles leave no room.
        """
        room = length - sum(map(len, needles))
        if room < 0:
            raise ValueError(
                f"length={length}: the needles alone take {length - room} tokens with a question"
            )
        parts, ends, taken, total = [], [], 0, 0
        for needle, depth in zip(needles, depths, strict=True):
            place = max(self._next_word(offset, int(depth * room), room), taken)
            parts += [self._slice(offset + taken, offset + place), needle]
            total += place - taken + len(needle)
            ends.append(total)
            taken = place
        return np.concatenate([*parts, self._slice(offset + taken, offset + room)]), ends

    def _slice(self, begin: int, end: int) -> np.ndarray:
        return self.ids[np.arange(begin, end) % len(self.ids)]

    def _next_word(self, offset: int, place: int, room: int) -> int:
        at = (offset + place) % len(self.ids)
        index = np.searchsorted(self._begins_word, at)
        if place == 0 or index == len(self._begins_word):
            return place
        return min(place + int(self._begins_word[index]) - at, room)


def attention_reach(config: Any) -> float:
    """How many tokens back attention sees through all layers: anything further away only a state can hold.

    0 where there is no attention; unlimited where nothing is known.
    """
    if isinstance(config, GraftConfig):
        return config.window * config.num_hidden_layers
    if not isinstance(config, TitansConfig):
        return math.inf if config is None else causal_cache.attention_reach(config)
    variant = config.variant
    if variant in ("lmm", "lstm", "rwkv7"):
        return 0
    if variant == "mac":
        return config.segment_length
    if variant in ("mag", "mal", "window"):
        return config.sliding_window * config.num_hidden_layers
    return math.inf


def cells_of(
    task: NeedleTask, lengths: Sequence[int], depths: Sequence[float], num_keys: int, num_values: int
) -> list[tuple[int, float | None]]:
    """Length and depth of every cell of a table; several needles have no depth."""
    several = num_keys * num_values > 1 or task.is_story
    return [(length, depth) for length in lengths for depth in ([None] if several else depths)]


def needle_table(
    model: PreTrainedModel | Reader,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    haystack: str | None = None,
    samples: int = 8,
    batch_size: int = 8,
    num_keys: int = 1,
    num_values: int = 1,
    num_questions: int = 1,
    piece_length: int = 2048,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[NeedleCell]:
    """Accuracy by length and depth; a sample counts if every answer is exact.

    Args:
        model: any causal language model of transformers with a cache, or a `Reader`.
        task: a name in `titans.data.needles.TASKS`.
        lengths: tokens, the question included, and what the tokenizer puts before a text.
        depths: where the needle stands; not used where there are several, which stand anywhere.
        haystack: the text around it, for tasks that want one.
        samples: for each cell. batch_size: of them side by side. seed: of all of them.
        num_keys, num_values, num_questions: see `make_needles`.
        piece_length: tokens of a row in one call; changes the speed alone.
        progress: tokens read so far, and in all.

    Raises:
        ValueError: for an unknown task, no haystack where one is needed, a length too short or a number
            out of its range.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}: choose one of {', '.join(TASKS)}")
    for name, value in dict(samples=samples, batch_size=batch_size, piece_length=piece_length).items():
        if value < 1:
            raise ValueError(f"{name}={value}: give a whole number of at least 1")
    if any(not 0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths={list(depths)}: give numbers from 0 to 1")
    chosen = TASKS[task]
    if chosen.haystack == "filler":
        haystack = FILLER
    elif haystack is None:
        raise ValueError(f"task={task!r} hides its needle in a text: give a haystack")
    counts = (num_keys, num_values, num_questions)
    reader = reader_of(model)
    reader.check_room(max(lengths, default=0))
    asker = _Asker(reader, tokenizer, chosen, Haystack(tokenizer, haystack), counts, piece_length)
    cells = cells_of(chosen, lengths, depths, num_keys, num_values)
    total, done = samples * sum(length for length, _ in cells), 0

    def show(tokens: int) -> None:
        if progress is not None:
            progress(done + tokens, total)

    reach = attention_reach(getattr(unwrapped(model), "config", None))
    found = []
    for length, depth in cells:
        correct, beyond = 0, True
        for begin in range(0, samples, batch_size):
            rows = range(begin, min(begin + batch_size, samples))
            generators = [np.random.default_rng([seed, row]) for row in rows]
            right, distance = asker.ask(generators, length, depth, show)
            correct += right
            done += len(rows) * length
            show(0)
            beyond = beyond and (reach == 0 or distance > reach)
        low, high = wilson(correct, samples)
        num_bytes = round(length * asker.haystack.bytes_per_token)
        found.append(
            NeedleCell(length, num_bytes, depth, beyond, correct, samples, correct / samples, low, high)
        )
    return found


class _Asker:
    """Reads rows of one length side by side and asks each its questions."""

    def __init__(
        self,
        reader: Reader,
        tokenizer: PreTrainedTokenizerBase,
        task: NeedleTask,
        haystack: Haystack,
        counts: tuple[int, int, int],
        piece_length: int,
    ) -> None:
        self.reader, self.tokenizer, self.task, self.haystack = reader, tokenizer, task, haystack
        self.counts, self.piece_length = counts, piece_length
        self.beginning = np.asarray(leading_tokens(tokenizer), np.int64)

    def ask(
        self,
        generators: Sequence[np.random.Generator],
        length: int,
        depth: float | None,
        progress: Callable[[int], None],
    ) -> tuple[int, int]:
        """How many rows are right in all they were asked, and the fewest tokens from needle to question."""
        rows = [make_needles(self.task, generator, *self.counts) for generator in generators]
        context = length - max(len(self._encode(question)) for row in rows for question in row.questions)
        texts, distance = [], length
        for row, generator in zip(rows, generators, strict=True):
            text, last = self._text(row, generator, context, depth)
            texts.append(text)
            distance = min(distance, context - last)
        cache = read(self.reader, np.stack(texts), None, self.piece_length, progress)[1]
        right = np.ones(len(rows), bool)
        for n in range(len(rows[0].questions)):
            questions, answers = (
                [getattr(row, name)[n] for row in rows] for name in ("questions", "answers")
            )
            right &= answered(self.reader, self.tokenizer, cache, questions, answers)
        return int(right.sum()), distance

    def _text(
        self, row: Needles, generator: np.random.Generator, context: int, depth: float | None
    ) -> tuple[np.ndarray, int]:
        needles = [self._encode(statement) for statement in row.statements]
        depths = [depth] if depth is not None else np.sort(generator.random(len(needles))).tolist()
        offset = int(generator.integers(len(self.haystack.ids)))
        text, ends = self.haystack.hide(needles, depths, context - len(self.beginning), offset)
        return np.concatenate([self.beginning, text]), len(self.beginning) + ends[-1]

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False))


def wilson(correct: int, samples: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson's score interval)."""
    share = correct / samples
    middle = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2)) / (1 + z * z / samples)
    return max(0.0, middle - half), min(1.0, middle + half)
