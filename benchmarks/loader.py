"""How fast training loads its examples, compared with how fast it reads them.

    python benchmarks/loader.py
    python benchmarks/loader.py --steps 50 --json found.json

Tokens per second of processor time, on one thread, of the data loader of `titans train` for each kind of
corpus, and of the forward and backward pass of the smallest preset, which needs the most examples. Steps do
not wait for data as long as the first figure is well above the second. The text is The Tempest, copied into
files; the tokenizer is a BPE with 4,096 ids that is trained on it. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from titans.data import load_corpus, load_tokenizer
from titans.train import TrainSettings
from titans.train.examples import make_examples
from titans.train.model import make_model, model_config

COPIES, SHARDS, IDS = 20, 4, 4096


def write_corpora(folder: Path) -> dict[str, tuple[Any, str]]:
    """Label → (data, tokenizer) of settings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [document.data.decode() for document in load_corpus("excerpt")] * COPIES
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:03}.txt").write_text(text)
    (folder / "rows").mkdir()
    for shard in range(SHARDS):
        # Rows as long as those of web text.
        rows = [
            text[begin : begin + 4000] for text in texts[shard::SHARDS] for begin in range(0, len(text), 4000)
        ]
        lines = [json.dumps({"text": row}) for row in rows]
        (folder / "rows" / f"{shard}.jsonl").write_text("\n".join(lines))
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(texts[:5], trainers.BpeTrainer(vocab_size=IDS, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "bpe")
    bpe, local, streamed = str(folder / "bpe"), str(folder / "texts"), f"hf:{folder / 'rows'}"
    return {
        "folder, bytes": (local, "bytes"),
        "folder, BPE, from the cache of tokens": (local, bpe),
        "data set streamed, bytes": (streamed, "bytes"),
        "data set streamed, BPE": (streamed, bpe),
        "data set and folder mixed, BPE": ((f"{streamed}=0.7", f"{local}=0.3"), bpe),
    }


def tokens_per_second(work: Callable[[], int]) -> float:
    """Of this process's processor time."""
    begin = time.process_time()
    return work() / (time.process_time() - begin)


@contextmanager
def tokens_cached_in(folder: Path) -> Iterator[None]:
    """Compiled kernels, which lie in the same cache, stay where they are."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def loading(settings: TrainSettings) -> tuple[float, list[dict[str, torch.Tensor]]]:
    """(tokens per second, some batches)"""
    with tokens_cached_in(Path(settings.output)):
        examples = make_examples(settings, load_tokenizer(settings.tokenizer))
    batches = iter(DataLoader(examples.train, settings.batch_size, collate_fn=default_collate))
    first = [next(batches) for _ in range(2)]
    rate = tokens_per_second(lambda: sum(int(batch["attention_mask"].sum()) for batch in batches))
    return rate, first


def step(settings: TrainSettings, batches: list[dict[str, torch.Tensor]], steps: int) -> float:
    """Tokens per second of forward and backward pass."""
    model = make_model(settings, model_config(settings, len(load_tokenizer(settings.tokenizer))))

    def run(count: int) -> int:
        tokens = 0
        for number in range(count):
            batch = batches[number % len(batches)]
            given = {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}
            model(**given, use_cache=False).loss.backward()
            tokens += int(batch["attention_mask"].sum())
        return tokens

    run(1)  # kernels are chosen, and compiled where they are not yet
    return tokens_per_second(lambda: run(steps))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="batches to load")
    parser.add_argument("--trained", type=int, default=4, help="steps to train")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    print(
        f"{platform.machine()}, torch {torch.__version__}, 1 thread; 16 rows of 256 tokens; tokens per "
        "second of processor time\n"
    )
    print("| data | loader | times the step |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for label, (data, tokenizer) in write_corpora(Path(name)).items():
            settings = TrainSettings(
                data=data, tokenizer=tokenizer, steps=options.steps + 2, hold_out=0.0, output=Path(name)
            )
            rate, batches = loading(settings)
            if not found:
                # Of bytes, the smallest and fastest model.
                found["step"] = step(settings, batches, options.trained)
                print(f"| (step of the tiny preset) | {found['step']:,.0f} | 1 |", flush=True)
            found[label] = rate
            print(f"| {label} | {rate:,.0f} | {rate / found['step']:,.0f} |", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
