from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from titans.cli import main
from titans.cli.errors import UsageError
from titans.cli.train import Train, defaults_of
from titans.train import FactSettings
from titans.train.progress import ProgressLine

from .conftest import CtrlC

SMALL = [
    "--config", "hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=2",
    "head_dim=8", "chunk_size=8", "segment_length=16", "sliding_window=16", "num_persistent_tokens=2",
    "--batch-size", "4", "--sequence-length", "40", "--threads", "1", "--eval-tokens", "400",
]  # fmt: skip


def command(output: Path, *options: str) -> list[str]:
    return ["train", "--data", "excerpt", "--output", str(output), *SMALL, *options]


def test_train_reports_progress_on_stderr_and_prints_its_result_as_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main(command(tmp_path / "run", "--steps", "6", "--log-every", "2", "--json"))
    out, err = capfd.readouterr()
    assert code == 0, err
    result = json.loads(out)
    assert result["steps"] == 6 and [step for step, _ in result["losses"]] == [2, 4, 6]
    assert result["evaluations"] == [[6, result["bits_per_byte"]]]
    assert (tmp_path / "run" / "model.safetensors").is_file()
    first, *lines, last = err.splitlines()
    assert re.match(
        r"tiny mac, 0\.0\d M parameters; excerpt: 4 documents, 69,690 tokens; held out: the-temp", first
    )
    assert [line.split(" · ")[0] for line in lines] == ["step 2/6", "step 4/6", "step 6/6", "step 6/6"]
    assert re.search(r"loss \d\.\d{4} · \d\.\d{3} bits/byte · [\d,]+ tokens/s · \d:\d\d left$", lines[1])
    assert (
        last == f"done: {result['bits_per_byte']:.3f} bits/byte held out; {tmp_path / 'run'} holds the model"
    )


def test_ctrl_c_leaves_a_checkpoint_that_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ctrl_c_when: CtrlC
) -> None:
    output = tmp_path / "run"
    with ctrl_c_when((output / "metrics.jsonl").is_file):
        code = main(command(output, "--steps", "100000", "--log-every", "1"))
    message = capsys.readouterr().err
    assert code == 130, message
    step = int(re.search(r"^titans: interrupted after step (\d+) of 100000; .*--resume$", message, re.M)[1])  # type: ignore[index]
    assert "Traceback" not in message
    assert [path.name for path in output.iterdir() if "checkpoint" in path.name] == [f"checkpoint-{step}"]
    # With the options of the run, of which one is changed.
    assert main(["train", "--output", str(output), "--resume", "--steps", str(step + 1)]) == 0
    assert f"resuming from checkpoint-{step}" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, step + 2), step + 1]  # each step once, and the evaluation of the last
    assert main(["train", "--output", str(output), "--resume", "--steps", "1"]) == 2
    assert f"checkpoint-{step + 1} is past that" in capsys.readouterr().err
    (output / "training.json").write_text("[")
    assert main(["train", "--output", str(output), "--resume"]) == 2
    assert "training.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--preset", "huge"], 2, r"preset 'huge' is not known: choose one of .*'tiny'"),
        (["--variant", "mab"], 2, r"variant='mab': choose one of .*'mac'"),
        (["--config", "chunk=8"], 2, r"chunk=8 is not a field of TitansConfig: choose from .*chunk_size"),
        (["--config", "chunk_size=eight"], 2, r"chunk_size='eight': give a whole number"),
        (
            ["--data", "exerpt"],
            2,
            r"corpus='exerpt' is neither a file nor .* \(excerpt, shakespeare, bible, .*python\)",
        ),
        (["--steps", "0"], 2, r"steps=0: give a whole number of at least 1"),
        (["--resume"], 2, r"resume: there is no checkpoint in output="),
        (["--carry-memory", "--variant", "transformer"], 2, r"carry_memory with variant='transformer'"),
        (["--config-file", "none.yaml"], 2, r"config_file='none.yaml' cannot be read"),
        (["--data", "empty.txt"], 1, r"corpus='empty.txt' holds no text"),
        (["--data", "single.txt"], 1, r"data='single.txt' is a single document"),
        (["--tokenizer", "nowhere/at/all"], 1, r"tokenizer='nowhere/at/all' could not be loaded"),
        (["--output", "single.txt/run"], 2, r"output='single.txt/run' cannot be written \(Not a directory\)"),
        (["--output", "single.txt"], 2, r"output='single.txt' is a file: give a folder"),
    ],
)
def test_what_is_wrong_is_reported_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "single.txt").write_text("A text.")
    assert main(["train", "--data", "excerpt", "--output", "run", "--steps", "1", *options]) == code
    captured = capsys.readouterr()
    *before, last = captured.err.splitlines()
    assert re.match(f"titans: .*{message}", last), captured.err
    assert len(before) <= 1 and captured.out == ""  # at most the summary of the run
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["train"], ["train", "--data", "excerpt", "--stepz", "3"]]
)
def test_options_that_do_not_parse_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err and not captured.out and "Traceback" not in captured.err


def test_help_and_version_need_no_torch() -> None:
    program = (
        "import sys, titans.cli\n"
        "assert titans.cli.main(['--help']) == titans.cli.main(['eval', '-h']) == 0\n"
        "assert 'tyro' not in sys.modules\n"
        "assert titans.cli.main(['train', '--help']) == titans.cli.main(['--version']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Example: titans train" in done.stdout and "titans 0." in done.stdout
    assert done.stdout.count("eval needle") == 2 and done.stdout.count("  memorize  ") == 1
    for option in ("--carry-memory", "--config FIELD=VALUE", "--resume", "--config-file"):
        assert option in done.stdout


def test_a_config_file_sets_what_the_command_line_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data: excerpt\noutput: {tmp_path / 'run'}\nsteps: 2\nlearning_rate: 1e-4\nthreads: 1\n"
        "variant: lmm\nsequence_length: 24\nbatch_size: 2\nhold_out: 0\nbetas: [0.8, 0.9]\n"
        "config: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 1, head_dim: 8}\n"
    )
    assert main(["train", "--config-file", str(file), "--batch-size", "3"]) == 0, capsys.readouterr().err
    written = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (written["batch_size"], written["sequence_length"], written["betas"]) == (3, 24, [0.8, 0.9])
    assert written["config"]["hidden_size"] == 32 and written["config"]["memory_depth"] == 1
    assert written["learning_rate"] == 1e-4
    capsys.readouterr()
    for text, message in [
        ("stepz: 3", r"sets 'stepz': choose from .*steps"),
        ("steps: many", r"steps='many' is of type str: give int"),
        ("weight_decay: much", r"could not convert string to float: 'much'"),
        ("threads: 2.5", r"threads=2.5 is of type float: give int or nothing"),
        ("- 3", r"holds no settings"),
        ("steps: [", r"cannot be read"),
    ]:
        file.write_text(text)
        assert main(["train", "--config-file", str(file)]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_fields_of_the_memory_and_settings_of_the_facts_have_dotted_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Train] = []
    monkeypatch.setattr(Train, "run", lambda self: parsed.append(self) or 0)
    command = ["train", "--data", "excerpt", "--config", "chunk_size=8", "memory.form.norm=true"]
    assert main([*command, "memory.start=induction", "--facts.answer-weight", "2"]) == 0
    assert parsed[0].facts == FactSettings(answer_weight=2.0)
    memory = {"form": {"norm": True}, "start": "induction"}
    assert parsed[0].config == {"chunk_size": 8, "memory": memory}
    capsys.readouterr()
    for both in (["memory.form=recall"], ["memory.start=random", "memory.start.at=3"]):
        assert main([*command, *both]) == 2
        assert "is given" in capsys.readouterr().err


def test_the_settings_of_a_run_from_before_are_translated(tmp_path: Path) -> None:
    flat = {"data": "excerpt", "steps": 7, "fact_spacing": 60.0, "facts_alike": 0.5, "answer_weight": 2.0}
    flat |= {"state_passing": 0.0, "config": {"hidden_size": 32, "memory_norm": True, "conv_kernel": 2}}
    (tmp_path / "training.json").write_text(json.dumps(flat))
    (tmp_path / "more.yaml").write_text("facts: {distance: 64}\nsteps: 9\n")
    arguments = ["--output", str(tmp_path), "--resume", "--config-file", str(tmp_path / "more.yaml")]
    found = defaults_of(arguments)
    assert found is not None and found.steps == 9
    assert found.facts == FactSettings(spacing=60.0, distance=64, alike=0.5, answer_weight=2.0)
    memory = {"form": {"name": "stable", "norm": True}, "conv_kernel": 2}
    # Two layers were the default until the depth was written down.
    assert found.config == {"hidden_size": 32, "memory": memory, "memory_depth": 2}
    (tmp_path / "more.yaml").write_text("facts: {spacing: often}\n")
    with pytest.raises(UsageError, match="could not convert string to float: 'often'"):
        defaults_of(arguments)
    (tmp_path / "more.yaml").write_text("facts: 3\n")
    with pytest.raises(UsageError, match="facts=3 holds no settings"):
        defaults_of(arguments)
    (tmp_path / "training.json").write_text(json.dumps(flat | {"state_passing": 0.5}))
    with pytest.raises(UsageError, match=r"state_passing=0.5: no row begins"):
        defaults_of(["--output", str(tmp_path), "--resume"])


def test_a_terminal_gets_one_live_line() -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=120)
    with ProgressLine(1000, bytes_are_tokens=False, console=console) as progress:
        for step in range(100, 1001, 100):
            progress(
                {"kind": "train", "step": step, "loss": 2.0, "tokens_per_second": 1234.5, "elapsed": step}
            )
            progress({"kind": "eval", "step": step, "loss": 2.0, "bits_per_byte": 2.5, "elapsed": step})
    shown = terminal.getvalue()
    assert "step 300/1000 · loss 2.0000 · held out 2.500 · 1,234 tokens/s · 11:40 left" in shown
    assert shown.count("\n") == 1
