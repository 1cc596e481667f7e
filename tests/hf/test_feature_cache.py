"""Cached features: what they hold, and that an interrupted run continues to the same files."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hf.grafts import VOCAB, assert_near, random_ids, small_base

from titans.hf.graft import feature_cache
from titans.hf.graft.base import WindowedBase
from titans.hf.graft.feature_cache import FeatureCache, Unit, bytes_per_token, write_features
from titans.hf.graft.window import Window

WINDOW = Window(12, 2)


def base_of(seed=0, family="llama", window=WINDOW):
    return WindowedBase(small_base(family, seed).float(), window)


def units(count=3):
    found = []
    for seed in range(count):
        ids = random_ids(2, 9, seed=seed)
        asked = random_ids(2, 7, seed=seed + 50)
        parts = {"statements": (ids, (ids % 3 == 0).long()), "questions": (asked, torch.zeros_like(asked))}
        found.append(Unit("facts", parts, about=f"unit {seed}"))
    long = random_ids(1, 31, seed=9)
    return [*found, Unit("text", {"text": (long, torch.zeros_like(long))})]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_features_are_those_of_the_base_in_its_window(tmp_path, family):
    base = base_of(family=family)
    cache = write_features(base, units(), tmp_path, [0, 1])
    assert cache.groups() == ["facts", "text"] and len(cache.files("facts")) == 3
    (path,) = cache.files("text")
    found = cache.load(path)["text"]
    ids = found.ids
    assert torch.equal(ids, units()[-1].parts["text"][0])
    with torch.no_grad():
        hidden, _ = base.read(ids, base.initial_state(1))
        assert_near(found.hidden.float(), hidden, 0.01)
        # While a text fits the window these are the model's own states, after each layer.
        own = base.model(ids[:, :12], output_hidden_states=True).hidden_states
        assert_near(found.states[0][:, :12].float(), own[1], 0.01)
        # transformers gives the last state behind the final norm.
        norm = getattr(base.decoder, "norm", None) or base.decoder.final_layer_norm
        assert_near(norm(found.states[1][:, :12].float()), own[2], 0.05)
        # A probability that is computed from rounded states sums to 1.
        logits = base.head.logits(found.hidden.float())
        assert_near((logits - found.normaliser[..., None]).exp().sum(-1), torch.ones(1, 31), 1e-4)


def test_parts_flags_and_what_a_unit_is_about_are_kept(tmp_path):
    cache = write_features(base_of(), units(), tmp_path, [1])
    path = cache.files("facts")[1]
    parts = cache.load(path)
    for name, (ids, flags) in units()[1].parts.items():
        assert torch.equal(parts[name].ids, ids) and torch.equal(parts[name].flags.long(), flags)
        assert parts[name].states[0].shape == (*ids.shape, 16) and len(parts[name].states) == 1
    assert cache.about(path) == "unit 1"
    both = write_features(base_of(), units(), tmp_path / "both", [0, 1])
    one = FeatureCache(both.folder, [1]).load(both.files("facts")[1])
    assert len(one["questions"].states) == 1
    assert torch.equal(one["questions"].states[0], parts["questions"].states[0])
    with pytest.raises(ValueError, match=r"has no layer 0: it has \[1\]; cache it, too"):
        FeatureCache(tmp_path, [0])
    stored = sum(tensor.nbytes for tensor in load_file(path).values())
    assert stored == units()[1].tokens * bytes_per_token(16, [1])


def test_an_interrupted_run_continues_and_reads_nothing_twice(tmp_path, monkeypatch):
    whole = write_features(base_of(), units(), tmp_path / "whole", [1])
    seen = []

    def stop(progress):
        seen.append(progress)
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(base_of(), units(), tmp_path / "parts", [1], stop)
    # A growing folder can be read.
    assert len(FeatureCache(tmp_path / "parts").files("facts")) == 2
    read, original = [], feature_cache._read
    monkeypatch.setattr(feature_cache, "_read", lambda *a: read.append(a) or original(*a))
    cache = write_features(base_of(), units(), tmp_path / "parts", [1], seen.append)
    assert len(read) == 2
    assert [path.name for path in cache.files("facts")] == [path.name for path in whole.files("facts")]
    for group in whole.groups():
        for mine, theirs in zip(cache.files(group), whole.files(group), strict=True):
            assert mine.read_bytes() == theirs.read_bytes()
    total = sum(unit.tokens for unit in units())
    assert seen[-1].tokens == seen[-1].total == total and seen[-1].seconds_left == 0
    assert not [path for path in (tmp_path / "parts").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base": base_of(seed=1)}, "base="),
        ({"base": base_of(window=Window(8, 2))}, "window=12, now it is 8"),
        ({"layers": [0]}, r"layers=\[1\], now it is \[0\]"),
    ],
)
def test_a_folder_of_other_features_is_refused(tmp_path, change, reason):
    given = {"base": base_of(), "layers": [1]}
    write_features(given["base"], units(1), tmp_path, given["layers"])
    given |= change
    with pytest.raises(ValueError, match=reason):
        write_features(given["base"], units(1), tmp_path, given["layers"])


def test_a_file_of_another_base_is_refused(tmp_path):
    bases = base_of(), base_of(seed=1)
    mine, other = (
        write_features(base, units(1), tmp_path / str(index), [1]) for index, base in enumerate(bases)
    )
    (path,) = mine.files("text")
    older = load_file(path)
    shutil.copy(other.files("text")[0], path)
    reason = f"{path.name} holds features with base='{other.key['base']}', its folder those with base='"
    reason += f"{mine.key['base']}': remove the file"
    for read in (
        lambda: mine.load(path),
        lambda: mine.check_base(bases[0]),
        lambda: write_features(bases[0], units(2), mine.folder, [1]),
    ):
        with pytest.raises(ValueError, match=reason):
            read()
    # Files had no key at first.
    save_file(older, path, {"about": "a play"})
    mine.check_base(bases[0])
    assert mine.about(path) == "a play" and mine.load(path)


def test_bad_requests_and_files_are_refused(tmp_path):
    for layers in ([2], [-1], [1, 0], [1, 1]):
        with pytest.raises(ValueError, match=r"layers=.*: give rising indices from 0 to 1"):
            write_features(base_of(), units(1), tmp_path, layers)
    with pytest.raises(ValueError, match=r"has no index\.json"):
        FeatureCache(tmp_path)
    cache = write_features(base_of(), units(1), tmp_path, [1])
    path = cache.files("text")[0]
    path.write_bytes(path.read_bytes()[:100])
    for read in (cache.load, cache.shape, cache.about):
        with pytest.raises(ValueError, match=r"cannot be read .*: remove it, and cache again"):
            read(path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        write_features(base_of(), units(1), tmp_path, [1])


def test_no_nan_gets_in_or_out(tmp_path):
    base, cache = base_of(), write_features(base_of(), units(1), tmp_path, [1])
    path = cache.files("text")[0]
    tensors = load_file(path)
    tensors["text.state.1"][0, 3, 5] = torch.nan
    save_file(tensors, path)
    assert FeatureCache(tmp_path, ()).load(path), "what is not read does not matter"
    with pytest.raises(ValueError, match=r"holds NaN or infinite values \(text\.state\.1\): remove it"):
        cache.load(path)
    with torch.no_grad():
        base.model.get_input_embeddings().weight[int(random_ids(2, 9)[1, 4])] = torch.nan
    with pytest.raises(ValueError, match=r"the base computes NaN .* of facts, which begins with the tokens"):
        write_features(base, units(1), tmp_path / "other", [1])
    assert not [*(tmp_path / "other").glob("*.safetensors")]


def test_states_that_float16_cannot_hold_are_refused(tmp_path):
    base = base_of()
    with torch.no_grad():
        base.decoder.layers[0].mlp.down_proj.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"state\.0 of the base exceeds float16's range"):
        write_features(base, units(1), tmp_path, [0])


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    write_features(base_of(), units(1), tmp_path, [1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "save_file", full)
    with pytest.raises(
        OSError, match=r"No space left.*MB are needed, .* MB are free; make room and start again"
    ):
        write_features(base_of(), units(3), tmp_path, [1])
    cache = FeatureCache(tmp_path)
    assert len(cache.files("facts")) == 1 and cache.load(cache.files("text")[0])
    assert int(cache.load(cache.files("facts")[0])["questions"].ids.max()) < VOCAB
