"""Train a small model and a transformer on Shakespeare, and measure what the memory is worth:
`titans demo --small`."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from titans.data import Document, byte_tokenizer, hold_out, load_corpus
from titans.experiments.hidden_fact import HiddenFact, hide_and_ask
from titans.experiments.recollection import Recollection, recollect, shuffled_lines
from titans.experiments.report import DemoResult, TrainedModel, write_report
from titans.experiments.runner import Ticker, say
from titans.hf import TitansConfig, TitansForCausalLM
from titans.stream import Session
from titans.train import TrainingRun, TrainSettings
from titans.train.progress import ProgressLine
from titans.zoo import load

CORPUS = "shakespeare"
PASSAGE_LENGTH = 1500
SAMPLE_LENGTH = 500
TEMPERATURE = 0.8
BATCH_SIZE, SEQUENCE_LENGTH = 8, 256
# The model in the zoo that is asked for a fact, the books, and the bytes between fact and question.
REMEMBERING, BOOKS, DISTANCES = "titans-mag-tiny", "bible", (1_000, 10_000, 100_000, 1_000_000)


def same_size_config(variant: str) -> dict[str, int]:
    """Fields of a variant of the tiny preset: two layers of memory, or for a transformer of equal width and
    depth the field that gives it as many parameters as the MAC model."""
    if variant != "transformer":
        return {"memory_depth": 2}

    def size(name: str) -> int:
        with torch.device("meta"):
            return TitansForCausalLM(
                TitansConfig.from_preset("tiny", variant=name, memory_depth=2)
            ).num_parameters()

    config = TitansConfig.from_preset("tiny")
    missing = size("mac") - size(variant)
    wider = round(missing / (3 * config.hidden_size * config.num_hidden_layers))
    return {"intermediate_size": config.intermediate_size + wider}


def train_variant(variant: str, steps: int, folder: Path) -> TrainedModel:
    """Train one variant of the tiny preset; all variants read the same bytes in the same order."""
    settings = TrainSettings(
        data=CORPUS,
        output=folder / variant,
        variant=variant,
        config=same_size_config(variant),
        steps=steps,
        batch_size=BATCH_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        in_order=True,
        eval_every=max(steps // 4, 1),
        eval_tokens=16384,
        save_every=steps,
    )
    run = TrainingRun(settings)
    say(f"\n{run.summary()}")
    with ProgressLine(steps, bytes_are_tokens=True) as progress:
        result = run.run(progress)
    assert result.bits_per_byte is not None
    return TrainedModel(
        name=variant if variant == "transformer" else f"titans ({variant})",
        num_parameters=result.num_parameters,
        num_bytes=steps * BATCH_SIZE * SEQUENCE_LENGTH,
        bits_per_byte=result.bits_per_byte,
        speed=result.tokens_per_second,
        losses=tuple((step, loss / math.log(2)) for step, loss in result.losses),
        evaluations=result.evaluations,
    )


def halves(document: Document) -> tuple[bytes, bytes]:
    """A play cut in two at the end of a line near its middle."""
    middle = document.data.index(b"\n", len(document.data) // 2) + 1
    return document.data[:middle], document.data[middle:]


def surprise_of(model: TitansForCausalLM, before: bytes, passage: bytes) -> np.ndarray:
    """Surprise at every byte of a passage, (bytes,), read after what stands before it; 1 is the mean."""
    session = Session(model, byte_tokenizer())
    session.feed(before)
    # A session holds its newest token back, so one more byte brings the passage's last one in.
    read = session.feed(passage + b"\n", collect_surprise=True)
    assert read.surprises is not None
    levels = read.surprises[len(before) - read.start :].double()
    return (levels / levels.mean(0, keepdim=True)).mean(1).numpy()


def run_demo(steps: int, folder: Path) -> DemoResult:
    """Train, evaluate, sample; prints as it goes and returns what the report shows."""
    began = time.perf_counter()
    models = tuple(train_variant(variant, steps, folder) for variant in ("mac", "transformer"))
    model = TitansForCausalLM.from_pretrained(folder / "mac").eval()
    _, held_out = hold_out(load_corpus(CORPUS))
    play, other = held_out[-1], held_out[0]
    first, second = halves(play)

    say(f"\nTest of memory: {play.name}, second half ({len(second):,} bytes)")
    pasts = {
        "its own first half": first,
        "that half, lines shuffled": shuffled_lines(first, seed=0),
        f"first half of {other.name}": halves(other)[0],
        "nothing": b"",
    }
    found = recollect(model, pasts, second, Ticker("bytes of each arm", 5))
    for arm, bits in zip(found.arms, found.bits_per_byte, strict=True):
        say(f"  {bits:.4f} bits/byte after {arm}")
    verdict = verdict_on(found)
    say(f"  {verdict}")

    passage = second[: second.index(b"\n", PASSAGE_LENGTH)]
    session = Session(model, byte_tokenizer())
    session.feed(second[-8192:])
    torch.manual_seed(0)
    sample = session.generate(max_new_tokens=SAMPLE_LENGTH, do_sample=True, temperature=TEMPERATURE)
    assert isinstance(sample, str)
    hidden = ask_in_books()
    minutes = (time.perf_counter() - began) / 60
    return DemoResult(
        setting=f"Two models of the tiny preset, trained on {steps * BATCH_SIZE * SEQUENCE_LENGTH:,} bytes "
        f"of Shakespeare, {len(held_out)} plays held out whole.",
        machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, {minutes:.1f} minutes; command: titans demo --small",
        models=models,
        training_note=f"Held out: {', '.join(d.name for d in held_out)}, in windows of {SEQUENCE_LENGTH} "
        "bytes, each with an empty memory. Both models read the same plays in the same order. They "
        "agree in width, depth and number of parameters: the transformer's feed-forward layers are widened "
        "by what the memory takes.",
        recollection=found,
        recollection_note=f"Bits per byte on the second half of {play.name} (held out). Before it, each arm "
        "read something else into its memory; then attention and convolutions were emptied, so only the "
        "memory could carry anything over. Every arm goes on learning while it reads.",
        verdict=verdict,
        passage=passage,
        surprise=surprise_of(model, first[-8192:], passage),
        sample=sample,
        temperature=TEMPERATURE,
        hidden=hidden,
        hidden_note=f"Asked of {REMEMBERING}, which comes with the library and never read these books; its "
        "card says how often it is right.",
    )


def ask_in_books() -> HiddenFact:
    """State a fact to a trained model, have it read a million bytes of books, and ask on the way."""
    model, tokenizer = load(REMEMBERING)
    text = b"\n".join(document.data for document in load_corpus(BOOKS))
    say(f"\nA fact, then {DISTANCES[-1]:,} bytes of the {BOOKS}, read by {REMEMBERING}")
    tick = Ticker("bytes", 5)
    hidden = hide_and_ask(model, tokenizer, text, DISTANCES, progress=lambda read: tick(read, DISTANCES[-1]))
    say(f"  stated:   {hidden.statement}")
    say(f"  asked:    {hidden.question}")
    for reply in hidden.replies:
        verdict = "right" if hidden.is_right(reply) else f"wrong: {hidden.answer}"
        say(f"  after {reply.num_bytes:>9,} bytes: {reply.answer.strip()} ({verdict})")
    say(f"  in {hidden.seconds:.0f} s, with {hidden.state_bytes:,} bytes of state")
    return hidden


def verdict_on(found: Recollection) -> str:
    """What the four numbers say, in words, whichever way they fell."""
    own, shuffled, other, nothing = found.bits_per_byte
    gain = nothing - own
    parts = [
        f"Having read its own first half {'saves' if gain > 0 else 'costs'} {abs(gain):.4f} bits per byte "
        "against having read nothing",
        f"{'better' if own < other else 'worse'} than another play's by {abs(other - own):.4f}",
        f"{'better' if own < shuffled else 'worse'} than its lines shuffled by {abs(shuffled - own):.4f}",
    ]
    return "; ".join(parts) + ". One play, one seed: a demonstration, not a measurement."


def show(steps: int, folder: Path) -> None:
    """Run the demo with so many training steps of each model, and write FOLDER/report.html and its numbers.

    Raises:
        ValueError, OSError: if the corpus cannot be loaded or the folder cannot be written.
    """
    for variant in ("mac", "transformer"):
        shutil.rmtree(folder / variant, ignore_errors=True)
    result = run_demo(steps, folder)
    report = folder / "report.html"
    write_report(result, report)
    numbers = {
        "models": [asdict(m) for m in result.models],
        "recollection": dict(zip(result.recollection.arms, result.recollection.bits_per_byte, strict=True)),
        "machine": result.machine,
    }
    (folder / "demo.json").write_text(json.dumps(numbers, indent=1))
    say("\nmodel              parameters  held-out bits/byte")
    for model in result.models:
        say(f"{model.name:18} {model.num_parameters:10,}  {model.bits_per_byte:.3f}")
    say(f"\nA sample:\n{result.sample}\n\nThe page: {report} ({result.machine})")
