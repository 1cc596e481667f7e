"""generate, memorize, eval and info on real text: what they print where, and what they say when it fails."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from titans.cli import main
from titans.cli.info import keys_reading, readable_tokens
from titans.cli.progress import ReadingProgress
from titans.data import byte_tokenizer, load_corpus
from titans.evaluate import KeyDimensions, gate_statistics, key_dimensions
from titans.hf import TitansConfig, TitansForCausalLM
from titans.nn import NeuralMemory
from titans.stream import Session

from .conftest import CtrlC

ACT_3, ACT_4 = (document.data for document in load_corpus("excerpt")[2:4])
ACT_4 = ACT_4[:4500]


def save_model(folder: Path, *, seed: int = 0, **overrides: Any) -> TitansForCausalLM:
    sizes = dict(
        variant="mac", vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, head_dim=8, memory_depth=2, memory_expansion=2, chunk_size=16,
        segment_length=64, sliding_window=64, num_persistent_tokens=2, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TitansForCausalLM(TitansConfig(**{**sizes, **overrides}))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "act-4.txt"
    path.write_bytes(ACT_4)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_read_save_go_on_and_describe(run: Callable[..., Any], model_folder: Path, tmp_path: Path) -> None:
    book, other = tmp_path / "book.txt", tmp_path / "noise.bin"
    other.write_bytes(np.random.default_rng(0).bytes(1000))
    book.write_bytes(ACT_4[:2000])
    memory = tmp_path / "book.memory"
    code, out, err = run("memorize", model_folder, book, other, "-o", memory, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["tokens"] == 3000
    assert summary["peak"]["file"] in (str(book), str(other)) and summary["peak"]["excerpt"]
    assert set(summary["files"]) == {str(book), str(other)}
    assert "tokens/s" in err and "surprise: mean" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.memory", "book.txt", "noise.bin"]

    session = Session(TitansForCausalLM.from_pretrained(model_folder), byte_tokenizer())
    session.feed(book.read_bytes() + other.read_bytes())
    longer = tmp_path / "longer.memory"
    options = ("--prompt", "PROSPERO:", "--max-new-tokens", 30, "--greedy")
    code, out, err = run("generate", model_folder, "--memory", memory, *options, "--save-memory", longer)
    assert code == 0, err
    session.feed("PROSPERO:")
    expected = session.generate(max_new_tokens=30, do_sample=False)
    assert out.rstrip("\n").startswith(expected) and len(set(expected)) > 1

    code, out, err = run("info", longer, "--json")
    about = json.loads(out)
    assert about["tokens"] == 3000 + len("PROSPERO:") + 30
    assert about["variant"] == "mac" and len(about["layers"]) == 2
    assert code == 0 and "norms of the memories" in err


def test_a_memory_grows_by_what_is_read_next(
    run: Callable[..., Any], model_folder: Path, tmp_path: Path
) -> None:
    first, second, both = (tmp_path / name for name in ("first", "second", "both"))
    first.write_bytes(ACT_4[:1000])
    second.write_bytes(ACT_4[1000:2001])
    for name, *rest in (("a", first), ("b", second, "--memory", tmp_path / "a"), ("c", first, second)):
        assert run("memorize", model_folder, *rest, "-o", tmp_path / name)[0] == 0
    tensors, expected = load_file(tmp_path / "b"), load_file(tmp_path / "c")
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_state_and_file_do_not_grow(run: Callable[..., Any], model_folder: Path, tmp_path: Path) -> None:
    sizes = set()
    # At the same place in a segment: where one begins, equal tensors are stored once.
    for count in (700, 700 + 20 * 64):
        text = tmp_path / f"{count}.txt"
        text.write_bytes((ACT_3 + ACT_4)[:count])
        code, out, _ = run("memorize", model_folder, text, "-o", tmp_path / "memory", "--json")
        assert code == 0
        summary = json.loads(out)
        assert summary["tokens_in_memory"] == count
        sizes.add((summary["state_bytes"], len(load_file(tmp_path / "memory"))))
    assert len(sizes) == 1


def test_the_peak_of_surprise_is_found(run: Callable[..., Any], model_folder: Path, tmp_path: Path) -> None:
    # One letter for so long that any other text is news.
    texts = [b"e" * 3001, b"e" * 640 + ACT_4[:320] + b"e" * 640]
    files = [tmp_path / "first", tmp_path / "second"]
    for path, text in zip(files, texts, strict=True):
        path.write_bytes(text)
    code, out, _ = run("memorize", model_folder, *files, "-o", tmp_path / "memory", "--json")
    summary = json.loads(out)

    session = Session(TitansForCausalLM.from_pretrained(model_folder))
    result = session.feed(b"".join(texts), collect_surprise=True)
    surprise = torch.cat([result.surprises.mean(-1), torch.zeros(1)])
    means = [part.unfold(0, 64, 64).mean(-1) for part in surprise.split([len(text) for text in texts])]
    file = int(means[1].max() > means[0].max())
    offset = 64 * int(means[file].argmax())
    peak = summary["peak"]
    assert code == 0 and (peak["file"], peak["offset"]) == (str(files[file]), offset)
    assert peak["surprise"] == pytest.approx(float(means[file].max()), rel=1e-5)
    assert peak["excerpt"] == " ".join(texts[file][offset : offset + 64].decode().split())
    assert summary["mean_surprise"] == pytest.approx(result.mean_surprise, rel=1e-3)
    assert summary["files"][str(files[1])] == pytest.approx(float(surprise[3001:-1].mean()), rel=1e-5)


def test_ctrl_c_saves_what_was_read(
    run: Callable[..., Any],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ctrl_c_when: CtrlC,
) -> None:
    text, memory = tmp_path / "endless.txt", tmp_path / "memory"
    text.write_bytes(ACT_4 * 400)
    reported, update = threading.Event(), ReadingProgress.update

    def noted(*arguments: Any) -> None:
        update(*arguments)
        reported.set()

    monkeypatch.setattr(ReadingProgress, "update", noted)
    with ctrl_c_when(reported.is_set):
        code, out, err = run("memorize", model_folder, text, "-o", memory)
    assert (code, out) == (130, "") and "Traceback" not in err, err
    session = Session.load(memory, TitansForCausalLM.from_pretrained(model_folder))
    assert f"{memory} holds the {session.num_tokens:,} tokens read until then" in err
    assert 0 < session.num_tokens < 400 * len(ACT_4)


def test_sampling_depends_on_the_seed_alone(run: Callable[..., Any], model_folder: Path) -> None:
    def text(*options: object) -> str:
        code, out, _ = run("generate", model_folder, "--prompt", "All", "--max-new-tokens", 12, *options)
        assert code == 0
        return out

    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)
    answer = json.loads(text("--top-k", 1, "--json"))
    assert answer["tokens"] == 12 and text("--greedy").startswith(answer["text"])


def test_perplexity_by_position_with_and_without_writing(
    run: Callable[..., Any], model_folder: Path, book: Path
) -> None:
    code, out, err = run("eval", "perplexity", model_folder, "--data", book, "--freeze-memory", "--json")
    result = json.loads(out)
    assert code == 0 and result["tokens"] == len(ACT_4) - 1
    assert [part["begin"] for part in result["by_position"]] == [0, 256, 1024, 4096]
    assert result["frozen"]["tokens"] == result["tokens"]
    assert result["gain"] == pytest.approx(result["frozen"]["bits_per_byte"] - result["bits_per_byte"])
    assert abs(result["gain"]) > 1e-5
    assert f"{result['bits_per_byte']:.4f}" in err and "1,024–4,095" in err

    options = "--hold-out", 0.1, "--context-length", 300, "--json"
    code, out, _ = run("eval", "perplexity", model_folder, "--data", "excerpt", *options)
    assert code == 0 and json.loads(out)["documents"] == 1
    assert [part["begin"] for part in json.loads(out)["by_position"]] == [0, 256]


def test_info_knows_the_preset(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TitansForCausalLM(TitansConfig.from_preset("tiny", variant="mag"))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("titans.cli.info.SAMPLE_TOKENS", 64)
    code, out, err = run("info", tmp_path, "--json")
    about = json.loads(out)
    assert code == 0 and (about["preset"], about["variant"]) == ("tiny", "mag")
    assert about["parameters"] == sum(p.numel() for p in model.parameters())
    assert f"{about['parameters']:,}" in err and "gates over 64 tokens of excerpt" in err
    code, out, _ = run("info", tmp_path)
    assert (code, out) == (0, "")


def test_info_reports_the_gates(
    run: Callable[..., Any], model_folder: Path, book: Path, tmp_path: Path
) -> None:
    code, out, err = run("info", model_folder, "--data", book, "--json")
    assert code == 0, err
    gates = json.loads(out)["gates"]
    assert (gates.pop("tokens"), gates.pop("sample")) == (2048, [str(book)])
    model = TitansForCausalLM.from_pretrained(model_folder)
    layers = gate_statistics(model, [list(ACT_4[:2048])])
    assert gates.keys() == vars(layers[0]).keys()
    for name, numbers in gates.items():
        expected = torch.stack([getattr(layer, name) for layer in layers])
        torch.testing.assert_close(torch.tensor(numbers).double(), expected, rtol=1e-4, atol=0)
    assert torch.tensor(gates["half_life_at_rest"])[:, :, 1].round().tolist() == [[1024, 1e6]] * 2
    # A row for each head, and a line in it for each matrix of the memory.
    lines = [line.split() for line in err.splitlines()]
    assert ["layer", "head", "W", "at", "rest", "10", "%", "median", "90", "%", "momentum", "step", "size",
            "strength"] in lines  # fmt: skip
    last = next(n for n, line in enumerate(lines) if line[:4] == ["1", "1", "1", "1.0M"]) + 1
    assert lines[last][:2] == ["2", "1.0M"]
    assert float(lines[last][-2]) == pytest.approx(gates["step_size_median"][1][1][1], rel=0.05)

    # A memory that forgets nothing, and a sample that is shorter.
    for module in model.modules():
        if isinstance(module, NeuralMemory):
            module.gate_bias.data[0] = -200
            module.gate_weight.data.zero_()
    model.save_pretrained(tmp_path)
    (tmp_path / "short").write_bytes(b"To be")
    code, out, err = run("info", tmp_path, "--data", tmp_path / "short", "--json")
    gates = json.loads(out)["gates"]
    assert code == 0 and gates["tokens"] == 5 and gates["half_life_90"] == [[[None] * 2] * 2] * 2
    assert "∞" in err
    # One token makes no pair of keys.
    (tmp_path / "short").write_bytes(b"T")
    code, out, err = run("info", tmp_path, "--data", tmp_path / "short", "--json")
    assert code == 0 and json.loads(out)["keys"] is None and "effective dimensions" not in err


@pytest.mark.parametrize(
    ("options", "memory", "widths"),
    [
        (dict(), "two layers, SiLU, stable form, 2 heads of 8 → 16 → 8", (8, 16)),
        (dict(memory_depth=1), "linear, stable form, 2 heads of 8 × 8", (8, None)),
        (
            dict(memory_depth=1, memory={"features": "sin", "form": {"name": "recall", "row_limit": 4.0}}),
            "sin features, recall form with row_limit=4.0, 2 heads of 8 × 32",
            (32, None),
        ),
        (
            dict(memory_depth=1, memory={"features": "product", "feature_size": 20}),
            "product features, stable form, 2 heads of 8 × 20",
            (20, None),
        ),
        (
            dict(variant="lmm", memory_depth=3, memory=dict(
                form=dict(activation="sin", norm=True), local_chunk_sizes=[8], shard_length=16,
            )),
            "three layers, sine, stable form with norm=True, 2 heads of 8 → 16 → 16 → 8, each with 1 local "
            "memory",
            (8, 16),
        ),
    ],
)  # fmt: skip
def test_info_names_the_memory_and_measures_its_keys(
    run: Callable[..., Any],
    book: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: Any,
    memory: str,
    widths: Any,
) -> None:
    # More than any width; what test_info_reports_the_gates reads is as long as a user's.
    monkeypatch.setattr("titans.cli.info.SAMPLE_TOKENS", 400)
    model = save_model(tmp_path, **options)
    byte_tokenizer().save_pretrained(tmp_path)
    code, out, err = run("info", tmp_path, "--data", book, "--json")
    assert code == 0, err
    about = json.loads(out)
    assert about["memory"] == memory and memory in " ".join(err.split())
    keys = about["keys"]
    assert (keys["tokens"], keys["sample"]) == (400, [str(book)])
    assert (keys["width"], keys["hidden_width"]) == widths
    layers = key_dimensions(model, [list(ACT_4[:400])])
    expected = [torch.stack([layer.keys for layer in layers])]
    expected += [torch.stack([x for layer in layers if (x := layer.hidden) is not None])] if widths[1] else []
    found = [x for name in ("dimensions", "hidden_dimensions") if (x := keys[name]) is not None]
    for numbers, tensor in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(numbers).double(), tensor, rtol=1e-4, atol=0)
    read = expected[-1].flatten().sort().values[1:3].mean()
    assert f"{read:.1f} of {widths[1] or widths[0]}: about so many pairs" in keys["reading"]
    assert keys["reading"] in " ".join(err.split()) and "Effective dimensions, median of all heads" in err
    assert f"{expected[0][1].mean():.1f} ({expected[0][1].min():.1f}–{expected[0][1].max():.1f})" in err


def test_info_says_when_a_linear_memory_would_recall_more() -> None:
    keys, hidden = torch.tensor([[6.0, 8]]), torch.tensor([[3.0, 5]])
    deep, linear = KeyDimensions(8, keys[0], 16, hidden[0]), KeyDimensions(8, keys[0])
    assert keys_reading([deep]).startswith("4.0 of 16: ")
    assert keys_reading([deep]).endswith("a linear memory of the same keys would recall more (7.0)")
    assert keys_reading([linear]).endswith("from one head") and "7.0 of 8" in keys_reading([linear])
    assert keys_reading([KeyDimensions(64, keys[0])]).endswith("resemble each other or repeat")


def test_info_of_what_has_no_gates(
    run: Callable[..., Any], model_folder: Path, memory: Path, tmp_path: Path
) -> None:
    save_model(tmp_path / "model", variant="transformer")
    code, out, err = run("info", tmp_path / "model", "--json")
    assert code == 0 and "gates" not in json.loads(out) and "half-lives" not in err
    for path in (tmp_path / "model", memory):
        code, out, err = run("info", path, "--data", "excerpt")
        assert (code, out) == (2, "") and f"data with path={str(path)!r}" in err


def test_info_of_a_memory_loads_no_torch(
    run: Callable[..., Any], memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys; from titans.cli import main; code = main(['info', sys.argv[1], '--json']);"
        "sys.exit(code or bool({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, memory], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    # A file of before there were summaries is described from its tensors, with the same result.
    monkeypatch.setattr("titans.cli.info.read_summary", lambda path: None)
    code, out, _ = run("info", memory, "--json")
    assert len(json.loads(out)["model_fingerprint"]) == 32
    assert code == 0 and json.loads(out) == json.loads(done.stdout)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(4, "4.0"), (64.4, "64"), (999.7, "1.0k"), (1234, "1.2k"), (1e6, "1.0M"), (4e16, "4e+04T"), (None, "∞")],
)
def test_half_lives_are_readable(tokens: float | None, text: str) -> None:
    assert readable_tokens(tokens) == text


def test_a_tokenizer_of_words(run: Callable[..., Any], tmp_path: Path) -> None:
    """Its texts are cut at lines, and must be UTF-8."""
    save_model(tmp_path, vocab_size=5)
    vocabulary = {"<unk>": 0, "to": 1, "be": 2, "or": 3, "not": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    text = tmp_path / "text"
    text.write_bytes(b"to be or not to be\n" * 50)
    code, out, _ = run("memorize", tmp_path, text, "-o", tmp_path / "memory", "--json")
    assert code == 0 and json.loads(out)["tokens"] == 300
    text.write_bytes(b"to be or not to be\n\xff")
    code, _, err = run("memorize", tmp_path, text, "-o", tmp_path / "memory")
    assert code == 1 and "not valid UTF-8: byte 0xff at offset 19" in err


def damaged(source: Path, folder: Path, kind: str) -> Path:
    """A copy of a checkpoint with one thing wrong."""
    shutil.copytree(source, folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if kind == "no config":
        config.unlink()
    elif kind == "half a config":
        config.write_text(config.read_text()[:40])
    elif kind == "unknown field":
        config.write_text(config.read_text().replace('"hidden_size"', '"hiden_size"'))
    elif kind == "another config":
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    elif kind == "another model":
        config.write_text(config.read_text().replace('"model_type": "titans"', '"model_type": "llama"'))
    elif kind == "half the weights":
        weights.write_bytes(weights.read_bytes()[:3000])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "NaN":
        tensors = load_file(weights)
        tensors["model.norm.weight"][3] = float("nan")
        save_file(tensors, weights, {"format": "pt"})
    elif kind == "half a tokenizer":
        (folder / "tokenizer.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "no config.json"),
        ("half a config", "config.json is damaged"),
        ("unknown field", "hiden_size=32 is not a field"),
        ("another config", "do not fit its config.json"),
        ("another model", "do not fit its config.json (missing keys: "),
        ("half the weights", "are damaged"),
        ("no weights", "has no model.safetensors: give a folder"),
        ("NaN", "hold NaN or Inf (model.norm.weight)"),
        ("half a tokenizer", "tokenizer="),
    ],
)
def test_a_damaged_checkpoint_is_one_line(
    run: Callable[..., Any], model_folder: Path, tmp_path: Path, kind: str, message: str
) -> None:
    folder = damaged(model_folder, tmp_path / "copy", kind)
    code, out, err = run("generate", folder, "--prompt", "a", "--max-new-tokens", 1)
    assert (code, out, len(err.splitlines())) == (1, "", 1), err
    assert message in err


@pytest.fixture
def memory(model_folder: Path, tmp_path: Path) -> Path:
    session = Session(TitansForCausalLM.from_pretrained(model_folder))
    session.feed(ACT_4[:200])
    session.save(tmp_path / "memory")
    return tmp_path / "memory"


def test_a_wrong_memory_is_one_line(
    run: Callable[..., Any], model_folder: Path, memory: Path, tmp_path: Path
) -> None:
    save_model(tmp_path / "other", seed=1)
    save_model(tmp_path / "shorter", segment_length=32)
    half = tmp_path / "half"
    half.write_bytes(memory.read_bytes()[:500])
    for folder, file, message in (
        (tmp_path / "other", memory, "made with another checkpoint"),
        (tmp_path / "shorter", memory, "segment_length=64"),
        (model_folder, half, "is damaged"),
        (model_folder, tmp_path / "none", "is not a file"),
    ):
        code, out, err = run("generate", folder, "--memory", file, "--max-new-tokens", 1)
        assert (code, out, len(err.splitlines())) == (1, "", 1), err
        assert message in err
    code, out, err = run("info", half)
    assert code == 1 and "is damaged" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("generate MODEL", 2, "give --prompt or --memory"),
        ("generate MODEL --prompt a --temperature 0", 2, "temperature=0.0"),
        ("generate MODEL --prompt a --top-p 2", 2, "top_p=2.0"),
        ("generate MODEL --prompt a --max-new-tokens 0", 2, "max_new_tokens=0"),
        ("generate MODEL --prompt a --save-memory none/memory", 2, "there is no folder 'none'"),
        ("generate MODEL --prompt a --surprise-me", 2, "--surprise-me"),
        ("generate none --prompt a", 1, "checkpoint='none' is not a folder"),
        ("memorize MODEL -o MEMORY", 2, "name the texts"),
        ("memorize MODEL BOOK", 2, "--output"),
        ("memorize MODEL BOOK -o MODEL", 2, "is a folder"),
        ("memorize MODEL none.txt -o MEMORY", 1, "'none.txt' is not a file"),
        ("memorize MODEL BOOK EMPTY -o MEMORY", 1, "is empty"),
        ("eval perplexity MODEL --data", 2, "data: none given"),
        ("eval perplexity MODEL --data none", 1, "neither a file nor a folder"),
        ("eval perplexity MODEL --data BOOK --hold-out 1", 2, "hold_out=1.0"),
        ("eval perplexity MODEL --data BOOK --batch-size 0", 2, "batch_size=0"),
        ("eval needles MODEL --data BOOK", 2, "needles"),
        ("eval needle MODEL --lengths 1q", 2, "1q' is no number of tokens: write 4096"),
        ("eval needle MODEL --depths 0,half", 2, "half' is no number: give numbers from 0 to 1"),
        ("eval needle MODEL --samples 0", 2, "samples=0: give a whole number"),
        ("eval needle MODEL --task word --haystack none", 1, "neither a file nor a folder"),
        ("eval needle titans-mac-huge", 1, "is not a folder"),
        ("info MODEL --data", 2, "data: none given"),
        ("info MODEL --data none", 1, "neither a file nor a folder"),
        ("info none", 1, "path='none' does not exist"),
        ("info BOOK", 1, "is damaged or not a safetensors file"),
    ],
)
def test_a_wrong_call_is_explained(
    run: Callable[..., Any],
    model_folder: Path,
    book: Path,
    tmp_path: Path,
    arguments: str,
    code: int,
    message: str,
) -> None:
    (tmp_path / "empty").touch()
    places = {"MODEL": model_folder, "BOOK": book, "EMPTY": tmp_path / "empty", "MEMORY": tmp_path / "memory"}
    found, out, err = run(*(places.get(word, word) for word in arguments.split()))
    assert (found, out) == (code, ""), err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("command", ["generate", "memorize", "eval perplexity", "eval needle", "info"])
def test_every_command_explains_itself(run: Callable[..., Any], command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and f"Example: titans {command} " in out


def test_a_terminal_gets_a_bar() -> None:
    screen = io.StringIO()
    with ReadingProgress(1000, Console(file=screen, force_terminal=True, width=100)) as progress:
        time.sleep(0.01)
        progress.update(500, 50, "book.txt")
    assert "book.txt" in screen.getvalue() and "50%" in screen.getvalue() and "tokens/s" in screen.getvalue()


def test_a_needle_is_asked_for(
    run: Callable[..., Any], model_folder: Path, book: Path, tmp_path: Path
) -> None:
    sizes = ["--lengths", "250,0.5k", "--depths", "0.2", "0.9", "--samples", "3"]
    text = ["--task", "number", "--haystack", book, "--plot", tmp_path / "map.png"]
    code, out, err = run("eval", "needle", "--checkpoint", model_folder, *text, *sizes, "--json")
    cells = json.loads(out)["cells"]
    assert code == 0 and [(c["length"], c["depth"]) for c in cells] == [
        (250, 0.2), (250, 0.9), (512, 0.2), (512, 0.9)
    ]  # fmt: skip
    assert all(c["samples"] == 3 and c["num_bytes"] == c["length"] for c in cells)
    assert [c["beyond_attention"] for c in cells] == [True, False, True, False]
    assert "tokens/s" in err and "512" in err and (tmp_path / "map.png").exists()
