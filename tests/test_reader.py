"""Any causal LM is a reader: whole = any split, in sessions, evaluation and files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import titans
from titans.data import byte_tokenizer
from titans.evaluate import bits_per_byte, score
from titans.evaluate.needle import attention_reach, needle_table
from titans.hf import TitansConfig, TitansForCausalLM
from titans.stream import Session, describe_memory, feed_together, reader_of
from titans.stream import session as session_module
from titans.stream.causal import position_limit

from .models import CONFIGS, small_causal_lm

IDS = np.random.default_rng(0).integers(0, 256, 41)
# Parts of Mamba-2 and Qwen3-Next are computed in float32 whatever the model's precision.
TOLERANCE = {"llama": 2e-5, "mistral": 2e-5, "mamba2": 2e-5, "mamba": 2e-5, "qwen3_next": 3e-4}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: small_causal_lm(name) for name in CONFIGS}


def in_one_call(model: PreTrainedModel, ids: Any) -> Tensor:
    """Logits (time, vocab)."""
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(ids, np.int64))[None], use_cache=False).logits[0]


def next_logits(session: Session) -> Tensor:
    last = torch.tensor([session._now.recent[-1:]])
    return session.reader.read(last, session.cache).logits[0, -1]


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_equals_any_split(name: str, models: dict[str, PreTrainedModel]) -> None:
    model = models[name]
    reader, whole = reader_of(model), in_one_call(model, IDS)
    for sizes in ([41], [20, 21], [1] * 41, [3, 17, 1, 20]):
        cache, ids = reader.start(), torch.from_numpy(IDS)[None]
        parts = [reader.read(piece, cache, all_logits=True).logits[0] for piece in ids.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=TOLERANCE[name])
        assert cache.num_columns == 41 and cache.batch_size == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_session_generates_forks_saves_and_loads(
    name: str, models: dict[str, PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PIECE_LENGTH", 16)
    model, tolerance = models[name], dict(rtol=0, atol=TOLERANCE[name])
    session = Session(model)
    session.feed(IDS[:25])
    fork = session.fork()
    fork.feed(IDS[:9])
    session.feed(IDS[25:])
    torch.testing.assert_close(next_logits(session), in_one_call(model, IDS)[-1], **tolerance)
    expected = in_one_call(model, [*IDS[:25], *IDS[:9]])
    torch.testing.assert_close(next_logits(fork), expected[-1], **tolerance)
    session.save(tmp_path / "memory")
    loaded = Session.load(tmp_path / "memory", model)
    assert torch.equal(next_logits(loaded), next_logits(session))
    assert describe_memory(tmp_path / "memory").stats.tokens == 41

    greedy = [*IDS]
    for _ in range(5):
        greedy.append(int(in_one_call(model, greedy)[-1].argmax()))
    options = dict(max_new_tokens=5, do_sample=False)
    assert session.generate(**options)[0].tolist() == greedy[41:]
    assert list(loaded.generate(stream=True, **options)) == greedy[41:]
    for each in (session, loaded):
        torch.testing.assert_close(next_logits(each), in_one_call(model, greedy)[-1], **tolerance)
    best = fork.generate(max_new_tokens=4, do_sample=False, num_beams=3)
    assert best.shape == (1, 4) and fork.num_tokens == 38
    assert fork.stats().layers == () and fork.stats().mean_surprise is None and fork.stats().state_bytes > 0


@pytest.mark.parametrize("name", ["llama", "mamba2", "qwen3_next", "mamba"])
def test_sessions_fed_together_equal_each_alone(name: str, models: dict[str, PreTrainedModel]) -> None:
    sessions = [Session(models[name]) for _ in range(3)]
    feed_together(sessions, [IDS[:4], IDS[:11], []])
    feed_together(sessions, [IDS[4:30], IDS[11:12], IDS[:7]])
    for session, count in zip(sessions, (30, 12, 7), strict=True):
        expected = in_one_call(models[name], IDS[:count])[-1]
        torch.testing.assert_close(next_logits(session), expected, rtol=0, atol=TOLERANCE[name])


@pytest.mark.parametrize("name", ["llama", "mamba2", "qwen3_next", "mamba"])
def test_losses_by_position_whatever_the_batch(name: str, models: dict[str, PreTrainedModel]) -> None:
    model, texts = models[name], [IDS, IDS[5:16], IDS[7:37]]
    losses = []
    for text in texts:
        tokens = torch.from_numpy(text)
        losses.append(F.cross_entropy(in_one_call(model, text)[:-1], tokens[1:], reduction="none"))
    torch.testing.assert_close(score(model, IDS, piece_length=9), losses[0], rtol=0, atol=1e-3)
    found = bits_per_byte(model, [(text, len(text)) for text in texts], batch_size=3, piece_length=8)
    assert found.nats_per_token == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
    begun = 0.0
    for text in texts:
        logits = in_one_call(model, [7, 8, *text])[1:-1]
        begun += float(F.cross_entropy(logits, torch.from_numpy(text), reduction="sum"))
    lengths = [(text, len(text)) for text in texts]
    found = bits_per_byte(model, lengths, batch_size=3, piece_length=8, beginning=[7, 8])
    assert found.tokens == sum(map(len, texts))
    assert found.nats_per_token == pytest.approx(begun / found.tokens, abs=1e-5)
    with pytest.raises(ValueError, match="no memory that could be frozen"):
        bits_per_byte(model, [(IDS, 41)], freeze_memory=True)


def test_needles_are_asked_of_recurrent_models(models: dict[str, PreTrainedModel]) -> None:
    (cell,) = needle_table(models["mamba2"], byte_tokenizer(), "passkey", [400], [0.5], samples=2)
    assert cell.accuracy == 0 and cell.beyond_attention
    reach = {name: attention_reach(config) for name, config in CONFIGS.items()}
    assert reach == {
        "llama": np.inf, "mistral": 14, "mamba2": 0, "mamba": 0, "qwen3_next": np.inf
    }  # fmt: skip


def test_a_text_beyond_the_last_position_is_refused_before_it_is_read() -> None:
    model = small_causal_lm("llama", max_position_embeddings=16)
    session, limit = Session(model), r"positions for 16 tokens \(max_position_embeddings\)"
    with pytest.raises(ValueError, match=limit):
        session.feed(IDS[:17])
    assert session.num_tokens == 0
    session.feed(IDS[:12])
    with pytest.raises(ValueError, match=limit):
        session.generate(max_new_tokens=6, do_sample=False)
    assert session.num_tokens == 12
    assert session.generate(max_new_tokens=4, do_sample=False).shape == (1, 4)
    with pytest.raises(ValueError, match=limit):
        bits_per_byte(model, [(IDS, 41)])
    assert bits_per_byte(model, [(IDS, 41)], context_length=16).tokens == 40

    def extended(**rope: Any) -> Any:
        parameters = {"rope_theta": 1e4, **rope}
        return small_causal_lm("llama", max_position_embeddings=16, rope_parameters=parameters).config

    assert position_limit(extended(rope_type="default")) == 16
    assert position_limit(extended(rope_type="linear", factor=4.0)) == 64
    yarn = dict(rope_type="yarn", factor=3.0, original_max_position_embeddings=8)
    assert position_limit(extended(**yarn)) == 24
    assert position_limit(CONFIGS["mistral"]) is position_limit(CONFIGS["mamba2"]) is None


def test_what_cannot_be_read_in_pieces_is_refused_by_name(models: dict[str, PreTrainedModel]) -> None:
    sizes = dict(vocab_size=256, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    inside = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"RecurrentGemmaForCausalLM cannot read .*: its output has no past"):
        Session(inside)
    encoder = T5ForConditionalGeneration(T5Config(vocab_size=256, d_model=8, d_kv=4, d_ff=8, num_layers=1))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration takes no cache"):
        Session(encoder)
    forgetful = copy.deepcopy(models["llama"])
    forward = forgetful.forward

    def forget(input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        return forward(input_ids, use_cache=use_cache)

    forgetful.forward = forget
    with pytest.raises(ValueError, match=r"differ by \d+% from those of one call"):
        Session(forgetful)


def test_a_memory_file_belongs_to_its_kind_of_model(
    models: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    session = Session(models["llama"])
    session.feed(IDS)
    session.save(tmp_path / "memory")
    with pytest.raises(ValueError, match=r"by a model of type 'llama'.*this is a model of type 'mamba2'"):
        Session.load(tmp_path / "memory", models["mamba2"])
    graft = titans.graft(copy.deepcopy(models["llama"]), window=16)
    small = TitansForCausalLM(TitansConfig.from_preset("tiny", variant="lmm", num_hidden_layers=1)).eval()
    for writer, is_a, reader, own in (
        (small, "a Titans model", graft, "a graft"),
        (graft, "a graft", small, "a Titans model"),
    ):
        written = Session(writer)
        written.feed(IDS)
        written.save(tmp_path / "of-another-kind")
        with pytest.raises(ValueError, match=f"was written by {is_a}, and this is {own}: load it with the"):
            Session.load(tmp_path / "of-another-kind", reader)
    other = copy.deepcopy(models["llama"])
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    with pytest.raises(ValueError, match="another checkpoint"):
        Session.load(tmp_path / "memory", other)
    lower = Session.load(tmp_path / "memory", copy.deepcopy(models["llama"]).half())
    assert lower.stats().state_bytes < 0.6 * session.stats().state_bytes
    empty = Session(models["llama"])
    empty.feed(IDS[:1])
    empty.save(tmp_path / "memory")
    loaded = Session.load(tmp_path / "memory", models["llama"])
    torch.testing.assert_close(next_logits(loaded), next_logits(empty), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_read_with_and_learned_prompts_are_refused(
    models: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    small = TitansForCausalLM(TitansConfig.from_preset("tiny", variant="lmm", num_hidden_layers=1))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for base in (small.eval(), copy.deepcopy(models["llama"])):
        with pytest.raises(ValueError, match="PROMPT_TUNING: a learned prompt stands before every piece"):
            Session(get_peft_model(copy.deepcopy(base), prompt))
        before = in_one_call(base, IDS)
        adapter = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        tuned = get_peft_model(base, adapter).eval()
        session = Session(tuned)
        session.feed(IDS[:30])
        session.feed(IDS[30:])
        expected = in_one_call(tuned, IDS)
        assert not torch.allclose(before, expected, atol=1e-3)
        torch.testing.assert_close(next_logits(session), expected[-1], rtol=0, atol=1e-4)
        session.save(tmp_path / "memory")
        assert torch.equal(next_logits(Session.load(tmp_path / "memory", tuned)), next_logits(session))
        with torch.no_grad():
            next(p for name, p in tuned.named_parameters() if "lora_B" in name).mul_(2)
        with pytest.raises(ValueError, match="another checkpoint"):
            Session.load(tmp_path / "memory", tuned)
