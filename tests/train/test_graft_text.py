"""Trainings of a graft on text: its adaptation on cached features, and what it has inside its base."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from titans import graft
from titans.data import byte_tokenizer
from titans.hf import GraftedForCausalLM
from titans.hf.graft.feature_cache import FeatureCache, Unit, write_features
from titans.train.graft.loop import LoopResult
from titans.train.graft.meta import MetaTraining
from titans.train.graft.run import fit_graft
from titans.train.graft.segments import Segments
from titans.train.graft.settings import AdaptationTraining, ThroughTraining
from titans.train.graft.text import HeldOutText
from titans.train.graft.through import ThroughModel, fit_through

from .grafts import documents, small_base, text_of

VOCAB, PERIOD = 16, 20


def test_rows_read_texts_from_their_beginnings() -> None:
    segments = Segments([35, 9, 20], rows=2, tokens=10, seed=3)
    read = [segments.at(step) for step in range(40)]
    assert read[17] == Segments([35, 9, 20], 2, 10, 3).at(17)
    for row in range(2):
        texts = [one[row] for one in read]
        assert texts[0].begin == 0 and all(one.text != 1 for one in texts)
        for before, after in itertools.pairwise(texts):
            ended = before.begin + 10 == {0: 30, 2: 20}[before.text]
            assert after.begin == 0 if ended else after == type(after)(before.text, before.begin + 10)
    with pytest.raises(ValueError, match="no text has 50 tokens"):
        Segments([35, 9, 20], 1, 50, 0)


def features(base: LlamaForCausalLM, folder: Path) -> tuple[GraftedForCausalLM, FeatureCache]:
    """Of texts that repeat their words; a graft whose adaptation begins with a step that is too small."""
    settings = dict(chunk_size=8, step=0.02, momentum=0.1, half_life=400.0, warm_up=0, learned_start=True)
    grafted = graft(base, byte_tokenizer(), window=32, sinks=2, adaptation=settings)
    units = []
    for group, seeds in (("text", range(6)), ("text-held-out", (100, 101))):
        for seed in seeds:
            ids = torch.tensor([[*(text_of(seed, 60) * 4)[:192]]])
            units.append(Unit(group, {"text": (ids, torch.zeros_like(ids))}, f"text-{seed}"))
    return grafted, write_features(grafted._windowed, units, folder, [])


META = AdaptationTraining(
    steps=12, rows=2, tokens=48, held_out_tokens=160, evaluate_every=4, save_every=4, number_rate=0.3
)


def fit_adaptation(
    grafted: GraftedForCausalLM,
    cache: FeatureCache,
    output: Path,
    meta: AdaptationTraining = META,
    **options: Any,
) -> LoopResult[Any]:
    given = {"trained": ["adaptation"], "features": cache.folder, "meta": meta, **options}
    return fit_graft(grafted, None, None, output, **given)["adaptation"]


def same(one: Any, other: Any) -> bool:
    first, second = one.own_state_dict(), other.own_state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_an_adaptation_is_trained_through_its_updates(tmp_path: Path) -> None:
    base, lines = small_base(), []
    grafted, cache = features(base, tmp_path / "features")
    result = fit_adaptation(grafted, cache, tmp_path / "out", on_log=lambda name, line: lines.append(line))
    assert result.finished and result.step == 12 and result.best_step > 0
    assert result.held_out.mean < result.untrained.mean - 0.01
    assert not result.held_out.harms(result.untrained)
    assert torch.sigmoid(grafted.adaptation.step_logit) > 0.05, "the step was too small"
    for name, parameter in grafted.adaptation.named_parameters():
        assert not torch.equal(
            parameter, dict(features(base, tmp_path / "features")[0].adaptation.named_parameters())[name]
        ), name
    loaded = GraftedForCausalLM.from_pretrained(tmp_path / "out", base=base)
    assert same(loaded, grafted)
    assert [line["step"] for line in lines if line["kind"] == "held out"] == [0, 4, 8, 12]
    # Interrupted and continued it is the same to the bit.
    again, _ = features(base, tmp_path / "features")
    training = MetaTraining(again.adaptation, again._windowed.head, cache, tmp_path / "stops", META)
    training.stop_requested = False
    training.run(lambda line: setattr(training, "stop_requested", line["step"] == 5))
    assert training.progress.step == 5
    again, _ = features(base, tmp_path / "features")
    assert fit_adaptation(again, cache, tmp_path / "stops") == result and same(again, grafted)
    with pytest.raises(ValueError, match="was begun with tokens=48, now it is 24"):
        fit_adaptation(again, cache, tmp_path / "stops", AdaptationTraining(**{**vars(META), "tokens": 24}))
    with pytest.raises(ValueError, match="has no adaptation"):
        fit_adaptation(graft(base, byte_tokenizer(), window=32, adaptation=False), cache, tmp_path / "no")


def test_what_is_no_better_on_every_held_out_text_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_base()
    grafted, cache = features(base, tmp_path / "features")
    before = grafted.own_state_dict()["adaptation.step_logit"].clone()
    found = iter([2.0, 1.5, 1.4, 1.3])
    monkeypatch.setattr(
        MetaTraining,
        "evaluate",
        lambda self: HeldOutText({"a": next(found), "b": self.progress.step / 100 + 1}, {"a": 2.0, "b": 1.0}),
    )
    result = fit_adaptation(grafted, cache, tmp_path / "out")
    assert result.best_step == 0 and result.held_out == result.untrained
    assert torch.equal(grafted.adaptation.step_logit, before) and not grafted.adaptation.start_bias.any()


def repeated(seed: int) -> Tensor:
    """A random sequence, four times; longer than the window."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (PERIOD,), generator=generator).repeat(4)


def one_layer() -> LlamaForCausalLM:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                num_attention_heads=2, eos_token_id=None, bos_token_id=None, pad_token_id=None,
            )
        )  # fmt: skip
        model.model.embed_tokens.weight.normal_()
        model.lm_head.weight.normal_(std=0.1)
    return model.eval()


def branched(base: LlamaForCausalLM, **options: Any) -> GraftedForCausalLM:
    inside = dict(
        layers=[0], num_heads=1, head_dim=32, chunk_size=8, start="sharp", half_lives=(200.0, 400.0)
    )
    given = {"window": 16, "sinks": 0, "adaptation": False, "residual": inside, **options}
    return graft(base, byte_tokenizer() if base.config.vocab_size == 256 else None, **given)


def test_a_branch_learns_to_recall_beyond_the_window(tmp_path: Path) -> None:
    texts, held_out = [repeated(seed) for seed in range(320)], {"a": repeated(998), "b": repeated(999)}
    settings = ThroughTraining(
        steps=40, rows=8, tokens=79, held_out_tokens=80, evaluate_every=40, save_every=100, branch_rate=0.05
    )
    base = one_layer()
    before, lines = {name: value.clone() for name, value in base.state_dict().items()}, []
    training = ThroughModel(branched(base), texts, held_out, tmp_path, settings)
    result = training.run(lines.append)
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.4
    # The base sees no earlier repetition, and can do no better than a guess among all words.
    guess = math.log(VOCAB)
    assert min(result.untrained.base.values()) > guess > max(result.held_out.losses.values()) + 0.2
    assert result.untrained.losses == pytest.approx(result.untrained.base, abs=1e-6)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


@torch.no_grad()
def test_segments_are_read_as_parts_of_their_texts(tmp_path: Path) -> None:
    grafted = branched(small_base(), adaptation=True)
    grafted.residual["0"].memory.output.weight.normal_(std=0.3)
    texts = [torch.tensor([*text_of(seed)[:length]]) for seed, length in enumerate((61, 30, 90))]
    settings = ThroughTraining(rows=2, tokens=20, held_out_tokens=20)
    training = ThroughModel(grafted, texts, {"a": texts[0]}, tmp_path, settings)
    whole = [grafted(ids[None]).logits[0] for ids in texts]
    for step in range(6):
        expected = []
        for one in training.segments.at(step):
            part = slice(one.begin, one.begin + 20)
            labels = texts[one.text][one.begin + 1 : one.begin + 21]
            expected.append(F.cross_entropy(whole[one.text][part], labels))
        loss, _ = training.loss(step)
        torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-4)


def test_training_through_the_base_resumes_to_the_bit(tmp_path: Path) -> None:
    settings = ThroughTraining(
        steps=6, rows=2, tokens=24, held_out_tokens=60, evaluate_every=3, save_every=2, branch_rate=0.03,
        lora_rate=0.01,
    )  # fmt: skip
    texts, held_out = documents(0, 3), documents(50, 1)

    def made() -> GraftedForCausalLM:
        return branched(small_base(), lora={"rank": 2, "targets": ["q_proj", "down_proj"]})

    plain, grafted, ids = branched(small_base()), made(), torch.tensor([[*text_of(7, 90)[:60]]])
    with torch.no_grad():
        assert torch.equal(grafted(ids).logits, plain(ids).logits), "nothing changes before the training"
    assert grafted.config.origin == plain.config.origin
    result = fit_through(grafted, texts, held_out, tmp_path / "whole", training=settings)
    assert result.finished and result.best_step > 0 and result.held_out.mean < result.untrained.mean
    again = made()
    tokens = [torch.tensor([*document.data]) for document in texts]
    others = {document.name: torch.tensor([*document.data]) for document in held_out}
    training = ThroughModel(again, tokens, others, tmp_path / "stops", settings)
    training.run(lambda line: setattr(training, "stop_requested", line["step"] == 3))
    assert training.progress.step == 3
    again = made()
    assert fit_through(again, texts, held_out, tmp_path / "stops", training=settings) == result
    assert same(again, grafted)
    # The folder has low-rank changes and branches, and is read on the base that it was made on.
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert weights["base.model.layers.1.mlp.down_proj.lora_B.default.weight"].any()
    assert weights["residual.0.memory.output.weight"].any() and not any(
        "base_layer" in name for name in weights
    )
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["lora"]["rank"] == 2
    loaded = GraftedForCausalLM.from_pretrained(tmp_path / "whole", base=small_base())
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, grafted(ids).logits)
        assert (loaded(ids).logits - plain(ids).logits).abs().max() > 1e-3
    trained = {name for name, parameter in grafted.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("residual.") for name in trained)
    for given, message in (
        ({"targets": ["nothing"]}, r"lora has targets=\['nothing'\]: Target modules"),
        ({"rank": 0}, "lora has rank=0: give a whole number"),
        ({"size": 2}, "give a dict of rank, alpha, targets"),
    ):
        with pytest.raises(ValueError, match=message):
            branched(small_base(), lora=given)
    with pytest.raises(ValueError, match="nothing inside its base to train"):
        fit_through(
            branched(small_base(), residual=None), texts, held_out, tmp_path / "no", training=settings
        )
    both = branched(small_base(), adaptation=True, association=True)
    with pytest.raises(ValueError, match="residual branches change what is cached"):
        fit_graft(both, None, None, tmp_path / "no")
    with pytest.raises(ValueError, match="rows=0: give a whole number of at least 1"):
        fit_through(made(), texts, held_out, tmp_path / "no", training=ThroughTraining(rows=0))
