"""How fast a model decodes, reads and trains on this machine, and what share of the machine's own rate that
is."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from titans.hf import TitansCache, TitansForCausalLM
from titans.nn import NeuralMemory
from titans.stream.model import reading

PROMPT_TOKENS = 64
DECODED_TOKENS = 16
_LEAST_REPEATS = 3
_SMALLEST_PRODUCT, _LARGEST_PRODUCT = 256, 8192
_NOT_IN_PLACE = {torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm, torch.ops.aten.addmm_: torch.ops.aten.addmm}


@dataclass(frozen=True)
class Rate:
    """How fast one thing is done.

    tokens_per_second: of all rows together. milliseconds: the median of what is timed. operations_per_token:
    of matrix products, a multiply-add counted as two. roofline_percent: the share of the machine's rate that
    these make up. peak_bytes: the most that was held up to here, None where the system does not report it.
    """

    tokens_per_second: float
    milliseconds: float
    operations_per_token: float
    roofline_percent: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Throughput:
    """What `throughput` found.

    roofline: operations per second of the fastest float32 matrix product. decoding, reading, training: in
    this order of what they hold; their milliseconds are those of one token of every row, of the whole
    stretch, and of a step. state_bytes: of one row after `state_tokens`; inside of a chunk it is largest.
    """

    roofline: float
    decoding: Rate
    reading: Rate
    training: Rate
    state_bytes: int
    state_tokens: int


class _Work(NamedTuple):
    """Something that can be done again and again, and the tokens of each row in it."""

    do: Callable[[], object]
    tokens: int


def throughput(
    model: TitansForCausalLM,
    *,
    batch_size: int = 16,
    sequence_length: int = 256,
    seconds: float = 2.0,
    progress: Callable[[str], None] | None = None,
) -> Throughput:
    """Time a model on random tokens, on the device where it is; its gradients are gone afterwards.

    Decoding is one token at a time after a short prompt. Reading is a stretch with everything carried along
    that a stretch as long has left behind. Training is forward and backward, without an optimizer. Peaks
    are of the process, libraries included, or on a CUDA device of what PyTorch has allocated there.

    Operations are counted while one row is run once on plain torch (backend "chunkwise", attention as two
    products), what the backward pass recomputes and what a causal mask hides included; a backend that skips
    some of it, or takes narrower operands than float32, may so get a share above its due.

    Args:
        batch_size: rows side by side.
        sequence_length: tokens of each in a training step and in a stretch that is read.
        seconds: about how long each is timed, after once to warm up; never less than three times.
        progress: called with what is going to be measured.

    Raises:
        ValueError: for numbers below 1, or no time.
    """
    for name, value in dict(batch_size=batch_size, sequence_length=sequence_length).items():
        if value < 1:
            raise ValueError(f"{name}={value}: give a whole number of at least 1")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds={seconds}: give a number above 0")
    say = progress or (lambda _: None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch_size, sequence_length), generator=generator)
    ids = ids.to(model.device)
    taken, peaks, rates = {}, {}, {}
    for name, work in _works(model, ids):
        say(name)
        taken[name] = _median_seconds(work.do, model.device, seconds)
        peaks[name] = peak_bytes(model.device)
    say("matrix products")
    roofline = products_per_second(model.device, seconds)
    say("operations of one row")
    for name, work in _works(model, ids[:1]):
        with _plain_products(model), _Count() as count:
            work.do()
        tokens_per_second = batch_size * work.tokens / taken[name]
        rates[name] = Rate(
            tokens_per_second=tokens_per_second,
            milliseconds=1000 * taken[name] / (work.tokens if name == "decoding" else 1),
            operations_per_token=count.operations / work.tokens,
            roofline_percent=100 * tokens_per_second * count.operations / work.tokens / roofline,
            peak_bytes=peaks[name],
        )
    model.zero_grad()
    with reading(model):
        cache = _read(model, ids[:1], TitansCache(model.config))
        cache = _read(model, ids[:1, :1], cache)
    return Throughput(roofline, **rates, state_bytes=cache.nbytes(), state_tokens=cache.num_columns)


@torch.no_grad()
def products_per_second(device: torch.device, seconds: float = 2.0) -> float:
    """Operations per second, a multiply-add counted as two, of the fastest float32 product of two squares.

    Sizes double until one product takes a thirty-second part of the time.
    """
    best, size = 0.0, _SMALLEST_PRODUCT
    while True:
        left, right, out = torch.randn(3, size, size, device=device)
        taken = _median_seconds(partial(torch.mm, left, right, out=out), device, seconds / 4)
        best = max(best, 2 * size**3 / taken)
        if taken > seconds / 32 or size == _LARGEST_PRODUCT:
            return best
        size *= 2


def _works(model: TitansForCausalLM, ids: Tensor) -> Iterator[tuple[str, _Work]]:
    """What is timed and counted, with token ids (rows, n), each prepared when it is asked for.

    In the order of what they hold, since a process knows only the most that it has ever held.
    """
    with reading(model):
        behind_prompt = _read(model, ids[:, :PROMPT_TOKENS], TitansCache(model.config))
    yield "decoding", _Work(partial(_decode, model, ids[:, :1], behind_prompt), DECODED_TOKENS)
    with reading(model):
        behind_stretch = _read(model, ids, TitansCache(model.config))

    def read_on() -> None:
        with reading(model):
            _read(model, ids, behind_stretch.clone())

    yield "reading", _Work(read_on, ids.shape[1])
    yield "training", _Work(partial(_train, model, ids), ids.shape[1])


def _read(model: TitansForCausalLM, ids: Tensor, cache: TitansCache) -> TitansCache:
    """As a session reads."""
    model(ids, past_key_values=cache, logits_to_keep=1, output_surprise=True)
    return cache


def _decode(model: TitansForCausalLM, ids: Tensor, cache: TitansCache) -> None:
    """The likeliest tokens after ids (rows, 1)."""
    cache = cache.clone()
    with reading(model):
        for _ in range(DECODED_TOKENS):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)


def _train(model: TitansForCausalLM, ids: Tensor) -> None:
    was_training = model.training
    model.train()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.train(was_training)


def _median_seconds(do: Callable[[], object], device: torch.device, seconds: float) -> float:
    def once() -> float:
        began = time.perf_counter()
        do()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < _LEAST_REPEATS or time.perf_counter() < end:
        taken.append(once())
    return statistics.median(taken)


def peak_bytes(device: torch.device) -> int | None:
    """What this process has had allocated on a CUDA device, or else resident, at most; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        # As ru_maxrss, but that begins with what the parent had.
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:
        return None
    # Kilobytes, but on macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def _plain_products(model: TitansForCausalLM) -> Iterator[None]:
    """Within this block every product is one that torch knows of: no compiled loop, no fused attention."""
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    backends = [memory.backend for memory in memories]
    try:
        for memory in memories:
            memory.backend = "chunkwise"
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for memory, backend in zip(memories, backends, strict=True):
            memory.backend = backend


class _Count(TorchDispatchMode):
    """Counts operations.

    `FlopCounterMode` would, by the same formulas, but it fails where a module is called with views of
    parameters, as a memory is with its persistent tokens, and misses what is added in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = _NOT_IN_PLACE.get(func.overloadpacket, func.overloadpacket)
        if (operations := flop_registry.get(packet)) is not None:
            self.operations += operations(*args, **kwargs, out_val=result)
        return result
