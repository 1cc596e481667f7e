from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titans.train import TrainSettings

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "memory_depth": 2,
    "chunk_size": 8,
    "segment_length": 16,
    "sliding_window": 16,
    "num_persistent_tokens": 2,
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five texts of uneven length: an epoch of the settings below has five or six steps."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    words = ["sea", "storm", "isle", "spirit", "duke", "magic", "drown", "\n"]
    for number, count in enumerate([60, 35, 80, 52, 44]):
        (folder / f"{number}.txt").write_text(" ".join(generator.choice(words, count)))
    return folder


@pytest.fixture
def drawn() -> None:
    """The runs of the test draw their curves."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes two thirds of the time of a run this small."""
    if "drawn" not in request.fixturenames:
        for module in ("metrics", "recipe"):
            monkeypatch.setattr(f"titans.train.{module}.draw_curves", lambda lines, path: None)


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a run of seconds in a folder of its own, with anything replaced."""

    def make(**changes: Any) -> TrainSettings:
        defaults: dict[str, Any] = dict(
            data=str(corpus),
            output=tmp_path / "run",
            config=CONFIG,
            steps=8,
            batch_size=4,
            sequence_length=40,
            log_every=3,
            eval_every=4,
            save_every=3,
            hold_out=0.2,
            threads=1,
        )
        return TrainSettings(**{**defaults, **changes})

    return make
