"""`titans graft`: a model and a text in; features, checkpoints and a graft that other commands open out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import titans
from titans.cli import main
from titans.cli.graft import Graft

from ..models import small_causal_lm
from .conftest import CtrlC

SMALL = [
    "--window", "32", "--cached.episodes", "16", "--cached.held-out-episodes", "4", "--cached.block-tokens",
    "192", "--cached.facts", "1", "--cached.text-tokens", "3000", "--cached.document-tokens", "600",
    "--training.tokens-per-step", "400", "--training.evaluate-every", "2", "--training.save-every", "1",
    "--meta.steps", "2", "--meta.tokens", "64", "--meta.held-out-tokens", "128", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    small_causal_lm("llama").save_pretrained(folder)
    return folder


def command(base: Path, output: Path, *options: str) -> list[str]:
    return ["graft", str(base), "--data", "excerpt", "--output", str(output), *SMALL, *options]


def test_a_graft_is_trained_interrupted_continued_and_opened(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ctrl_c_when: CtrlC
) -> None:
    output = tmp_path / "grafted"
    steps = ["--training.steps", "300"]
    with ctrl_c_when(lambda: any(output.glob("checkpoint-*"))):
        assert main(command(base, output, *steps)) == 130
    err = capsys.readouterr().err
    assert re.search(
        r"features: [\d,]+ tokens, 0\.\d\d GB in .*features; about \d+:\d\d on this machine", err
    )
    assert re.search(
        r"titans: association: stopped after step \d+ of 300, which is saved: the same command goes on\n$",
        err,
    )
    assert not (output / "model.safetensors").exists()
    features = {path: path.stat().st_mtime_ns for path in (output / "features").glob("*.safetensors")}
    reached = int(re.search(r"stopped after step (\d+)", err)[1])  # type: ignore[index]

    # Few minutes end the training, too; what had been cached is not read again.
    assert main(command(base, output, *steps, "--training.minutes", "0.0001", "--json")) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["association"]["step"] == reached + 1 and not result["association"]["finished"]
    assert "adaptation" not in result and not (output / "adaptation").exists()
    assert {path: path.stat().st_mtime_ns for path in features} == features
    assert main(command(base, output, "--training.steps", "4")) == 1
    assert "was begun with steps=300, now it is 4: give the same" in capsys.readouterr().err


def test_a_trained_graft_reads(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "grafted"
    assert main(command(base, output, "--training.steps", "2", "--json")) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert all(found[name]["finished"] and found[name]["step"] == 2 for name in ("association", "adaptation"))
    assert {*found["association"]["held_out"]["recall"]} == {"facts-held-out", "facts-new-wording"}
    lines = err.splitlines()
    assert any(re.match(r"features 100% · [\d,]+ tokens/s · 0:00 left", line) for line in lines)
    for pattern in (
        r"association · step 2/2 · loss [+-]\d\.\d{4} · text [+-]\d\.\d{4} nats · [\d,]+ tokens/s",
        r"association · step 2/2 · recalled \d+% of facts held out, \d+% of facts new wording · held-out",
        r"adaptation · step 2/2 · held-out text",
    ):
        assert any(re.match(pattern, line) for line in lines), pattern
    assert re.match("association: recalled .* · held-out text", lines[-3])
    assert re.match("adaptation: (held-out text|no step was better)", lines[-2])
    assert lines[-1] == f"done: {output} holds the graft"
    # The same features serve another training, of this base in this window alone.
    again = ["graft", str(base), "--features", str(output / "features"), *SMALL, "--train", "association"]
    again += ["--training.steps", "1", "-o"]
    assert main([*again, str(tmp_path / "again")]) == 0
    assert main([*again, str(tmp_path / "other"), "--window", "64"]) == 1
    assert "holds features with window=32, now it is 64" in capsys.readouterr().err
    grafted, tokenizer = titans.load(output)
    assert grafted.association is not None and grafted.association.state_mean.any()
    assert grafted.adaptation is not None and grafted.adaptation.start_bias is not None
    session = titans.Session(grafted, tokenizer)
    session.feed("the name of the ship is stated here. " * 3)
    assert session.generate(max_new_tokens=2, do_sample=False) is not None


def test_documents_that_are_held_out_are_left_out_of_the_data(base: Path, tmp_path: Path) -> None:
    documents, held_out = Graft(
        checkpoint=base, output=tmp_path, data=("excerpt", "python/argparse.py"), held_out=("excerpt/*-5",)
    )._documents("both")
    assert documents is not None and held_out is not None
    names = [document.name for document in documents]
    assert len(names) == 5 and "argparse.py" in names[:2]
    assert [document.name for document in held_out] == ["the-tempest-act-5"]
    assert held_out[0].name not in names


@pytest.mark.parametrize("options", [
    ["--train", "adaptation"],
    ["--inside.tokens", "16", "--inside.steps", "2", "--inside.held-out-tokens", "64",
     "--inside.rows", "2", "--residual", "num_heads=1", "head_dim=8", "layers=[1]", "--lora", "rank=2"],
])  # fmt: skip
def test_other_trainings(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    output = tmp_path / "grafted"
    assert main(command(base, output, "--json", *options)) == 0
    out, err = capsys.readouterr()
    (name, result), _ = json.loads(out).items()
    assert result["finished"] and result["step"] == 2
    assert f"{name} · step 0/2 · held-out text " in err
    assert err.splitlines()[-1] == f"done: {output} holds the graft"
    grafted, _ = titans.load(output)
    if name == "inside":
        assert (
            [*grafted.residual] == ["1"] and grafted.config.lora["rank"] == 2 and grafted.adaptation is None
        )
    else:
        assert grafted.adaptation.start_bias is not None and grafted.association is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--graft"], "grafts the model anyway"),
        (["--training.steps", "0"], "steps=0: give a whole number of at least 1"),
        (["--cached.block-tokens", "10"], "block_tokens=10: give a whole number of at least 64"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--association", "wings=2"], "association has no setting 'wings'"),
        (
            ["--train", "adaptation", "--association", "feature_size=9"],
            "--train adaptation has none",
        ),
        (["--lora", "rank=2", "--association", "feature_size=9"], "a graft for --train inside has none"),
        (["--held-out", "excerpt", "--cached.document-tokens", "100"], "document_tokens=100"),
    ],
)
def test_bad_options_are_one_line(
    base: Path, tmp_path: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(base, tmp_path / "out", *options)) in (1, 2)
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_another_models_folder_is_not_replaced(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(base, base)) == 2
    assert "holds a config.json of something else" in capsys.readouterr().err
    assert main(["graft", str(base), "--output", str(tmp_path / "out")]) == 2
    assert "data: none given; name texts, or the folder of features" in capsys.readouterr().err
    titans.graft(titans.load(base)[0], window=32).save_pretrained(tmp_path / "plain")
    assert main(command(tmp_path / "plain", tmp_path / "out", "--train", "association")) == 1
    assert "this graft has no association" in capsys.readouterr().err
    # Found before the model is opened.
    (tmp_path / "plain" / "model.safetensors").unlink()
    for options in (["--train", "inside"], ["--lora", "rank=2"]):
        assert main(["graft", str(tmp_path / "plain"), "-o", str(tmp_path / "out"), *options]) == 2
        assert "data: none given; training through the model reads texts" in capsys.readouterr().err
