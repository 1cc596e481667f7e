"""`titans bench`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from titans.cli.errors import UsageError
from titans.cli.terminal import report
from titans.cli.train import FIELDS
from titans.zoo.checkpoint import load_titans

if TYPE_CHECKING:
    import torch

    from titans.evaluate.throughput import Throughput
    from titans.hf import TitansForCausalLM


@dataclass(frozen=True)
class Bench:
    """Speed of decoding, reading and training with a model, and the rate of the machine's matrix products.

    Example: titans bench --preset small --variant mag --config chunk_size=64 --batch-size 4

    Of a checkpoint, or of a configuration with random weights; on random tokens. Decoding is one token at a
    time; reading is what `titans memorize` does; training is forward and backward.
    """

    checkpoint: tyro.conf.Positional[Path | None] = None
    """Folder of a model, as `titans train` leaves it, or the name of one that comes with the library."""
    preset: str | None = None
    """Without a checkpoint, the size of the model: tiny (the default), small, 170m, 340m, 760m, 1.3b."""
    variant: str | None = None
    """mac (the default), mag, mal, lmm, or without a memory transformer, or window."""
    config: Annotated[dict[str, Any], FIELDS] = field(default_factory=dict)
    """Fields of TitansConfig that differ from the preset, such as chunk_size=32 hidden_size=192."""
    batch_size: int = 16
    """Rows side by side."""
    sequence_length: int = 256
    """Tokens of each in a training step, and in a stretch that is read."""
    threads: int | None = None
    """CPU threads; by default PyTorch's choice."""
    seconds: float = 2.0
    """About how long each measurement takes; it is made three times at least."""
    device: str | None = None
    """cpu or cuda; by default cuda where there is one."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Measure, reporting to stderr."""
        self._check()
        import torch

        device = self._device()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model: Any = self._model()
        model.to(device)
        from titans.evaluate.throughput import throughput

        found = throughput(
            model,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            seconds=self.seconds,
            progress=lambda what: report(f"measuring: {what}"),
        )
        about = {
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "variant": model.config.variant,
            "parameters": model.num_parameters(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
        }
        _show(about, found)
        if self.json:
            print(json.dumps({**about, **asdict(found)}))
        return 0

    def _check(self) -> None:
        if self.checkpoint is not None:
            for name in ("preset", "variant", "config"):
                if value := getattr(self, name):
                    raise UsageError(
                        f"{name}={value!r} with checkpoint={str(self.checkpoint)!r}: a checkpoint has its "
                        "own; leave one of them out"
                    )
        if "variant" in self.config:
            raise UsageError("config sets variant, which is an option of its own: give --variant instead")
        for name, least in dict(batch_size=1, sequence_length=2, threads=1).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name}={value}: give a whole number of at least {least}")
        if not 0 < self.seconds < float("inf"):
            raise UsageError(f"seconds={self.seconds}: give a number above 0")

    def _device(self) -> torch.device:
        import torch

        count = torch.cuda.device_count()
        if self.device is None:
            return torch.device("cuda" if count else "cpu")
        known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
        if self.device not in known:
            raise UsageError(f"device={self.device!r}: choose one of {', '.join(known)}")
        return torch.device(self.device)

    def _model(self) -> TitansForCausalLM:
        if self.checkpoint is not None:
            return load_titans(self.checkpoint)[0]
        from huggingface_hub.errors import StrictDataclassError

        from titans.hf import TitansConfig, TitansForCausalLM

        try:
            config = TitansConfig.from_preset(
                self.preset or "tiny", variant=self.variant or "mac", **self.config
            )
        except (ValueError, StrictDataclassError) as error:
            raise UsageError(str(error)) from None
        return TitansForCausalLM(config)


def _show(about: dict[str, Any], found: Throughput) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shape = f"{about['batch_size']} × {about['sequence_length']} tokens"
    machine = f"{about['threads']} thread(s)" if about["device"] == "cpu" else about["device"]
    table = Table(
        title=f"{about['variant']}, {about['parameters']:,} parameters; {shape}; {machine}",
        caption="ms: of one token of every row, a stretch, a step. Roofline: "
        f"{found.roofline / 1e9:,.1f} GFLOP/s, the fastest float32 product of two square matrices. State of "
        f"one row after {found.state_tokens:,} tokens: {found.state_bytes:,} bytes",
        box=box.SIMPLE,
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    table.add_column()
    for column in ("tokens/s", "ms", "MFLOP/token", "GFLOP/s", "of roofline", "peak memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in ("decoding", "reading", "training"):
        rate = getattr(found, name)
        table.add_row(
            name,
            f"{rate.tokens_per_second:,.0f}",
            f"{rate.milliseconds:,.2f}",
            f"{rate.operations_per_token / 1e6:,.2f}",
            f"{rate.tokens_per_second * rate.operations_per_token / 1e9:,.1f}",
            f"{rate.roofline_percent:.1f} %",
            "–" if rate.peak_bytes is None else f"{rate.peak_bytes / 1e6:,.0f} MB",
        )
    Console(stderr=True).print(table)
