"""`titans generate`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from titans.cli.errors import UsageError
from titans.cli.models import ModelOptions, open_session
from titans.cli.outputs import check_output, is_memory
from titans.cli.sampling import Sampling
from titans.cli.terminal import report, text_streamer


@dataclass(frozen=True)
class Generate(Sampling, ModelOptions):
    """Continue a prompt, or what a memory has read.

    Example: titans generate runs/tempest --prompt "PROSPERO:" --memory plays.memory --temperature 0.8

    The new text appears on stdout while it is written; everything else goes to stderr.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a Titans model, a graft or any causal model of transformers, or the name of one of the
    library's."""
    prompt: str = ""
    """Text to continue; may be empty where a memory is given."""
    memory: Path | None = None
    """Start from this memory, written by `titans memorize` or --save-memory."""
    save_memory: Path | None = None
    """Write the memory with the prompt and the new text to this file."""
    json: bool = False
    """Print one JSON object instead of the text."""

    def run(self) -> int:
        """Generate, streaming to stdout."""
        self._check()
        model, tokenizer = self.open_model(self.checkpoint)
        session = open_session(model, tokenizer, self.memory)
        session.feed(self.prompt)
        self.seed_choices()
        began, tokens_before = time.perf_counter(), session.num_tokens
        text = session.generate(streamer=None if self.json else text_streamer(tokenizer), **self.sampling())
        seconds, tokens = time.perf_counter() - began, session.num_tokens - tokens_before
        if self.save_memory:
            session.save(self.save_memory)
            report(f"{self.save_memory} holds {session.num_tokens:,} tokens read")
        if self.json:
            print(
                json.dumps({"text": text, "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)})
            )
        return 0

    def _check(self) -> None:
        if not self.prompt and self.memory is None:
            raise UsageError("prompt='' and no memory: give --prompt or --memory to start from")
        try:
            self.prompt.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"prompt={self.prompt!r} is not valid text in this terminal's encoding"
            ) from None
        self.check_sampling()
        check_output("save_memory", self.save_memory, is_memory)
