"""The command: `python -m titans.experiments NAME`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from titans.experiments.catalog import EXPERIMENTS
from titans.experiments.runner import Request, run, say
from titans.train import Interrupted


def part(text: str) -> tuple[int, int]:
    """K/N as two numbers."""
    k, separator, n = text.partition("/")
    if not (separator and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise argparse.ArgumentTypeError(f"{text!r}: give K/N with K from 0 to N - 1, such as 0/2")
    return int(k), int(n)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


def model(text: str) -> tuple[str, str]:
    """LABEL=FOLDER, or a name or folder alone: its label and where it is."""
    label, separator, place = text.partition("=")
    return (label, place) if separator else (Path(text).name, text)


def parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:16} {experiment.title}" for name, experiment in EXPERIMENTS.items())
    found = argparse.ArgumentParser(
        prog="python -m titans.experiments",
        description="Measure what is missing of an experiment, and draw its table.",
        epilog=f"experiments:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("name", choices=list(EXPERIMENTS), metavar="NAME")
    found.add_argument(
        "--budget", default="full", choices=["quick", "full"], help="quick: see in minutes that it runs"
    )
    found.add_argument("--seeds", type=positive, help="how many seeds, from 0 on")
    found.add_argument("--resume", action="store_true", help="go on with the results in --output")
    found.add_argument("--output", type=Path, help="folder of table, JSON and pictures (default runs/NAME)")
    found.add_argument(
        "--models", nargs="+", type=model, metavar="LABEL=FOLDER", help="names or folders of trained models"
    )
    found.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cells by name, with *")
    found.add_argument("--part", type=part, default=(0, 1), metavar="K/N", help="every N-th cell from K on")
    found.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    found.add_argument("--threads", type=positive, default=1, help="CPU threads (default 1)")
    return found


def main() -> int:
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    request = Request(
        arguments.budget,
        arguments.seeds,
        dict(arguments.models) if arguments.models else None,
        arguments.device,
        Path("runs") / arguments.name,
    )
    output = arguments.output or request.work
    try:
        page = run(
            EXPERIMENTS[arguments.name],
            request,
            output,
            resume=arguments.resume,
            only=arguments.only,
            part=arguments.part,
        )
    except (KeyboardInterrupt, Interrupted):
        say("titans: interrupted; finished cells are kept: the same command with --resume goes on")
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        say(f"titans: {error}")
        return 1
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
