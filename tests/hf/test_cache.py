"""The cache as a value and as a file: forked, reordered, saved, loaded, and refused when it is no state."""

from __future__ import annotations

import copy
import gc
import json
import math
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

from titans.hf import TitansCache, TitansConfig, state_file
from titans.hf.memory_configuration import TitansMemoryConfig
from titans.hf.state_file import open_state_file
from titans.nn import FORMS

from ..variants import DIFFERENT, VARIANTS
from .models import MODELS, assert_near, filled_cache, logits_of, random_ids, small_config, small_model

every_variant = pytest.mark.parametrize("variant", VARIANTS)
different = pytest.mark.parametrize("variant", DIFFERENT)
TEXT, MORE = random_ids(3, 17), random_ids(3, 9, seed=1)


def continued(model, cache, ids=MORE):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def parts_of(path):
    with open_state_file(path) as file:
        return {name: tensor.clone() for name, tensor in file.tensors().items()}, file.about


def forge(tensors, path, about):
    """A file whose checksum is right, whatever it holds."""
    about = {name: value for name, value in {"same": "{}", **about}.items() if value is not None}
    save_file(tensors, path, {**about, "checksum": "0" * 64})
    state_file.seal(path)


@every_variant
@pytest.mark.parametrize("copying", [TitansCache.clone, copy.deepcopy])
def test_a_copy_goes_on_by_itself(variant, copying):
    model = MODELS[variant]
    cache = filled_cache(model, TEXT)
    fork = copying(cache)
    first = continued(model, cache, random_ids(3, 6, seed=2))
    assert_near(continued(model, fork), logits_of(model, torch.cat([TEXT, MORE], 1))[:, 17:])
    assert (cache.num_columns, fork.num_columns) == (23, 26)
    assert_near(first, logits_of(model, torch.cat([TEXT, random_ids(3, 6, seed=2)], 1))[:, 17:])


@every_variant
def test_rows_are_reordered_repeated_selected_and_forgotten(variant):
    model = MODELS[variant]
    expected = {r: logits_of(model, torch.cat([TEXT, MORE], 1)[r : r + 1])[0, 17:] for r in range(3)}
    for act, rows in [
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ]:
        cache = filled_cache(model, TEXT)
        act(cache)
        assert cache.batch_size == len(rows)
        got = continued(model, cache, MORE[rows])
        for logits, row in zip(got, rows, strict=True):
            assert_near(logits, expected[row])
    cache.reset()
    assert (cache.states, cache.num_columns, cache.batch_size, cache.nbytes()) == (None, 0, -1, 0)
    assert_near(continued(model, cache), logits_of(model, MORE))


@every_variant
def test_a_cache_holds_no_graph_and_no_view_of_the_text(variant):
    model = MODELS[variant]
    cache = model(random_ids(1, 200), use_cache=True).past_key_values
    for leaf in pytree.tree_leaves(cache.states):
        assert not leaf.requires_grad
        if variant != "transformer":
            assert leaf.untyped_storage().nbytes() <= 2 * leaf.nbytes, "it keeps a whole stretch alive"


@every_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_file_continues_to_the_bit(variant, dtype, tmp_path):
    model = small_model(variant).to(dtype)
    path = tmp_path / "memory.safetensors"
    mask = torch.ones_like(TEXT)
    mask[1, :4] = mask[2, 3:9] = 0
    with torch.no_grad():
        cache = model(TEXT, attention_mask=mask, use_cache=True).past_key_values
    cache.save(path, {"note": "three rows"})
    again = TitansCache.load(path, model.config)
    assert parts_of(path)[1]["note"] == "three rows"
    assert (again.num_columns, again.batch_size) == (17, 3)
    whole = torch.cat([TEXT, MORE], 1)
    assert again.is_beginning_of(whole) and not again.is_beginning_of(whole.flip(1))
    assert torch.equal(continued(model, again), continued(model, cache))
    again.save(path)
    for actual, expected in zip(
        pytree.tree_leaves(TitansCache.load(path, model.config).states),
        pytree.tree_leaves(cache.states),
        strict=True,
    ):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@every_variant
def test_a_file_of_rows_that_were_selected_or_have_read_nothing_loads(variant, tmp_path):
    """The transformer then holds more slots than it has read, or none."""
    model, path = MODELS[variant], tmp_path / "memory"
    with torch.no_grad():
        mask = (torch.arange(17) >= torch.tensor([[0], [5], [9]])).long()
        selected = model(TEXT, attention_mask=mask, use_cache=True).past_key_values
        selected.batch_select_indices(torch.tensor([2]))
        empty = model(TEXT[:1, :0], use_cache=True).past_key_values
    for cache in (selected, empty):
        cache.save(path)
        got = continued(model, TitansCache.load(path, model.config), MORE[:1])
        assert torch.equal(got, continued(model, cache, MORE[:1]))


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    cache, path = filled_cache(MODELS["mac"], TEXT), tmp_path / "memory"
    with pytest.raises(ValueError, match="empty: read something"):
        TitansCache(cache.config).save(path)
    path.write_bytes(b"old")

    def fail(tensors, file, metadata):
        with open(file, "wb") as half:
            half.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(state_file, "save_file", fail)
        cache.save(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    cache.save(path)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="nothing is not a file"):
        TitansCache.load(tmp_path / "nothing", cache.config)


@different
def test_a_damaged_file_is_refused(variant, tmp_path):
    model, path = MODELS[variant], tmp_path / "memory"
    filled_cache(model, TEXT).save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (
        0,
        1,
        7,
        8,
        9,
        header // 2,
        header - 1,
        header,
        header + 1,
        len(whole) // 2,
        len(whole) - 1,
    ):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="memory is damaged or not a safetensors file"):
            TitansCache.load(path, model.config)
    for content in (
        b"garbage" * 100,
        b"\x80\x04K\x01.",
        b"PK\x03\x04" + b"\0" * 60,
        b"\xff" * 200,
        whole + b"\0",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="memory is damaged or not a safetensors file"):
            TitansCache.load(path, model.config)


HEADERS = [
    (dict(format="titans-state/0"), "has format 'titans-state/0': this version reads 'titans-state/2'"),
    (dict(format=None), "has format None"),
    (dict(config=None), "damaged header"),
    (dict(config="{"), "damaged header"),
    (dict(config="[1]"), "damaged header"),
    (dict(config="null"), "damaged header"),
    (dict(config="[" * 10**5), "damaged header"),
    (dict(config='{"num_hidden_layers": 1e999}'), "damaged header"),
    (dict(config='{"num_hidden_layers": 1000000000000}'), "damaged header"),
    (dict(config='{"num_hidden_layers": "many"}'), "damaged header"),
    (dict(config='{"num_hidden_layers": 2}'), "was written with variant=None"),
    (dict(num_columns=None), "damaged header"),
    (dict(num_columns="-1"), "damaged header"),
    (dict(num_columns="x"), "damaged header"),
    (dict(num_columns="9" * 5000), "damaged header"),
    (dict(num_columns=str(2**60)), "damaged header"),
    (dict(num_columns="16"), "positions contradict each other"),
    (dict(same=None), "damaged header"),
    (dict(same="3"), "damaged header"),
    (dict(same="[" * 10**5), "damaged header"),
    (dict(same='{"new": ["unhashable"]}'), "damaged header"),
    (dict(same='{"new": "nothing"}'), "damaged header"),
    (dict(same='{"new": "[0].anchor.weights[0]"}'), "damaged header"),
    (dict(same='{"[0].memory.tail": "[1].memory.tail"}'), "damaged header"),
]


@pytest.mark.parametrize(("changes", "message"), HEADERS, ids=[str(changes)[:50] for changes, _ in HEADERS])
def test_a_wrong_header_is_refused(changes, message, tmp_path):
    model, path = MODELS["mac"], tmp_path / "memory"
    filled_cache(model, TEXT).save(path)
    tensors, about = parts_of(path)
    forge(tensors, path, {**about, "same": "{}", **changes})
    with pytest.raises(ValueError, match=message):
        TitansCache.load(path, model.config)


# What neither shapes a state nor changes what it means to a model.
FREE = {
    "vocab_size", "intermediate_size", "num_persistent_tokens", "rms_norm_eps", "initializer_range",
    "tie_word_embeddings", "use_cache", "layer_types", "pad_token_id", "bos_token_id", "eos_token_id",
    "model_type", "base_config_key", "keys_to_ignore_at_inference", "sub_configs_defaults", "memory",
}  # fmt: skip
FREE_OF_MEMORY = {"start", "half_lives", "model_type", "base_config_key"}
FREE_OF_FORM = {
    "max_momentum", "max_step_size", "bounded_half_lives", "gates_see_keys", "gate_hidden_size",
    "forget_by_row",
}  # fmt: skip
DECIDING = TitansConfig.__annotations__.keys() - FREE


@pytest.mark.parametrize("field", sorted(DECIDING))
def test_a_state_of_another_configuration_is_refused(field, tmp_path):
    path = tmp_path / "memory"
    filled_cache(MODELS["mac"], TEXT).save(path)
    old = getattr(MODELS["mac"].config, field)
    new = "mag" if field == "variant" else 2 * old
    with pytest.raises(
        ValueError, match=f"was written with {field}={old!r}, the model has {new!r}: load it with"
    ):
        TitansCache.load(path, small_config(**{"variant": "mac", field: new}))


@pytest.mark.parametrize(
    ("field", "memory"),
    [
        ("conv_kernel", {"conv_kernel": 8}),
        ("combination", {"combination": "sum"}),
        ("objective.name", {"objective": "huber"}),
        ("rule.row_limit", {"rule": {"name": "momentum", "row_limit": 4.0}}),
        ("form.activation", {"form": {"activation": "gelu"}}),
        ("form.residual", {"form": {"residual": True}}),
        ("form.norm", {"form": {"norm": True}}),
        ("form.decay_to_initial", {"form": {"decay_to_initial": False}}),
        ("rule.normalize_step", {"form": {"normalize_step": False}}),
        ("rule.length_floor", {"form": {"length_floor": 0.5}}),
        ("rule.row_limit", {"form": {"row_limit": None}}),
    ],
)
def test_a_state_of_another_memory_is_refused(field, memory, tmp_path):
    path, other = tmp_path / "memory", small_config("mac", memory=memory)
    cache = filled_cache(MODELS["mac"], TEXT)
    cache.save(path)
    with pytest.raises(ValueError, match=f"was written with memory.{field}=.*, the model has"):
        TitansCache.load(path, other)
    with pytest.raises(ValueError, match=f"was made with memory.{field}=.*, the model has"):
        cache.check_fits(other)


def test_what_decides_a_state_is_known_of_every_field():
    """A new field stands in `state_fields`, or here among those that decide nothing."""
    decides = MODELS["mac"].config.state_fields()
    assert decides.keys() == DECIDING | {"memory"}
    memory = decides["memory"]
    assert memory.keys() == TitansMemoryConfig.__annotations__.keys() - FREE_OF_MEMORY
    of_form = memory["form"].keys() | memory["rule"].keys() - {"name"}
    assert of_form == vars(FORMS["stable"]).keys() - FREE_OF_FORM


def position_names(tensors):
    return [name for name, tensor in tensors.items() if tensor.dtype == torch.int64]


DAMAGES = {
    "a tensor is missing": lambda t, name: t.pop(name),
    "a tensor too many": lambda t, name: t.update({name + "x": t[name].clone()}),
    "a scalar": lambda t, name: t.update({name: torch.zeros(())}),
    "an axis more": lambda t, name: t.update({name: t[name].unsqueeze(-1)}),
    "a row less": lambda t, name: t.update({name: t[name][:-1].clone()}),
    "another width": lambda t, name: t.update({name: torch.cat([t[name]] * 2, -1)}),
    "another dtype": lambda t, name: t.update({name: t[name].to(torch.int32)}),
    "complex": lambda t, name: t.update({name: t[name].to(torch.complex64)}),
    "eight bits": lambda t, name: t.update({name: t[name].to(torch.float8_e4m3fn)}),
}


@different
@pytest.mark.parametrize("number", range(len(DAMAGES)), ids=DAMAGES)
def test_wrong_tensors_are_refused_whichever_it_is(variant, number, tmp_path):
    """Each damage in a third of the tensors, and each tensor with a third of the damages."""
    damage = [*DAMAGES.values()][number]
    model, path = MODELS[variant], tmp_path / "memory"
    filled_cache(model, TEXT).save(path)
    tensors, about = parts_of(path)
    for name in list(tensors)[number % 3 :: 3]:
        changed = dict(tensors)
        damage(changed, name)
        forge(changed, path, {**about, "same": "{}"})
        with pytest.raises(ValueError, match=r"does not hold exactly|has shape|has dtype"):
            TitansCache.load(path, model.config)


@different
def test_numbers_no_model_could_have_written_are_refused(variant, tmp_path):
    model, path = MODELS[variant], tmp_path / "memory"
    filled_cache(model, TEXT).save(path)
    tensors, about = parts_of(path)
    wrong = []
    for number, (name, tensor) in enumerate(tensors.items()):
        if tensor.dtype == torch.int64:
            # At odds with the other layers; later these would overflow, or ask for 2⁶² slots.
            for value in (-1, 16, 18, 10**7, 2**62, 2**63 - 1):
                wrong.append({name: tensor.index_fill(0, torch.tensor([1]), value)})
        elif tensor.numel():
            value = (math.nan, math.inf)[number % 2]
            wrong.append({name: tensor.clone().index_fill_(0, torch.tensor([2]), value)})
    for value in (18, 10**7, 2**62, 2**63 - 1):
        wrong.append({name: torch.full_like(tensors[name], value) for name in position_names(tensors)})
    wrong.append({name: tensor[:0] for name, tensor in tensors.items()})
    for changes in wrong:
        forge({**tensors, **changes}, path, {**about, "same": "{}"})
        with pytest.raises(ValueError, match="is damaged"):
            TitansCache.load(path, model.config)


def test_a_transformer_must_hold_the_keys_of_all_it_has_read(tmp_path):
    model, path = MODELS["transformer"], tmp_path / "memory"
    filled_cache(model, TEXT).save(path)
    tensors, about = parts_of(path)
    keys = [name for name in tensors if name.endswith(("keys", "values"))]
    forge(
        {**tensors, **{name: tensors[name][:, :10].clone() for name in keys}}, path, {**about, "same": "{}"}
    )
    with pytest.raises(ValueError, match="its counts contradict the slots it holds"):
        TitansCache.load(path, model.config)
    forge({**tensors, keys[0]: tensors[keys[0]][:, :10].clone()}, path, {**about, "same": "{}"})
    with pytest.raises(ValueError, match="has shape"):
        TitansCache.load(path, model.config)


def test_a_narrow_memory_is_refused(tmp_path):
    """A model may be in bfloat16, what it has learned never is."""
    model, path = MODELS["mac"], tmp_path / "memory"
    filled_cache(model, TEXT).save(path)
    tensors, about = parts_of(path)
    learned = [
        name
        for name in tensors
        if any(part in name for part in ("weights", "momentum", "anchor", "snapshot"))
    ]
    assert len(learned) == 2 * 4 * 2
    for name in learned:
        forge({**tensors, name: tensors[name].bfloat16()}, path, {**about, "same": "{}"})
        with pytest.raises(ValueError, match=r"has dtype torch.bfloat16, the model needs torch.float32"):
            TitansCache.load(path, model.config)


def test_the_header_tells_what_the_file_is(tmp_path):
    path = tmp_path / "memory"
    filled_cache(MODELS["mal"], TEXT).save(path)
    tensors, about = parts_of(path)
    assert json.loads(about["config"])["variant"] == "mal" and about["num_columns"] == "17"
    assert "[1].memory.memory.weights[0]" in tensors and "[0].window.keys" in tensors


@every_variant
def test_a_cache_that_nobody_holds_is_gone_at_once(variant):
    gc.disable()
    try:
        cache = filled_cache(MODELS[variant], TEXT)
        continued(MODELS[variant], cache)
        gone = weakref.ref(cache)
        del cache
        assert gone() is None
    finally:
        gc.enable()
