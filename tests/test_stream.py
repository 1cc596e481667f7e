"""A session: cut as you like, saved and forked exactly, at constant memory."""

from __future__ import annotations

import gc
import itertools
import os
import runpy
import signal
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils import _pytree as pytree
from transformers import PreTrainedTokenizerBase

from titans.data import byte_tokenizer
from titans.hf import TitansCache, TitansConfig, TitansForCausalLM
from titans.hf.state_file import StateFile, open_state_file, write_state_file
from titans.nn import NeuralMemory
from titans.nn.blocks import has_memory
from titans.stream import Session, describe_memory, feed_together, fingerprint
from titans.stream import session as session_module
from titans.stream import together as together_module

from .variants import VARIANTS

MEMORIES = sorted(filter(has_memory, VARIANTS))


def small_model(variant: str = "mac", seed: int = 0, **overrides: object) -> TitansForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(
        variant=variant, vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, head_dim=8, memory_depth=2, memory_expansion=2, chunk_size=4, segment_length=8,
        sliding_window=8, num_persistent_tokens=2, initializer_range=0.3,
    )  # fmt: skip
    return TitansForCausalLM(TitansConfig(**{**sizes, **overrides})).double()


def some_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def change_header(path: Path, **changes: str) -> None:
    """Write the file anew, with a checksum that is right."""
    with open_state_file(path) as file:
        tensors, about = file.tensors(), file.about
    write_state_file(path, tensors, {**about, **changes})


def next_logits(session: Session) -> Tensor:
    last = torch.tensor([session._now.recent[-1:]])
    with torch.no_grad():
        return session.model(last, past_key_values=session.cache).logits[0, -1]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "PIECE_LENGTH", 16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_how_the_text_is_cut_does_not_matter(variant: str, short_pieces: None) -> None:
    model, ids = small_model(variant), some_ids(60)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(ids.astype(np.int64))[None], output_surprise=True)
    for sizes in ([60], [1, 2, 33, 0, 24], [1] * 60):
        session, surprises = Session(model), []
        for piece in np.split(ids, np.cumsum(sizes)[:-1]):
            result = session.feed(piece, collect_surprise=True)
            assert result.tokens == len(piece)
            surprises += [] if result.surprises is None else [result.surprises]
        assert session.num_tokens == 60
        torch.testing.assert_close(next_logits(session), expected.logits[0, -1], rtol=0, atol=1e-8)
        if expected.surprises:
            each = torch.stack([s[0, :-1].mean(-1) for s in expected.surprises], -1).float()
            torch.testing.assert_close(torch.cat(surprises), each)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=6)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 19), st.sampled_from(["on", "saved", "forked"])), min_size=2, max_size=6
    ),
    seed=st.integers(0, 99),
)
def test_any_splits_saves_and_forks_give_what_one_call_gives(
    variant: str, parts: list[tuple[int, str]], seed: int, tmp_path: Path
) -> None:
    model, ids = small_model(variant), some_ids(1 + sum(size for size, _ in parts), seed)
    session = Session(model)
    session.feed(ids[:1])
    for size, how in parts:
        if how == "saved":
            session.save(tmp_path / "memory")
            session = Session.load(tmp_path / "memory", model)
        elif how == "forked":
            other, session = session, session.fork()
            other.feed(some_ids(5, seed + 1))
        session.feed(ids[session.num_tokens :][:size])
    cache = TitansCache(model.config)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(ids.astype(np.int64))[None], past_key_values=cache)
    torch.testing.assert_close(next_logits(session), expected.logits[0, -1], rtol=0, atol=1e-8)
    # The session keeps its last token back.
    session.feed([0])
    for mine, theirs in zip(
        pytree.tree_leaves(session.cache.states), pytree.tree_leaves(cache.states), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_forked_and_untouched_sessions_go_on_alike(variant: str, tmp_path: Path) -> None:
    model = small_model(variant).train()
    session = Session(model)
    session.feed(some_ids(21, seed=5))
    session.save(tmp_path / "memory")
    fork, loaded = session.fork(), Session.load(tmp_path / "memory", model)
    fork.feed(some_ids(30, seed=1))

    expected = session.generate(max_new_tokens=24, do_sample=False)
    assert len(expected[0].unique()) > 3
    assert torch.equal(loaded.generate(max_new_tokens=24, do_sample=False), expected)
    assert torch.equal(next_logits(loaded), next_logits(session))
    assert (session.num_tokens, fork.num_tokens, loaded.num_tokens) == (45, 51, 45)

    whole = Session(model)
    whole.feed(np.concatenate([some_ids(21, seed=5), some_ids(30, seed=1)]))
    torch.testing.assert_close(next_logits(fork), next_logits(whole), rtol=0, atol=1e-8)
    assert model.training, "a session leaves the model's mode as it was"


def test_what_is_generated_is_read_whatever_the_method(short_pieces: None) -> None:
    model = small_model()
    for options in (dict(do_sample=False), dict(do_sample=False, num_beams=3)):
        session, reader = Session(model), Session(model)
        session.feed(some_ids(20))
        new = session.generate(max_new_tokens=9, **options)
        reader.feed(some_ids(20))
        reader.feed(new)
        assert session.num_tokens == reader.num_tokens == 29
        torch.testing.assert_close(next_logits(session), next_logits(reader), rtol=0, atol=1e-8)


def test_one_token_is_enough_to_save_and_none_is_not(tmp_path: Path) -> None:
    model = small_model()
    session = Session(model)
    with pytest.raises(ValueError, match=r"feed\(\)"):
        session.save(tmp_path / "memory")
    with pytest.raises(ValueError, match=r"feed\(\)"):
        session.generate(max_new_tokens=1)
    session.feed([7])
    session.save(tmp_path / "memory")
    loaded = Session.load(tmp_path / "memory", model)
    torch.testing.assert_close(next_logits(loaded), next_logits(session), rtol=0, atol=0)
    loaded.reset()
    assert loaded.num_tokens == 0


@pytest.mark.parametrize("variant", MEMORIES)
def test_memory_stays_constant(variant: str) -> None:
    sizes = dict(chunk_size=16, segment_length=64, sliding_window=64, num_hidden_layers=1)
    model = small_model(variant, **sizes).float()
    session, seen = Session(model), []
    # As many tokens into a segment both times: what two parts of a state share depends on that.
    for between in (0, 6064):
        session.feed(some_ids(between))
        session.feed(some_ids(2000))
        seen.append(session.stats())
    assert seen[0].tokens == 2000 and seen[1].tokens == 10064
    assert seen[0].state_bytes == seen[1].state_bytes
    assert all(0 < layer.change < 10 for layer in seen[1].layers)


def test_a_memory_that_begins_at_zero_has_no_relative_change() -> None:
    model = small_model("lmm", memory_depth=1, num_persistent_tokens=0)
    for memory in model.modules():
        if isinstance(memory, NeuralMemory):
            nn.init.zeros_(memory.initial_weights[0])
    session = Session(model)
    session.feed(some_ids(20))
    assert {layer.change for layer in session.stats().layers} == {None}


def test_an_interrupted_feed_ends_after_a_whole_piece(short_pieces: None) -> None:
    model = small_model()

    def stop(taken: int) -> None:
        if taken > 30:
            raise KeyboardInterrupt

    session, expected = Session(model), Session(model)
    with pytest.raises(KeyboardInterrupt):
        session.feed(some_ids(100), progress=stop)
    assert 30 < session.num_tokens < 50
    expected.feed(some_ids(100)[: session.num_tokens])
    assert torch.equal(next_logits(session), next_logits(expected))


def test_text_comes_in_whole_characters(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(small_model(), tokenizer)
    target = "naïve 😀 “x”".encode() + b"\xff\xff" + "é\xff".encode()
    produced: list[int] = []

    def scripted(start: Tensor, past_key_values: TitansCache, max_new_tokens: int) -> Tensor:
        new = list(target[len(produced) : len(produced) + max_new_tokens])
        produced.extend(new)
        return torch.cat([start, torch.tensor([new])], 1)

    monkeypatch.setattr(session.model, "generate", scripted)
    session.feed("é".encode()[:1])  # half a character, whose second half is generated
    target = "é".encode()[1:] + target
    pieces = []
    while len(produced) < len(target):
        pieces.append(session.generate(max_new_tokens=1 + len(pieces) % 3))
    assert "".join(pieces) == ("é".encode()[:1] + target).decode(errors="replace")


def test_text_bytes_and_ids_are_the_same_to_a_byte_model(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Full fathom five thy father lies; ÿ"
    sessions = [Session(small_model(), tokenizer) for _ in range(4)]
    kinds = text, text.encode(), list(text.encode()), torch.tensor([list(text.encode())])
    for session, kind in zip(sessions, kinds, strict=True):
        session.feed(kind)
        assert torch.equal(next_logits(session), next_logits(sessions[0]))
    sessions[0].feed(b"\xff\x00")  # no text, but bytes all the same
    sessions[0].feed("")
    assert sessions[0].num_tokens == len(text.encode()) + 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("text", "no tokenizer"),
        ([1, 256], "256 is outside the model's vocabulary"),
        ([-1], "-1 is outside"),
        (torch.zeros(2, 3, dtype=torch.int64), r"shape \(2, 3\)"),
        (torch.zeros(3), "float32"),
    ],
)
def test_wrong_input_is_refused_and_changes_nothing(wrong: object, message: str) -> None:
    session = Session(small_model())
    with pytest.raises(ValueError, match=message):
        session.feed(wrong)
    assert session.num_tokens == 0


@pytest.mark.parametrize("name", ["past_key_values", "attention_mask", "num_return_sequences"])
def test_generate_refuses_what_the_session_sets(name: str) -> None:
    session = Session(small_model())
    session.feed([1])
    with pytest.raises(ValueError, match=name):
        session.generate(max_new_tokens=1, **{name: None})


def test_a_memory_belongs_to_its_weights(tmp_path: Path) -> None:
    path, model = tmp_path / "memory", small_model()
    session = Session(model)
    session.feed(some_ids(20))
    session.save(path)
    with pytest.raises(ValueError, match="another checkpoint"):
        Session.load(path, small_model(seed=1))
    assert Session.load(path, small_model(seed=1), strict=False).num_tokens == 20
    with pytest.raises(ValueError, match="segment_length"):
        Session.load(path, small_model(segment_length=4))
    # The same checkpoint in another precision is the same checkpoint.
    lower = Session.load(path, small_model().to(torch.bfloat16))
    assert lower.generate(max_new_tokens=3, do_sample=False).shape == (1, 3)
    assert lower.stats().state_bytes < 0.6 * session.stats().state_bytes


@pytest.mark.parametrize("recent", ["[256]", "[-1]", '["a"]', "{", "3"])
def test_a_damaged_header_is_refused(recent: str, tmp_path: Path) -> None:
    path, model = tmp_path / "memory", small_model()
    session = Session(model)
    session.feed([1, 2])
    session.save(path)
    change_header(path, recent_tokens=recent)
    with pytest.raises(ValueError, match="damaged header"):
        Session.load(path, model)


def test_a_memory_file_describes_itself(tmp_path: Path) -> None:
    session = Session(small_model("mag"))
    session.feed(some_ids(50))
    session.save(tmp_path / "memory")
    found, expected = describe_memory(tmp_path / "memory"), session.stats()
    assert found.config["variant"] == "mag" and found.stats.tokens == 50
    assert found.stats.state_bytes == expected.state_bytes
    assert [layer.weight_norm for layer in found.stats.layers] == [
        layer.weight_norm for layer in expected.layers
    ]
    assert found.fingerprint == fingerprint(session.model)

    change_header(tmp_path / "memory", config='{"variant": 3}')
    with pytest.raises(ValueError, match="damaged header"):
        describe_memory(tmp_path / "memory")


def test_no_altered_file_passes_for_a_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "fuzz_files.py"
    options = ["--count", "80", "--seed", "7", "--keep", str(tmp_path / "failures")]
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGALRM)
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGALRM, handler)
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    assert "80 files" in out and "with a right checksum | refused" in out


@pytest.mark.parametrize("kind", ["lines", "list of strings", "generator of bytes"])
def test_several_texts_are_read_one_after_the_other(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = "Full fathom five\nthy father lies\n\nof his bones"
    (tmp_path / "song").write_text(text)
    parts: object = text.splitlines(keepends=True)
    if kind == "generator of bytes":
        parts = (line.encode() for line in text.splitlines(keepends=True))
    session, whole = Session(small_model(), tokenizer), Session(small_model(), tokenizer)
    taken: list[int] = []
    with (tmp_path / "song").open() as file:
        result = session.feed(file if kind == "lines" else parts, progress=taken.append)
    expected = whole.feed(text)
    assert result.tokens == taken[-1] == len(text)
    assert result.mean_surprise == pytest.approx(expected.mean_surprise, rel=1e-9)
    torch.testing.assert_close(next_logits(session), next_logits(whole), rtol=0, atol=1e-8)


def test_a_stream_gives_what_generate_gives_and_stops_where_nobody_asks(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = small_model()
    for seed in range(2):
        sessions = [Session(model, tokenizer) for _ in range(3)]
        for session in sessions:
            session.feed(some_ids(30, seed).tobytes())
        options = dict(max_new_tokens=40, do_sample=True, suppress_tokens=list(range(128, 256)))
        torch.manual_seed(seed)
        expected = sessions[0].generate(**options)
        torch.manual_seed(seed)
        pieces = list(sessions[1].generate(stream=True, **options))
        assert "".join(pieces) == expected and len(pieces) > 10
        assert torch.equal(next_logits(sessions[0]), next_logits(sessions[1]))
        some = sessions[2].generate(stream=True, **options)
        next(some)
        some.close()
        assert 31 <= sessions[2].num_tokens <= 70
    ids = Session(model)
    ids.feed([1, 2, 3])
    assert all(isinstance(token, int) for token in ids.generate(stream=True, max_new_tokens=4))
    with pytest.raises(ValueError, match="attention_mask"):
        list(ids.generate(stream=True, attention_mask=None))
    with pytest.raises(ValueError, match="leave streamer and num_beams out"):
        list(ids.generate(stream=True, num_beams=2))


def test_the_mean_surprise_is_that_of_all_that_was_fed_also_from_a_file(tmp_path: Path) -> None:
    session, whole = Session(small_model()), Session(small_model())
    assert session.stats().mean_surprise is None and session.stats().tokens_per_second is None
    for size in (10, 1, 25):
        part = some_ids(36)[session.num_tokens : session.num_tokens + size]
        found = session.feed(part, collect_surprise=True)
        assert found.mean_surprise == pytest.approx(float(found.surprises.mean()), rel=1e-5)
    expected = whole.feed(some_ids(36)).mean_surprise
    assert session.stats().mean_surprise == pytest.approx(expected, rel=1e-9)
    assert session.stats().tokens_per_second > 0
    session.save(tmp_path / "memory")
    loaded = Session.load(tmp_path / "memory", session.model)
    assert loaded.stats().mean_surprise == session.stats().mean_surprise
    assert describe_memory(tmp_path / "memory").stats.mean_surprise == session.stats().mean_surprise
    assert loaded.stats().tokens_per_second is None
    change_header(tmp_path / "memory", surprise="[1e999, 3]")
    with pytest.raises(ValueError, match="damaged header: its surprise"):
        Session.load(tmp_path / "memory", session.model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sessions_fed_together_equal_each_alone(variant: str, short_pieces: None, monkeypatch) -> None:
    """Whatever they have read before, and of whatever lengths their texts are."""
    monkeypatch.setattr(together_module, "PIECE_LENGTH", 16)
    model = small_model(variant)
    before, after = (0, 1, 23, 40, 8), (50, 3, 0, 1, 17)
    sessions = [Session(model) for _ in before]
    for row, session in enumerate(sessions):
        session.feed(some_ids(before[row], seed=row))
    alone = [session.fork() for session in sessions]
    texts = [some_ids(count, seed=10 + row) for row, count in enumerate(after)]
    feed_together(sessions, texts)
    for row, (session, other) in enumerate(zip(sessions, alone, strict=True)):
        other.feed(texts[row])
        assert session.num_tokens == other.num_tokens == before[row] + after[row]
        if session.cache.states is not None:
            torch.testing.assert_close(next_logits(session), next_logits(other), rtol=0, atol=1e-8)
        mine, its = session.stats(), other.stats()
        assert mine.mean_surprise == pytest.approx(its.mean_surprise)
        # MAC's snapshot may be told apart from weights that it equals.
        assert mine.state_bytes == its.state_bytes or variant == "mac"
        # And it goes on alone.
        for each in (session, other):
            each.feed(some_ids(9, seed=3))
        torch.testing.assert_close(next_logits(session), next_logits(other), rtol=0, atol=1e-8)


def test_sixty_sessions_share_a_model_and_hold_what_they_say() -> None:
    model = small_model("lmm")
    sessions = [Session(model) for _ in range(60)]
    feed_together(sessions, [some_ids(30 + row % 7, seed=row) for row in range(60)])
    leaves = {id(leaf): leaf for each in sessions for leaf in pytree.tree_leaves(each.cache.states)}
    said = sum(session.stats().state_bytes for session in sessions)
    assert said == sum(leaf.untyped_storage().nbytes() for leaf in leaves.values())
    assert (
        len({tuple(session.generate(max_new_tokens=4, do_sample=False)[0].tolist()) for session in sessions})
        > 9
    )


def test_what_cannot_be_fed_together_is_refused() -> None:
    model = small_model("lmm")
    one, other = Session(model), Session(model)
    for sessions, texts, message in (
        ([one, other], [[1]], "texts has 1 entries"),
        ([one, one], [[1], [2]], "one session twice"),
        ([one, Session(small_model("lmm"))], [[1], [2]], "several models"),
        ([one, other], [[1], [300]], "300"),
        ([one, other], b"no", "texts is one bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            feed_together(sessions, texts)
    assert one.num_tokens == other.num_tokens == 0


def test_a_session_is_of_one_file_even_if_another_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = small_model(), tmp_path / "memory"
    session = Session(model)
    session.feed(some_ids(20))
    session.save(path)
    session.feed(some_ids(13, seed=1))
    session.save(tmp_path / "later")
    read = StateFile.tensors

    def replaced(file: StateFile) -> dict[str, Tensor]:
        os.replace(tmp_path / "later", path)
        return read(file)

    monkeypatch.setattr(StateFile, "tensors", replaced)
    loaded, expected = Session.load(path, model), Session(model)
    expected.feed(some_ids(20))
    assert loaded.num_tokens == 20 and loaded._now.recent == expected._now.recent
    torch.testing.assert_close(next_logits(loaded), next_logits(expected), rtol=0, atol=1e-8)


def test_what_is_fed_while_a_stream_is_open_is_refused_and_not_lost() -> None:
    session = Session(small_model("lmm"))
    session.feed(some_ids(9))
    stream = session.generate(stream=True, max_new_tokens=30, do_sample=False)
    next(stream)
    for change in (
        lambda: session.feed([1, 2, 3]),
        lambda: session.generate(max_new_tokens=1),
        lambda: next(session.generate(stream=True, max_new_tokens=1)),
        lambda: feed_together([session], [[1]]),
        session.reset,
    ):
        with pytest.raises(RuntimeError, match="stream of generated text is open"):
            change()
    stream.close()
    before = session.num_tokens
    assert before > 9 and session.feed([1, 2, 3]).tokens == 3 and session.num_tokens == before + 3
    with pytest.raises(RuntimeError, match="stream of generated text is open"):
        session.feed(bytes([token]) for token in session.generate(stream=True, max_new_tokens=5))
    assert session.feed([4]).tokens == 1


def test_threads_share_sessions_and_leave_the_model_in_its_mode(short_pieces: None) -> None:
    model = small_model("lmm").train()
    frozen = model.model.layers[1].eval()
    shared, own = Session(model), [Session(model) for _ in range(3)]
    texts = [some_ids(200, seed) for seed in range(3)]
    together = threading.Barrier(6)

    def feed(session: Session, text: np.ndarray) -> None:
        together.wait()
        session.feed(text)

    threads = [
        threading.Thread(target=feed, args=pair)
        for pair in [*zip(own, texts, strict=True), *((shared, text) for text in texts)]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.training and model.model.layers[0].mixer.training and not frozen.training
    assert not any(module.training for module in frozen.modules())
    # Each text was read as a whole, in some order.
    orders = []
    for order in itertools.permutations(texts):
        whole = Session(model)
        whole.feed(np.concatenate(order))
        orders.append(next_logits(whole))
    assert shared.num_tokens == 600
    assert min(float((next_logits(shared) - logits).abs().max()) for logits in orders) < 1e-8
    for session, text in zip(own, texts, strict=True):
        alone = Session(model)
        alone.feed(text)
        assert torch.equal(next_logits(session), next_logits(alone))


def test_a_memory_knows_its_weights_in_float16_and_old_files_in_bfloat16(tmp_path: Path) -> None:
    path, model = tmp_path / "memory", small_model().float()
    session = Session(model)
    session.feed(some_ids(20))
    session.save(path)
    half = small_model().half()
    assert fingerprint(half) != fingerprint(model), "an easy case"
    assert Session.load(path, half).num_tokens == 20
    with torch.no_grad():
        half.lm_head.weight.mul_(1 + 2**-8)
    with pytest.raises(ValueError, match="another checkpoint"):
        Session.load(path, half)
    # And the other way round.
    session = Session(small_model().half())
    session.feed([1])
    session.save(tmp_path / "half")
    assert Session.load(tmp_path / "half", model).num_tokens == 1
    for wrong in ("{", "3", '{"of": "", "values": "AAA=", "precision": 1}'):
        change_header(tmp_path / "half", weights=wrong)
        with pytest.raises(ValueError, match="damaged header"):
            Session.load(tmp_path / "half", model)
    with open_state_file(path) as file:
        tensors, about = file.tensors(), dict(file.about)
    del about["weights"]
    write_state_file(path, tensors, about)
    assert Session.load(path, small_model().bfloat16()).num_tokens == 20
    with pytest.raises(ValueError, match="another checkpoint"):
        Session.load(path, small_model(seed=1))


def test_a_file_that_may_not_be_read_is_not_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "memory").touch()
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(PermissionError, match="Permission denied"):
        Session.load(tmp_path / "memory", small_model())


def test_a_sharded_model_has_the_memories_of_the_whole_one(tmp_path: Path) -> None:
    model = small_model("lmm").float()
    session, name = Session(model), fingerprint(model)
    session.feed(some_ids(30))
    session.save(tmp_path / "memory")
    expected = session.stats().layers
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert fingerprint(model) == name
        loaded, again = Session.load(tmp_path / "memory", model), Session(model)
        again.feed(some_ids(30))
        again.save(tmp_path / "again")
        assert loaded.stats().layers == again.stats().layers == expected
        assert torch.equal(next_logits(Session.load(tmp_path / "again", model)), next_logits(loaded))
    finally:
        dist.destroy_process_group()


def bytes_held() -> int:
    """By tensors, and by everything else that Python allocates, which tracemalloc counts."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values()) + tracemalloc.get_traced_memory()[0]


def test_a_reader_of_10_000_tokens_holds_no_more_than_one_of_4_000() -> None:
    """The session and all else there is. Two bytes kept for each token would be found."""
    model = small_model("lmm", num_hidden_layers=1, num_persistent_tokens=0, chunk_size=16).float()
    session, text, held = Session(model), some_ids(10_000), []
    tracemalloc.start()
    try:
        # At the same place of a chunk.
        for part in (text[:4000], text[4000:]):
            session.feed(part)
            held.append(bytes_held())
    finally:
        tracemalloc.stop()
    early, late = held
    assert session.num_tokens == 10_000 and late - early < 12_000, f"{late - early:,} bytes more"
