"""The systems that a graft is compared with: each reads a text, and answers questions about it."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans.baselines.continuous_cache import ContinuousCache, ContinuousCacheReader, entry_nbytes
from titans.baselines.dynamic_evaluation import DynamicEvaluationReader, with_lora
from titans.baselines.passages import Passages
from titans.baselines.windowed import WindowedCache, WindowedReader
from titans.evaluate.perplexity import score
from titans.experiments.graft_comparison_reading import SharedBase
from titans.experiments.runner import Request
from titans.experiments.trained import graft_folder, hash_of_graft
from titans.hf import GraftCache, GraftedForCausalLM
from titans.hf.graft import graft
from titans.hf.graft.configuration import check_origin
from titans.hf.graft.window import Window
from titans.state import state_nbytes
from titans.stream.causal import position_limit
from titans.stream.reader import Reader, reader_of
from titans.zoo import graft_names, load
from titans.zoo.by_name import PRETRAINED
from titans.zoo.precision import convert

WINDOW, SINKS, SEGMENT, RANK = 512, 4, 64, 8
# Positions that a question and its answer may take where a model has a last one.
ROOM = 224
PIECE = 512
# The trained graft of the library, measured once it is there.
TRAINED = "titans-smollm2-135m"
# The window in the precision of dynamic evaluation, where other systems read in another.
REFERENCE = "window in float32"
Until = Callable[[str], bool]


class System:
    """A reader, and the answers that it generates greedily after reading.

    limit: most tokens that it can read; None for any number. shared: the base that computes for the reader
    what other systems need, too; None if the reader has a base of its own.
    """

    def __init__(
        self, reader: Reader, tokenizer: Any, limit: int | None = None, shared: SharedBase | None = None
    ) -> None:
        self.reader, self.tokenizer, self.limit, self.shared = reader, tokenizer, limit, shared

    def seconds(self) -> float:
        """Processor seconds from some moment on, as if nothing were shared."""
        return time.process_time() + (self.shared.spared if self.shared else 0)

    def losses(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Nats of ids[1:], as far as the system reads, and what it holds afterwards."""
        memory = self.reader.start()
        return score(self.reader, ids[: self.limit], memory, piece_length=PIECE), memory

    def remember(self, ids: Tensor) -> Any:
        """What the system holds after a text (n,), of which it may have read the end only."""
        memory = self.reader.start()
        if self.limit is not None:
            ids = ids[-(self.limit - ROOM) :]
        for piece in ids[None].split(PIECE, 1):
            self.reader.read(piece, memory)
        return memory

    def answer(self, memory: Any, prompt: str, query: str, steps: int, until: Until) -> str:
        """What the system generates after a prompt; the memory is not changed.

        Args:
            query: the question in the prompt. steps: most tokens. until: whether the text so far suffices.
        """
        return self.generated(memory.clone(), prompt, steps, until)

    def generated(self, memory: Any, prompt: str, steps: int, until: Until) -> str:
        """What follows greedily, up to `steps` tokens or the token that ends a turn."""
        ids, text = self.encode(prompt), ""
        found: list[int] = []
        for _ in range(steps):
            logits = self.reader.read(ids[None], memory).logits
            assert logits is not None
            found.append(int(logits[0, -1].argmax()))
            if found[-1] == self.tokenizer.eos_token_id:
                break
            text = self.tokenizer.decode(found, skip_special_tokens=True)
            if until(text):
                break
            ids = torch.tensor(found[-1:])
        return text

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False))

    def nbytes(self, memory: Any) -> int:
        """Bytes held in addition to the window's keys and values."""
        if isinstance(memory, WindowedCache):
            return memory.memory_nbytes()
        if isinstance(memory, GraftCache):
            return memory.nbytes() - (0 if memory.state is None else state_nbytes(memory.state.window))
        return memory.nbytes()


class Retrieval(System):
    """A base whose window holds the best passages of a text and the question. It does not read the rest."""

    def remember(self, ids: Tensor) -> Passages:
        return Passages(self.tokenizer.decode(ids))

    def answer(self, memory: Passages, prompt: str, query: str, steps: int, until: Until) -> str:
        room = WINDOW - len(self.encode(prompt)) - steps

        def length(text: str) -> int:
            return len(self.encode(text)) + 2  # a blank line

        passages = memory.best(query, room, length)
        return self.generated(self.reader.start(), "\n\n".join([*passages, prompt]), steps, until)

    def nbytes(self, memory: Any) -> int:
        return len(memory.text.encode()) if isinstance(memory, Passages) else 0


def grafted(model: Any, **settings: Any) -> Reader:
    return reader_of(graft(model, window=WINDOW, sinks=SINKS, **settings))


# Chosen on one document, by the cells named "tuning": for caches with all entries and with few, and for each
# way of dynamic evaluation.
CACHE, SMALL_CACHE = ContinuousCache(0.05, 20.0), ContinuousCache(0.02, 20.0)
RATES = {"SGD": 3e-3, "Adam": 3e-5, "LoRA": 1e-3}


def small_cache(model: Any) -> ContinuousCache:
    """A cache of as many bytes as the adaptation's state."""
    adaptation = grafted(model).inner.adaptation  # type: ignore[attr-defined]
    limit = state_nbytes(adaptation.initial_state(1)) // entry_nbytes(adaptation.hidden_size)
    return replace(SMALL_CACHE, limit=limit)


def dynamic(model: Any, kind: str, rate: float | None = None) -> DynamicEvaluationReader:
    """Dynamic evaluation by "SGD" or "Adam" of all weights, or by Adam of a "LoRA".

    rate: of the optimizer; None for the chosen one.
    """
    rate = RATES[kind] if rate is None else rate
    optimizer = partial(torch.optim.SGD if kind == "SGD" else torch.optim.Adam, lr=rate)
    learning = None
    if kind == "LoRA":
        model, learning = with_lora(model, RANK)
    return DynamicEvaluationReader(
        model, optimizer, segment=SEGMENT, names=learning, window=WINDOW, sinks=SINKS
    )


def _cache(model: Any, bounded: bool) -> Reader:
    cache = small_cache(model) if bounded else CACHE
    return ContinuousCacheReader(model, cache, window=WINDOW, sinks=SINKS)


# Name → what makes a reader of the base.
READERS: dict[str, Callable[[Any], Reader]] = {
    "window": lambda model: WindowedReader(model, window=WINDOW, sinks=SINKS),
    REFERENCE: lambda model: WindowedReader(model, window=WINDOW, sinks=SINKS),
    "full attention": reader_of,
    "cache": partial(_cache, bounded=False),
    "small cache": partial(_cache, bounded=True),
    "dynamic SGD": partial(dynamic, kind="SGD"),
    "dynamic Adam": partial(dynamic, kind="Adam"),
    "dynamic LoRA": partial(dynamic, kind="LoRA"),
    # It was measured before there was a warm-up.
    "adaptation": partial(grafted, adaptation={"warm_up": 0}),
}
RETRIEVAL = "passages"
BASELINES = (*(name for name in READERS if name != REFERENCE), RETRIEVAL)


class Trained(NamedTuple):
    """A trained graft: its name in the library or folder, and whether its association is used alone."""

    place: str
    association_alone: bool

    @property
    def folder(self) -> Path:
        return graft_folder(self.place)


def trained_grafts(request: Request) -> dict[str, Trained]:
    """Label → trained graft: those asked for, or the library's; of two memories also one alone."""
    places = request.models or ({TRAINED: TRAINED} if TRAINED in graft_names() else {})
    found = {}
    for label, place in places.items():
        found[label] = Trained(place, False)
        config = json.loads(found[label].folder.joinpath("config.json").read_text())
        if config.get("adaptation") and config.get("association"):
            found[f"{label} association"] = Trained(place, True)
    return found


def association_of(model: GraftedForCausalLM) -> GraftedForCausalLM:
    """The graft without its adaptation; the base is shared."""
    config = copy.deepcopy(model.config)
    config.adaptation = None
    alone = GraftedForCausalLM(config, model.base).eval()
    alone.load_state_dict(
        {k: v for k, v in model.own_state_dict().items() if not k.startswith("adaptation.")}, strict=False
    )
    return alone


def weights_of(name: str, request: Request) -> str | None:
    """A short hash of a trained graft's weights and settings; None for what is not trained."""
    graft = trained_grafts(request).get(name)
    if graft is None:
        return None
    return hash_of_graft(graft.place)


def base() -> tuple[Any, Any]:
    """The pretrained model, and its tokenizer."""
    return load(PRETRAINED)


@cache
def _opened(place: str | Callable[[], tuple[Any, Any]], dtype: torch.dtype) -> tuple[Any, Any]:
    """A graft by its place, or what a function loads; no system changes the model, so that all share it."""
    model, tokenizer = load(place, dtype="float32") if isinstance(place, str) else place()
    base: Any = model.base if isinstance(model, GraftedForCausalLM) else model
    convert(base, dtype)
    return model, tokenizer


@cache
def _shared(
    place: Callable[[], tuple[Any, Any]], dtype: torch.dtype, window: Window, layers: tuple[int, ...]
) -> SharedBase:
    """The base of all systems with this window, in one precision; layers: those that any of them reads."""
    return SharedBase(_opened(place, dtype)[0], window, layers)


def _share(reader: Any, request: Request, dtype: torch.dtype) -> SharedBase | None:
    """Give a reader the base that others use, too; None where its own reads differently.

    Raises:
        ValueError: for a graft of another base, with which nothing could be compared.
    """
    grafts = [_opened(place, dtype)[0] for place in {one.place for one in trained_grafts(request).values()}]
    layers = {layer for one in grafts for layer in getattr(one.association, "layers", ())}
    shared = _shared(base, dtype, Window(WINDOW, SINKS), tuple(sorted(layers)))
    if isinstance(reader, WindowedReader):
        reader.windowed = shared
        return shared
    config = reader.inner.config
    check_origin(shared.model, config.origin)
    if config.lora is not None or Window(config.window, config.sinks) != shared.window:
        return None
    reader.inner._windowed = shared
    return shared


def system(name: str, request: Request, dtype: torch.dtype = torch.float32) -> System:
    """A system by its name in `BASELINES` or `trained_grafts`.

    dtype: of the pretrained model's weights and states. Memories keep theirs, which is wider.
    """
    if name in (grafts := trained_grafts(request)):
        model, tokenizer = _opened(grafts[name].place, dtype)
        reader: Any = reader_of(association_of(model) if grafts[name].association_alone else model)
        return System(reader, tokenizer, shared=_share(reader, request, dtype))
    model, tokenizer = _opened(base, dtype)
    if name == RETRIEVAL:
        return Retrieval(READERS["window"](model), tokenizer)
    if name == "full attention":
        return System(READERS[name](model), tokenizer, position_limit(model.config))
    # Dynamic evaluation changes the weights.
    reader = READERS[name](model)
    return System(
        reader, tokenizer, shared=None if name.startswith("dynamic") else _share(reader, request, dtype)
    )
