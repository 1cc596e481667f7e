"""Checkpoints and configurations: what goes out comes back, what is missing is made anew."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from titans.hf import PRESETS, TitansConfig, TitansForCausalLM, TitansModel

from ..variants import VARIANTS
from .models import logits_of, random_ids, small_config, small_model

IDS = random_ids(2, 20)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "tied"), [(torch.float32, True), (torch.bfloat16, False), (torch.float64, True)]
)
def test_a_checkpoint_gives_the_same_weights_to_the_bit(variant, dtype, tied, tmp_path):
    model = small_model(variant, tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(again) is TitansForCausalLM and again.dtype == dtype and not again.training
    assert again.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    kept = again.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    # Not to the bit: on some processors a product rounds by where its operands lie in memory.
    torch.testing.assert_close(logits_of(again, IDS), logits_of(model, IDS))
    base = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert type(base) is TitansModel
    with torch.no_grad():
        logits = again.lm_head(base(IDS).last_hidden_state)
    torch.testing.assert_close(logits, logits_of(model, IDS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_missing_tensor_is_initialised_and_no_other_is_touched(variant, tmp_path):
    model = small_model(variant).float()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".layers.0." in name]:
        save_file({k: v for k, v in tensors.items() if k != name}, file, {"format": "pt"})
        again = TitansForCausalLM.from_pretrained(tmp_path)
        for other, value in again.state_dict().items():
            if other == name:
                assert (
                    value.isfinite().all()
                    and value.abs().max() < 20
                    and not torch.equal(value, tensors[name])
                )
            else:
                assert torch.equal(value, tensors[other]), f"{other} was lost with {name}"


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path):
    small_model("mac").float().save_pretrained(tmp_path)
    for field in ("vocab_size", "hidden_size", "memory_expansion", "num_persistent_tokens"):
        config = AutoConfig.from_pretrained(tmp_path)
        setattr(config, field, getattr(config, field) + 4)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            TitansForCausalLM.from_pretrained(tmp_path, config=config)


def test_the_vocabulary_can_grow():
    model = small_model("mac", tie_word_embeddings=True)
    before = logits_of(model, IDS)
    model.resize_token_embeddings(before.shape[-1] + 5, mean_resizing=False)
    after = logits_of(model, IDS)
    assert after.shape[-1] == before.shape[-1] + 5 == model.config.vocab_size
    torch.testing.assert_close(after[..., :-5], before)


WRONG = [
    (dict(sliding_windw=3), r"sliding_windw=3 is not a field.*sliding_window"),
    (dict(variant="mad"), r"variant='mad': choose one of \['hope', 'lmm', .*'mac', .*'window'\]"),
    (dict(hidden_size="12"), "hidden_size='12': give a whole number"),
    (dict(hidden_size=12.0), "hidden_size=12.0: give a whole number"),
    (dict(hidden_size=True), "hidden_size=True: give a whole number"),
    (dict(memory_nrom=True), r"memory_nrom=True is not a field of TitansConfig: choose from"),
    (dict(memory=3), "memory=3: give a TitansMemoryConfig or a dict"),
    (dict(memory=dict(from_="paper")), r"from_='paper' is not a field of TitansMemoryConfig: .*form"),
    (dict(memory=dict(form="best")), r"memory.form: form='best': choose one of \['paper', .*'stable'\]"),
    (dict(memory=dict(form={"nrom": True})), "memory.form: form has no field 'nrom': choose from .*norm"),
    (dict(memory=dict(form={"norm": "no"})), "memory.form: norm='no': give True or False"),
    (dict(memory=dict(objective="hubr")), r"memory.objective: objective='hubr': choose one of .*huber"),
    (dict(memory=dict(objective={"name": "lp", "p": 1})), "memory.objective: p=1: give"),
    (dict(memory=dict(rule="alpha")), r"memory.rule: rule='alpha': choose one of .*momentum"),
    (dict(memory=dict(rule={"name": "momentum", "row": 1})), "memory.rule: rule 'momentum' has no parameter"),
    (dict(rope_theta="high"), "rope_theta='high': give a finite number"),
    (dict(head_dim=5), "head_dim=5: .*even"),
    (dict(num_persistent_tokens=-1), "num_persistent_tokens=-1"),
    (dict(memory=dict(half_lives=[2e6, 1e6])), r"memory.half_lives=\[2000000.0, .*\]: give two numbers"),
    (dict(memory=dict(combination="product")), r"memory.combination='product': choose one of \['gate',"),
    (dict(memory=dict(start="middle")), r"memory.start='middle': choose one of \['random', .*'sharp'\]"),
    (dict(memory=dict(start="sharp", conv_kernel=1)), "memory.start='sharp' looks one token back"),
    (dict(memory=dict(features="cos")), "memory.features='cos': choose one of .*'sin'"),
    (dict(memory_depth=2, memory=dict(features="sin")), "memory_depth=2 with memory.features='sin': .*=1,"),
    (dict(memory=dict(feature_size=8)), "memory.feature_size=8 with features='identity'"),
    (dict(memory=dict(features="sin", form="paper")), "memory.features='sin' with residual=True in the form"),
    (dict(memory=dict(start="induction", conv_kernel=1)), "memory.start='induction' looks one token back"),
    (dict(memory=dict(conv_kernel=0)), "memory.conv_kernel=0: give a whole number of at least 1"),
    (dict(rope_theta=0.0), "rope_theta=0.0"),
    (dict(rms_norm_eps=-1e-6), "rms_norm_eps=-1e-06"),
    *(
        ({name: 0}, f"{name}=0: give a whole number of at least 1")
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "head_dim", "memory_depth", "memory_expansion", "chunk_size", "segment_length", "sliding_window",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[str(fields) for fields, _ in WRONG])
def test_a_wrong_configuration_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TitansConfig(**fields)
    with pytest.raises(ValueError, match=message):
        TitansConfig.from_preset("tiny", **fields)
    config = small_config("mac").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for kind in (AutoConfig, TitansConfig):
        with pytest.raises(ValueError, match=message):
            kind.from_pretrained(tmp_path, **fields)


def test_a_saved_configuration_may_be_changed(tmp_path):
    small_config("mac").save_pretrained(tmp_path)
    changed = AutoConfig.from_pretrained(tmp_path, num_hidden_layers=5, chunk_size=4, variant="lmm")
    assert (changed.variant, changed.chunk_size, len(changed.layer_types)) == ("lmm", 4, 5)
    assert TitansConfig.from_pretrained(tmp_path, other=1, return_unused_kwargs=True)[1] == {"other": 1}


def test_an_unknown_preset_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="preset 'huge' is not known: choose one of") as error:
        TitansConfig.from_preset("huge")
    assert all(f"'{name}'" in str(error.value) for name in PRESETS)


def test_a_preset_can_be_changed_field_by_field():
    config = TitansConfig.from_preset("tiny", variant="lmm", num_hidden_layers=5)
    assert (config.variant, config.num_hidden_layers, config.vocab_size) == ("lmm", 5, 256)
    assert config.hidden_size == PRESETS["tiny"]["hidden_size"] and len(config.layer_types) == 5
