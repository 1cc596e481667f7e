"""A graft with an adaptation, and everything a stream does with one: rows, forks, files, folders."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from titans import Session, graft
from titans.data import byte_tokenizer
from titans.evaluate import bits_per_byte, score
from titans.hf import GraftedForCausalLM
from titans.hf.state_file import open_state_file, write_state_file
from titans.nn.adaptation import LinearHead
from titans.stream import describe_memory, feed_together, reader_of
from titans.stream import session as session_module

from .grafts import (
    FAMILIES,
    INSIDE,
    LEARNING,
    RECALLING,
    VOCAB,
    WINDOW,
    assert_near,
    logits_of,
    random_ids,
    read_on,
    small_base,
    small_graft,
)

MODELS = {
    "adaptation": small_graft(),
    "both": small_graft(association=RECALLING),
    "residual": small_graft(residual=INSIDE, adaptation=False),
    "softcap": small_graft("gemma2"),
    "window": small_graft(adaptation=False),
}
# Gemma 2's attention has a softmax in float32.
SAME = {"adaptation": 1e-9, "both": 1e-8, "residual": 1e-9, "softcap": 1e-4, "window": 1e-10}
LONG = 5 * WINDOW + 3


@pytest.mark.parametrize("name", ["adaptation", "softcap"])
@torch.no_grad()
def test_it_is_the_adaptation_of_the_windowed_base(name: str) -> None:
    model, ids = MODELS[name], random_ids(2, LONG)
    base = model.base
    bare = graft(base, window=WINDOW, sinks=2, adaptation=False)
    hidden = bare._windowed.read(ids, bare._windowed.initial_state(2))[0]
    linear = base.get_output_embeddings()
    head = LinearHead(linear.weight, linear.bias, getattr(base.config, "final_logit_softcapping", None))
    expected, _, surprise = model.adaptation(hidden, ids, head, surprise=True)
    found = model(ids, output_surprise=True)
    assert_near(found.logits, expected, SAME[name])
    assert_near(found.surprises[0][..., 0], surprise, SAME[name])
    assert_near(found.logits[:, :5], logits_of(bare, ids)[:, :5], SAME[name])
    assert (found.logits - logits_of(bare, ids))[:, 10:].abs().max() > 0.05, "it must have learned"
    losses = F.cross_entropy(found.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert_near(found.surprises[0][:, 1:, 0], losses, SAME[name])
    assert_near(model(ids, labels=ids).loss, losses.mean(), 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_any_split_is_one_call(name: str) -> None:
    model, ids = MODELS[name], random_ids(2, LONG)
    expected = logits_of(model, ids)
    for sizes in ([1] * LONG, [4, 0, 15, 1, LONG - 20]):
        assert_near(read_on(model, ids.split(sizes, 1))[0], expected, SAME[name])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padded_rows_are_read_as_alone(name: str) -> None:
    model, texts = MODELS[name], [random_ids(n, seed=n) for n in (31, 9, 24, 31)]
    masks, cache = [], model.empty_cache()
    generator, place = torch.Generator().manual_seed(0), [0] * 4
    for width, counts in ((14, (14, 3, 0, 9)), (12, (5, 6, 12, 10)), (14, (12, 0, 12, 12))):
        # Padding before, between and after.
        order = torch.rand(4, width, generator=generator).argsort(1)
        masks.append(order < torch.tensor(counts)[:, None])
        ids = torch.full((4, width), VOCAB - 1)
        for row, count in enumerate(counts):
            ids[row, masks[-1][row]] = texts[row][place[row] : place[row] + count]
        options = dict(attention_mask=masks[-1].long(), past_key_values=cache)
        for keep in (0, 2):
            given = {**options, "past_key_values": cache.clone() if keep else cache}
            if not keep:
                last = model(ids, **{**options, "past_key_values": cache.clone()}, logits_to_keep=2).logits
            found = model(ids, **given, logits_to_keep=keep).logits if not keep else last
            for row, count in enumerate(counts):
                real = masks[-1][row][-2:] if keep else masks[-1][row]
                whole = logits_of(model, texts[row][None])[0]
                mine = whole[place[row] : place[row] + count]
                assert_near(found[row, real], mine[count - int(real.sum()) :], SAME[name])
        place = [begin + count for begin, count in zip(place, counts, strict=True)]
    assert cache.state.window.position.tolist() == place == [31, 9, 24, 31]
    # Rows that are taken out hold what they would hold alone, however few of the slots that is.
    alone = cache.clone()
    alone.batch_select_indices(torch.tensor([2]))
    assert alone.nbytes() == read_on(model, [texts[2][None]])[1].nbytes()
    cache.batch_select_indices(torch.tensor([1, 2]))
    for rows, some in (([2], alone), ([1, 2], cache)):
        more = random_ids(len(rows), 10, seed=7)
        found = read_on(model, [more], some)[0]
        for row, new, logits in zip(rows, more, found, strict=True):
            whole = logits_of(model, torch.cat([texts[row], new])[None])
            assert_near(logits, whole[0, -10:], SAME[name])


@pytest.mark.parametrize("name", ["both", "residual", "window"])
def test_generate_is_the_loop_without_a_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titans.hf.generation.PREFILL_LENGTH", 5)
    # From beyond the window, and from far within it to beyond.
    model, count, rows = MODELS[name], WINDOW + 4, [random_ids(n, seed=n) for n in (14, 3, 8)]
    alone = []
    for row in rows:
        for _ in range(count):
            row = torch.cat([row, logits_of(model, row[None])[0, -1:].argmax(-1)])
        alone.append(row[-count:])
    assert len({*torch.stack(alone).flatten().tolist()}) > 5, "the texts must not be all alike"
    ids = torch.stack([torch.cat([row.new_zeros(14 - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(14) >= 14 - len(row) for row in rows]).long()
    options = dict(max_new_tokens=count, attention_mask=mask, pad_token_id=0)
    assert torch.equal(model.generate(ids, do_sample=False, **options)[:, 14:], torch.stack(alone))
    # A row that ends is padded, which is not read, and the others go on.
    end, cache = int(alone[0][3]), model.empty_cache()
    ended = dict(do_sample=False, eos_token_id=end, past_key_values=cache, return_dict_in_generate=True)
    found = model.generate(ids, **options, **ended).sequences[:, 14:]
    lengths = [[*row.tolist(), end].index(end) + 1 for row in alone]
    read = [len(row) + min(n, found.shape[1] - 1) for row, n in zip(rows, lengths, strict=True)]
    assert cache.state.window.position.tolist() == read and min(lengths) < max(lengths)
    for row, expected, length in zip(found, alone, lengths, strict=True):
        assert torch.equal(row[:length], expected[: min(length, len(row))])
    # In the order of padding at the right, too; sampled and with beams, with the cache and without.
    right = torch.stack([torch.cat([row, row.new_zeros(14 - len(row))]) for row in rows])
    options |= dict(attention_mask=mask.flip(1), max_new_tokens=8)
    for how in (dict(do_sample=True, temperature=0.5), dict(num_beams=3, do_sample=False)):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(model.generate(right, use_cache=use_cache, **how, **options))
        assert torch.equal(*found)


def test_a_window_alone_reads_and_generates_from_embeddings() -> None:
    model, ids = MODELS["window"], random_ids(2, 20)
    embedded = model.get_input_embeddings()(ids).detach()
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    options = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(
        model.generate(inputs_embeds=embedded, **options), model.generate(ids, **options)[:, 20:]
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_session_forks_generates_and_is_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PIECE_LENGTH", 16)
    model, ids, path = MODELS[name], random_ids(LONG), tmp_path / "text.memory"

    def next_logits(session: Session) -> Tensor:
        return session.reader.read(torch.tensor([session._now.recent[-1:]]), session.cache).logits[0, -1]

    session = Session(model)
    session.feed(ids[:29])
    fork = session.fork()
    fork.feed(ids[:9])
    fed = session.feed(ids[29:], collect_surprise=True)
    assert_near(next_logits(session), logits_of(model, ids[None])[0, -1], SAME[name])
    other = torch.cat([ids[:29], ids[:9]])
    assert_near(next_logits(fork), logits_of(model, other[None])[0, -1], SAME[name])
    if name == "window":
        assert fed.mean_surprise is None and session.stats().mean_surprise is None
    elif name == "residual":
        own = model(ids[None, :-1], output_surprise=True).surprises[0]
        assert_near(fed.surprises[:, 0].double(), own[0, 28:].mean(-1).double(), 1e-5)
    else:
        # Of the adaptation, before the association's part is mixed in.
        losses = score(MODELS["adaptation"] if name == "both" else model, ids)
        assert fed.surprises is not None
        torch.testing.assert_close(fed.surprises[1:, 0], losses[28:-1].float(), rtol=0, atol=1e-3)
    session.save(path)
    loaded = Session.load(path, model)
    assert torch.equal(next_logits(loaded), next_logits(session)) and loaded.num_tokens == LONG
    stats = session.stats()
    assert describe_memory(path).stats.tokens == LONG and stats.state_bytes == session.cache.nbytes()
    assert describe_memory(path).config["window"] == WINDOW
    state = session.cache.state
    inside = [] if state.residual is None else state.residual
    learned = [layer.memory.weights[0].flatten() for layer in inside]
    learned += [] if state.association is None else [state.association.weight.flatten()]
    if state.adaptation is not None:
        learned.append(torch.cat([state.adaptation.weight.flatten(), state.adaptation.bias[0]]))
    norms = [float(weights.norm()) for weights in learned]
    assert [layer.weight_norm for layer in stats.layers] == pytest.approx(norms) and 0.0 not in norms
    options = dict(max_new_tokens=5, do_sample=False)
    new = session.generate(**options)
    assert list(loaded.generate(stream=True, **options)) == new[0].tolist()
    assert_near(next_logits(session), next_logits(loaded), 0)
    assert fork.generate(max_new_tokens=4, num_beams=3, do_sample=False).shape == (1, 4)
    feed_together([session, fork], [ids[:3], ids[:20]])
    expected = torch.cat([ids, new[0], ids[:3]])
    assert_near(next_logits(session), logits_of(model, expected[None])[0, -1], SAME[name])


def test_files_of_other_models_and_damaged_ones(tmp_path: Path) -> None:
    model, path = MODELS["adaptation"], tmp_path / "text.memory"
    session = Session(model)
    session.feed(random_ids(30))
    session.save(path)
    others: dict[str, Any] = {
        "window=12, the model has 8": dict(window=8),
        "sinks=2, the model has 1": dict(sinks=1),
        "adaptation=True, the model has False": dict(adaptation=False),
        "chunk_size=5, the model has 4": dict(adaptation={"chunk_size": 4}),
        "does not hold exactly the tensors": dict(adaptation={**LEARNING, "momentum": 0.0}),
    }
    for message, options in others.items():
        with pytest.raises(ValueError, match=message):
            Session.load(path, small_graft(**options))
    with pytest.raises(ValueError, match="another checkpoint"):
        Session.load(path, graft(small_base(seed=1), window=12, sinks=2, adaptation=LEARNING))
    single = graft(small_base().float(), window=12, sinks=2, adaptation=LEARNING)
    assert Session.load(path, single).cache.state.window.keys[0].dtype == torch.float32
    with open_state_file(path) as file:
        tensors, about = file.tensors(), dict(file.about)
    keys, place = "[0].window.keys[1]", "[0].window.position"
    for name, value, message in (
        (keys, tensors[keys][:, :, :-1], "keys.*shape"),
        (keys, tensors[keys] * torch.nan, "NaN"),
        (keys, tensors[keys].long(), "dtype"),
        (place, tensors[place] + 100, "contradict its length"),
        (place, tensors[place] - 1, "contradict"),
        (place, tensors[place].double(), "damaged header"),
        ("[0].adaptation.position", tensors[place] + 1, "contradict each other"),
        ("[0].adaptation.weight", tensors["[0].adaptation.weight"][:, 1:], "weight.*shape"),
        ("[0].adaptation.awaits", torch.tensor([2]), "awaits holds values that no text gives"),
        ("[0].adaptation.log_probs", tensors["[0].adaptation.log_probs"] + 50, "log_probs holds values that"),
        ("[0].adaptation.trace", -1 - tensors["[0].adaptation.trace"], "trace holds values that"),
    ):
        write_state_file(path, {**tensors, name: value}, about)
        with pytest.raises(ValueError, match=message):
            Session.load(path, model)
    half = graft(small_base().half(), window=12, sinks=2, adaptation=LEARNING)
    write_state_file(path, {**tensors, keys: 1e6 * torch.ones_like(tensors[keys])}, about)
    with pytest.raises(ValueError, match=r"too large for torch\.float16: load the model in torch\.float64"):
        Session.load(path, half)


def no_space(tensors: Any, path: Path, metadata: Any) -> None:
    path.write_bytes(b"half")
    raise SafetensorError("No space left on device")


def no_words(config: Any, folder: str) -> None:
    Path(folder, "config.json").write_text("{")
    # As the package tokenizers does.
    raise Exception("No space left on device")


def test_a_folder_holds_the_memory_and_finds_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, ids = small_base(), random_ids(1, 40)
    base.save_pretrained(tmp_path / "base")
    with monkeypatch.context() as there:
        there.chdir(tmp_path)
        base = AutoModelForCausalLM.from_pretrained("base")
        model = graft(base, window=WINDOW, sinks=2, adaptation={**LEARNING, "learned_start": True})
    model.whiten(random_ids(100, seed=3))
    with torch.no_grad():
        model.adaptation.start_weight.normal_(std=0.1)
    model.save_pretrained(tmp_path / "graft")
    expected, parameters = logits_of(model, ids), sum(p.numel() for p in base.parameters())
    assert (tmp_path / "graft" / "model.safetensors").stat().st_size < parameters
    for given in ({}, {"base": base}, {"base": tmp_path / "base"}):
        for kind in (GraftedForCausalLM, AutoModelForCausalLM):
            loaded = kind.from_pretrained(tmp_path / "graft", **given)
            assert type(loaded) is GraftedForCausalLM and not loaded.training
            assert torch.equal(logits_of(loaded, ids), expected)
    assert loaded.base.dtype == torch.float64
    half = GraftedForCausalLM.from_pretrained(tmp_path / "graft", dtype=torch.float16)
    assert half.dtype == torch.float16 and half.adaptation.mean.dtype == torch.float32
    before = (tmp_path / "graft" / "model.safetensors").read_bytes()
    with monkeypatch.context() as full, pytest.raises(OSError, match=r"could not be written .*make room"):
        full.setattr("titans.hf.weights_file.save_file", no_space)
        model.save_pretrained(tmp_path / "graft")
    with (
        monkeypatch.context() as full,
        pytest.raises(OSError, match=r"graft could not be written .*: make room"),
    ):
        full.setattr(type(model.config), "save_pretrained", no_words)
        model.save_pretrained(tmp_path / "graft")
    assert (tmp_path / "graft" / "model.safetensors").read_bytes() == before
    assert not [*(tmp_path / "graft").glob(".*")]
    wrong = small_base(seed=1)
    for given, message in (
        ({"base": wrong}, "other weights than the graft was made on"),
        ({"base": small_base("qwen2")}, "base has class='Qwen2ForCausalLM'"),
        ({"base": tmp_path / "nothing"}, "cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            GraftedForCausalLM.from_pretrained(tmp_path / "graft", **given)
    config = json.loads((tmp_path / "graft" / "config.json").read_text())
    config["origin"]["name"] = ""
    (tmp_path / "graft" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="without a name"):
        GraftedForCausalLM.from_pretrained(tmp_path / "graft")
    weights = load_file(tmp_path / "graft" / "model.safetensors")
    (tmp_path / "new").touch()
    assert (tmp_path / "graft" / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
    (tmp_path / "graft" / "model.safetensors").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(ValueError, match="its checksum is that of other weights"):
        GraftedForCausalLM.from_pretrained(tmp_path / "graft", base=base)
    weights["adaptation.step_logit"] = torch.tensor(1)
    save_file(weights, tmp_path / "graft" / "model.safetensors")
    with pytest.raises(ValueError, match=r"no finite numbers \(adaptation.step_logit\)"):
        GraftedForCausalLM.from_pretrained(tmp_path / "graft", base=base)
    (tmp_path / "graft" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        GraftedForCausalLM.from_pretrained(tmp_path / "graft", base=base)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        GraftedForCausalLM.from_pretrained(tmp_path / "nothing")


def test_a_tokenizer_with_other_tokens(tmp_path: Path) -> None:
    tokenizer, base = (
        byte_tokenizer(),
        small_base(LlamaConfig.from_dict({**FAMILIES["llama"].to_dict(), "vocab_size": 256})),
    )
    other = byte_tokenizer()
    other.backend_tokenizer.model = BPE({**byte_tokenizer().get_vocab(), "a": 98, "b": 97}, [])
    graft(base, tokenizer, window=WINDOW).save_pretrained(tmp_path / "graft")
    loaded = GraftedForCausalLM.from_pretrained(tmp_path / "graft", base=base)
    assert Session(loaded, tokenizer).feed("some text").tokens == 9
    with pytest.raises(ValueError, match="another vocabulary than the one that this graft was made with"):
        Session(loaded, other)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    graft(base, tokenizer, window=WINDOW)
    with pytest.raises(
        ValueError, match=r"tokenizer has 98 for 'a', the one in .* has 97: give the model's own"
    ):
        graft(base, other, window=WINDOW)


def test_a_base_that_answers_nan_leaves_a_session_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "PIECE_LENGTH", 8)
    for name in ("window", "adaptation"):
        model = small_graft(adaptation=LEARNING if name == "adaptation" else False)
        session = Session(model)
        session.feed(random_ids(10))
        before, embeddings = session.stats(), model.get_input_embeddings().weight
        with torch.no_grad():
            embeddings[7] = torch.nan
        ids = torch.cat([random_ids(30) % 7, torch.tensor([7, 3, 3])])
        with pytest.raises(FloatingPointError, match="answers NaN to the text after token 41"):
            session.feed(ids)
        assert session.stats() == before
        assert session.feed(random_ids(9) % 7).tokens == 9


def test_a_graft_that_exists_keeps_its_settings() -> None:
    model = MODELS["adaptation"]
    for name, value in (("window", 6), ("sinks", 1), ("adaptation", None)):
        with pytest.raises(
            ValueError, match=f"{name}=.*: a graft that exists keeps its {name}; make another"
        ):
            setattr(model.config, name, value)
    changed = copy.deepcopy(model.config)
    changed.window = 6
    assert (
        GraftedForCausalLM(changed, model.base)._windowed.window.size == 6 and model.config.window == WINDOW
    )
    assert "_of_graft" not in model.config.to_dict()


def test_evaluation_and_a_frozen_memory() -> None:
    model, text = MODELS["adaptation"], random_ids(10).repeat(8)
    texts = [(text, len(text)), (text[3:40], 37)]
    normal = bits_per_byte(model, texts, batch_size=2, piece_length=9)
    losses = torch.cat([score(model, ids) for ids, _ in texts])
    assert normal.nats_per_token == pytest.approx(float(losses.mean()), abs=1e-6)
    frozen = bits_per_byte(model, texts, batch_size=2, freeze_memory=True)
    window = bits_per_byte(MODELS["window"], texts)
    assert frozen.nats_per_token == pytest.approx(window.nats_per_token, abs=1e-8)
    assert normal.nats_per_token < 0.9 * frozen.nats_per_token, "a repeated text must become easier"
    with pytest.raises(ValueError, match="no memory that could be frozen"):
        bits_per_byte(MODELS["window"], texts, freeze_memory=True)
    reader = reader_of(model)
    assert reader_of(reader) is reader


def test_the_base_is_frozen_and_the_adaptation_learns_through_its_updates() -> None:
    model = small_graft(adaptation={**LEARNING, "learned_start": True}).train()
    assert model.training and not model.base.training
    model(random_ids(2, 30), labels=random_ids(2, 30)).loss.backward()
    for name, parameter in model.named_parameters():
        of_base = name.startswith("base.")
        assert parameter.requires_grad != of_base and (parameter.grad is None) == of_base, name
        assert of_base or parameter.grad.abs().max() > 0, name
