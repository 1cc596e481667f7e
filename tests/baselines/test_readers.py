"""What a practitioner would try on a pretrained model: readers that equal the base where they should."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from titans import graft
from titans.baselines.continuous_cache import ContinuousCache, ContinuousCacheReader, entry_nbytes
from titans.baselines.dynamic_evaluation import DynamicEvaluationReader, with_lora
from titans.baselines.passages import Passages
from titans.baselines.windowed import WindowedReader
from titans.stream.reader import Reader, reader_of

VOCAB, WINDOW, SINKS, SEGMENT = 41, 16, 2, 4
SGD = partial(torch.optim.SGD, lr=0.3)


def small_base() -> Any:
    sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, eos_token_id=None, bos_token_id=None)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.double().eval()


BASE = small_base()
IDS = torch.randint(VOCAB, (1, 61), generator=torch.Generator().manual_seed(1))


def windowed(kind: type, *arguments: Any, **options: Any) -> Any:
    return kind(*arguments, window=WINDOW, sinks=SINKS, **options)


def lora(optimizer: Any) -> DynamicEvaluationReader:
    model, names = with_lora(BASE, rank=2)
    return windowed(DynamicEvaluationReader, model, optimizer, segment=SEGMENT, names=names)


MAKE: dict[str, Any] = {
    "window": lambda: windowed(WindowedReader, BASE),
    "cache": lambda: windowed(ContinuousCacheReader, BASE, ContinuousCache(0.5, 9.0)),
    "bounded cache": lambda: windowed(ContinuousCacheReader, BASE, ContinuousCache(0.5, 9.0, limit=7)),
    "dynamic": lambda: windowed(DynamicEvaluationReader, BASE, SGD, segment=SEGMENT),
    "adam": lambda: windowed(
        DynamicEvaluationReader, BASE, partial(torch.optim.Adam, lr=0.05), segment=SEGMENT
    ),
    "lora": lambda: lora(SGD),
}


def read(reader: Any, ids: Tensor, sizes: Any = None, cache: Any = None) -> tuple[Tensor, Any]:
    """Log-probabilities (time, vocab) of one row, and the cache."""
    cache = reader.start() if cache is None else cache
    pieces = ids.split(sizes or ids.shape[1], 1)
    found = [reader.read(piece, cache, all_logits=True).logits[0] for piece in pieces]
    return F.log_softmax(torch.cat(found), -1), cache


def window_alone() -> Tensor:
    model = graft(small_base(), window=WINDOW, sinks=SINKS, adaptation=False)
    return read(reader_of(model), IDS)[0]


@pytest.mark.parametrize("name", MAKE)
def test_any_split_and_fork_gives_the_same_and_nothing_later_matters(name: str) -> None:
    reader = MAKE[name]()
    assert isinstance(reader, Reader)
    before = {key: value.clone() for key, value in BASE.state_dict().items()}
    whole, cache = read(reader, IDS)
    assert cache.num_columns == 61 and cache.nbytes() > cache.memory_nbytes()
    for sizes in ([30, 31], [1, 2, 7, 3, 8, 40]):
        torch.testing.assert_close(read(reader, IDS, sizes)[0], whole, rtol=0, atol=1e-9)
    # A fork that reads something else changes neither the first nor the model; causal: it is equal before.
    _, half = read(reader, IDS[:, :30])
    other = torch.cat([IDS[:, :30], IDS[:, 30:].flip(1)], 1)
    forked, _ = read(reader, other[:, 30:], cache=half.clone())
    rest, _ = read(reader, IDS[:, 30:], cache=half)
    torch.testing.assert_close(rest, whole[30:], rtol=0, atol=1e-9)
    alone, _ = read(reader, other)
    torch.testing.assert_close(forked, alone[30:], rtol=0, atol=1e-9)
    torch.testing.assert_close(alone[:30], whole[:30], rtol=0, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in BASE.state_dict().items())
    last = reader.read(IDS, reader.start()).logits
    torch.testing.assert_close(F.log_softmax(last[0], -1), whole[-1:], rtol=0, atol=1e-9)


def test_without_effect_each_is_the_base_in_its_window() -> None:
    expected = window_alone()
    still = partial(torch.optim.SGD, lr=0.0)
    for reader in (
        MAKE["window"](),
        windowed(ContinuousCacheReader, BASE, ContinuousCache(weight=0.0)),
        windowed(DynamicEvaluationReader, BASE, still, segment=SEGMENT),
        lora(still),
    ):
        torch.testing.assert_close(read(reader, IDS)[0], expected, rtol=0, atol=1e-9)
    for name in ("cache", "dynamic", "lora"):
        found = read(MAKE[name](), IDS)[0]
        torch.testing.assert_close(found[:1], expected[:1], rtol=0, atol=1e-9)
        assert (found[20:] - expected[20:]).abs().max() > 1e-2


@pytest.mark.parametrize("limit", [None, 5])
def test_the_continuous_cache_is_its_definition(limit: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    logits = torch.randn(12, VOCAB, generator=generator, dtype=torch.float64)
    ids = torch.randint(3, (12,), generator=generator)
    cache = ContinuousCache(weight=0.3, sharpness=4.0, limit=limit)
    found, entries = cache.read(hidden, ids, logits, cache.empty(8))
    keys = F.normalize(hidden, dim=-1)
    for t in range(12):
        expected = logits[t].softmax(-1)
        past = list(range(t))[-limit:] if limit else list(range(t))
        if past:
            weights = torch.softmax(4.0 * keys[past].half().double() @ keys[t], 0)
            counted = torch.zeros(VOCAB, dtype=torch.float64)
            for i, weight in zip(past, weights, strict=True):
                counted[ids[i + 1]] += weight
            expected = 0.7 * expected + 0.3 * counted
        torch.testing.assert_close(found[t].exp(), expected)
    assert len(entries.keys) == (limit or 11) and entries.nbytes() == entry_nbytes(8) * (limit or 11) + 16


def test_dynamic_evaluation_takes_a_step_on_each_segment() -> None:
    """Two segments with transformers' own cache and optimizer; attention sees both."""
    model = small_base()
    first = model(IDS[:, :SEGMENT], use_cache=True)
    F.cross_entropy(first.logits[0, :-1], IDS[0, 1:SEGMENT]).backward()
    SGD(model.parameters()).step()
    with torch.no_grad():
        second = model(IDS[:, SEGMENT : 2 * SEGMENT], past_key_values=first.past_key_values).logits
    expected = torch.cat([first.logits, second], 1)[0].log_softmax(-1).detach()
    found = read(MAKE["dynamic"](), IDS[:, : 2 * SEGMENT])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_best_passages_stand_in_the_order_of_the_text() -> None:
    words = [f"word{i}" for i in range(300)]
    words[150], words[40] = "the seal of Tomire is 4711", "nobody knows the seal of Kado"
    passages = Passages(" ".join(words), num_words=20)

    def length(text: str) -> int:
        return len(text.split())

    found = passages.best("What is the seal of Tomire?", 60, length)
    assert len(found) == 2 and "Kado" in found[0] and "4711" in found[1]
    assert sum(map(length, found)) <= 60
    assert passages.best("Zebra?", 60, length) == []


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ContinuousCache(weight=1.5), r"weight=1.5: give a number from 0 to 1"),
        (lambda: ContinuousCache(limit=0), "limit=0: give at least 1"),
        (lambda: windowed(DynamicEvaluationReader, BASE, SGD, segment=5), "segment=5: give a divisor of 8"),
        (lambda: windowed(DynamicEvaluationReader, BASE, SGD, names=["x"], segment=4), "no parameter 'x'"),
        (lambda: read(MAKE["dynamic"](), IDS.repeat(2, 1)), "ids has 2 rows"),
        (lambda: Passages("text", num_words=1), "num_words=1"),
    ],
)
def test_refusals(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
