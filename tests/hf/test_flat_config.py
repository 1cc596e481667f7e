"""Checkpoints and memory files of before the memory had a configuration of its own."""

from __future__ import annotations

import json

import pytest
import torch

from titans.hf import TitansCache, TitansConfig, TitansForCausalLM
from titans.hf.flat_config import nested
from titans.nn import FORMS

from .models import filled_cache, logits_of, random_ids, small_config, small_model
from .test_cache import forge, parts_of

FLAT = {
    "conv_kernel": 3,
    "memory_activation": "gelu",
    "memory_residual": True,
    "memory_norm": True,
    "memory_normalize_step": False,
    "memory_row_limit": None,
    "memory_length_floor": 0.5,
    "memory_decay_to_initial": False,
    "memory_max_momentum": 0.9,
    "memory_max_step_size": None,
    "memory_induction_init": True,
    "memory_bounded_half_lives": True,
    "memory_gates_see_keys": True,
    "memory_gate_hidden_size": 3,
    "memory_shortest_half_life": 64.0,
    "memory_combination": "sum",
    "memory_local_chunk_sizes": None,
    "memory_shard_length": None,
    "memory_unit_rows": False,
}
NESTED = {
    "form": {
        "name": "paper",
        "length_floor": 0.5,
        "bounded_half_lives": True,
        "gates_see_keys": True,
        "gate_hidden_size": 3,
    },
    "start": "induction",
    "conv_kernel": 3,
    "half_lives": [64.0, 1e6],
    "combination": "sum",
}


def flat(fields, **changes):
    """Saved fields in the form of before."""
    return {name: value for name, value in fields.items() if name != "memory"} | FLAT | changes


def test_a_flat_checkpoint_and_its_memory_go_on_to_the_bit(tmp_path):
    model, ids = small_model("mag", memory=NESTED), random_ids(2, 20)
    model.save_pretrained(tmp_path)
    cache = filled_cache(model, ids[:, :14])
    cache.save(tmp_path / "memory")
    expected = logits_of(model, ids)
    with torch.no_grad():
        continued = model(ids[:, 14:], past_key_values=cache).logits

    file = tmp_path / "config.json"
    file.write_text(json.dumps(flat(json.loads(file.read_text()))))
    again = TitansForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    form = again.config.memory.form
    assert form.pop("name") == "stable"
    assert {**again.config.memory.to_dict(), "form": form | {"name": "paper"}, "dtype": None} == {
        **model.config.memory.to_dict(),
        "dtype": None,
    }
    again = TitansForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits_of(again, ids), expected)

    tensors, about = parts_of(tmp_path / "memory")
    about |= {"same": "{}"}
    # What decided a state then; the rest was not in the header.
    free = ("max_momentum", "max_step_size", "induction", "bounded", "gates_see", "gate_hidden", "half_life")
    header = {
        name: v for name, v in flat(json.loads(about["config"])).items() if not any(f in name for f in free)
    }
    forge(tensors, tmp_path / "memory", {**about, "config": json.dumps(header)})
    loaded = TitansCache.load(tmp_path / "memory", again.config)
    with torch.no_grad():
        assert torch.equal(again(ids[:, 14:], past_key_values=loaded).logits, continued)
    with pytest.raises(ValueError, match=r"was written with memory.form.norm=True, the model has False"):
        TitansCache.load(
            tmp_path / "memory",
            small_config("mag", memory={**NESTED, "form": {"activation": "gelu", "residual": True}}),
        )
    forge(tensors, tmp_path / "memory", {**about, "config": json.dumps(header | {"memory_unit_rows": True})})
    with pytest.raises(ValueError, match="cannot make: memory_unit_rows=True: rows of unit length are gone"):
        TitansCache.load(tmp_path / "memory", again.config)


def test_what_can_no_longer_be_expressed_is_refused():
    fields = small_config("mag").to_dict()
    with pytest.raises(ValueError, match="memory_unit_rows=True: rows of unit length are gone"):
        TitansConfig.from_dict(flat(fields, memory_unit_rows=True))
    with pytest.raises(
        ValueError, match=r'conv_kernel and memory are both given: .*memory=\{"conv_kernel": …\}'
    ):
        TitansConfig.from_dict({**fields, "conv_kernel": 3})
    # New code gets to know what to write.
    for field, advice in [
        (
            "memory_norm",
            r'memory_norm=True is not a field of TitansConfig: give memory=\{"form": \{"norm": …\}\}',
        ),
        ("memory_induction_init", r'give memory=\{"start": …\}'),
        ("memory_unit_rows", "rows of unit length are gone"),
    ]:
        with pytest.raises(ValueError, match=advice):
            TitansConfig(**{field: True})
        with pytest.raises(ValueError, match=advice):
            TitansConfig.from_dict(fields, **{field: True}, return_unused_kwargs=True)


def test_a_configuration_of_now_is_left_unchanged_and_a_part_stays_a_part():
    fields = small_config("mag").to_dict()
    assert nested(fields) == fields
    assert nested({"chunk_size": 8, "memory_norm": True}) == {
        "chunk_size": 8,
        "memory": {"form": {"name": "stable", "norm": True}},
    }


def test_fields_of_a_saved_memory_are_changed_one_by_one(tmp_path):
    small_config("mag", memory={"form": "recall", "conv_kernel": 6, "objective": "huber"}).save_pretrained(
        tmp_path
    )

    def changed(**memory):
        return TitansConfig.from_pretrained(tmp_path, memory=memory).memory

    for memory in (changed(), changed(form={"gate_hidden_size": 5}), changed(start="induction")):
        assert memory.conv_kernel == 6 and memory.objective == {"name": "huber", "delta": 1.0}
        assert memory.form["name"] == "recall" and memory.form["max_step_size"] == 0.25
    assert changed(form={"gate_hidden_size": 5}).form["gate_hidden_size"] == 5
    assert changed(form="stable").memory_form == small_config("mag").memory.memory_form
    with pytest.raises(ValueError, match=r"memory.form: form has no field 'nrom'"):
        changed(form={"nrom": True})


def test_what_depends_on_a_size_follows_a_change_of_it(tmp_path):
    """A flat configuration keeps no bound that its sizes decide."""
    fields = flat(small_model("lmm").config.to_dict(), memory_normalize_step=False)
    config = TitansConfig.from_dict(fields, chunk_size=64, memory_depth=1)
    # A deep memory was the default of that time.
    assert TitansConfig.from_dict({k: v for k, v in fields.items() if k != "memory_depth"}).memory_depth == 2
    assert TitansConfig.from_dict({"chunk_size": 64}).memory_depth == TitansConfig().memory_depth == 1
    memory = TitansForCausalLM(config).model.layers[0].mixer.memory
    assert memory.max_step_size == pytest.approx((1 - config.memory.form["max_momentum"]) / 64)


def test_a_memory_set_later_as_a_dict_is_a_configuration():
    config = small_model("lmm").config
    config.update({"memory": {"form": "recall"}})
    assert config.memory.memory_form == FORMS["recall"]
    with pytest.raises(ValueError, match=r"memory\.form='recal': choose one of|form='recal'"):
        config.memory = {"form": "recal"}
