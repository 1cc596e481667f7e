"""`titans generate`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from titans.cli.errors import UsageError
from titans.cli.outputs import check_output, is_memory
from titans.cli.terminal import report, text_streamer
from titans.zoo.checkpoint import load_checkpoint


@dataclass(frozen=True)
class Generate:
    """Continue a prompt, or what a memory has read.

    Example: titans generate runs/tempest --prompt "PROSPERO:" --memory plays.memory --temperature 0.8

    The new text appears on stdout while it is written; everything else goes to stderr.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a Titans model or any causal model of transformers, or the name of one of the library's."""
    prompt: str = ""
    """Text to continue; may be empty where a memory is given."""
    memory: Path | None = None
    """Start from this memory, written by `titans memorize` or --save-memory."""
    save_memory: Path | None = None
    """Write the memory with the prompt and the new text to this file."""
    max_new_tokens: int = 200
    """How many tokens to write."""
    temperature: float = 1.0
    """Below 1 safer, above 1 wilder."""
    top_k: int | None = None
    """Choose among the so many likeliest tokens; by default among all."""
    top_p: float | None = None
    """Choose among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """Seed of the choices; the same one gives the same text."""
    greedy: bool = False
    """Always take the likeliest token."""
    json: bool = False
    """Print one JSON object instead of the text."""

    def run(self) -> int:
        """Generate, streaming to stdout."""
        self._check()
        import torch

        from titans.stream import Session

        model, tokenizer = load_checkpoint(self.checkpoint)
        session = Session.load(self.memory, model, tokenizer) if self.memory else Session(model, tokenizer)
        session.feed(self.prompt)
        if self.seed is not None:
            torch.manual_seed(self.seed)
        began, tokens_before = time.perf_counter(), session.num_tokens
        text = session.generate(
            max_new_tokens=self.max_new_tokens,
            streamer=None if self.json else text_streamer(tokenizer),
            **self._sampling(),
        )
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
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens}: give a whole number of at least 1")
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature={self.temperature}: give a number above 0, or use --greedy")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k={self.top_k}: give a whole number of at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p}: give a number above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"seed={self.seed}: give a whole number from 0 to 2^63 − 1")
        check_output("save_memory", self.save_memory, is_memory)

    def _sampling(self) -> dict[str, Any]:
        if self.greedy:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
        }
