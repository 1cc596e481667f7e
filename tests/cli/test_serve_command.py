"""The command itself: where it listens, what it refuses, and what is there after kill -9."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import titans
from titans.cli import main
from titans.serve.engine import Engine
from titans.serve.memories import Memories
from titans.serve.settings import Settings

from ..checkpoints import save_byte_model

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TITANS_API_KEYS": ""}


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    folder, memories = save_byte_model(tmp_path / "small"), tmp_path.resolve() / "memories"
    command = [
        sys.executable,
        "-m",
        "titans",
        "serve",
        str(folder),
        "--port",
        "0",
        "--memories",
        memories.name,
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=memories.parent
    ) as server:
        assert server.stderr is not None
        try:
            lines = iter(server.stderr.readline, "")
            url = next(
                found[1]
                for line in lines
                if (found := re.search(rf"small at (http://127\.\S+); memories are in {memories};", line))
            )
            memory = post(f"{url}/v1/memories", {})["id"]
            told = post(f"{url}/v1/memories/{memory}/read", {"text": "To be, or not to be. " * 20})
            answer = post(
                f"{url}/v1/completions", {"prompt": "x", "memory": memory, "max_tokens": 3, "seed": 1}
            )
        finally:
            server.kill()
        logged = [json.loads(line) for line in server.stderr if line.startswith("{")]
    # A request is logged after its answer is sent, so the last line may die with the server.
    assert [line["status"] for line in logged][:2] == [200, 200] and "To be" not in json.dumps(logged)
    engine = Engine("small", *titans.load(folder))
    again = Memories(Settings(memories), {"small": engine})
    found = again.get("", memory)
    expected = engine.session()
    expected.feed("To be, or not to be. " * 20 + "x")
    assert found.tokens == told["tokens"] + 1 + answer["usage"]["completion_tokens"] == 424
    state = again.state(found).session
    assert state.num_tokens == 424 and bytes(state.recent[:5])[-1:] == b"x"
    again.close()
    engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "models: none given"),
        (["a/m", "b/m"], "two are called 'm'"),
        (["m", "--port", "65536"], "port=65536"),
        (["m", "--host", "0.0.0.0"], "give --api-key as well"),
        (["m", "--api-key", "no blanks"], "api_key"),
        (["m", "--rows", "0"], "rows=0"),
        (["m", "--timeout", "nan"], "timeout=nan"),
    ],
)
def test_a_wrong_call_is_explained(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TITANS_API_KEYS", raising=False)
    assert main(["serve", *options]) == 2
    assert message in capsys.readouterr().err
