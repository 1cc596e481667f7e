"""The command `titans`: which file answers which command, and what an error looks like."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from titans.cli.errors import UsageError
from titans.cli.launched import is_follower, one_process_explains, quieten_torch
from titans.cli.terminal import any_letter_is_shown, report
from titans.cli.threads import Watch, choose_threads

# What answers each command, and what `titans --help` says of it, which loads none of them.
_COMMANDS = {
    "train": ("titans.cli.train", "Train", "Train a model."),
    "graft": ("titans.cli.graft", "Graft", "Give a pretrained model a memory."),
    "generate": ("titans.cli.generate", "Generate", "Continue a prompt, or what a memory has read."),
    "chat": ("titans.cli.chat", "Chat", "Talk with a model, and have it read texts in between."),
    "serve": ("titans.cli.serve", "Serve", "Answer OpenAI's API over HTTP, with memories that clients name."),
    "memorize": ("titans.cli.memorize", "Memorize", "Read files into a memory, and save it."),
    "inspect": ("titans.cli.inspect", "Inspect", "Show where a memory helped, token by token."),
    "eval perplexity": ("titans.cli.perplexity", "EvalPerplexity", "Measure how well a model predicts."),
    "eval needle": ("titans.cli.needle", "EvalNeedle", "Measure what a model recalls from long texts."),
    "reproduce": ("titans.cli.reproduce", "Reproduce", "Test what the paper claims, table by table."),
    "info": ("titans.cli.info", "Info", "Say what a model, a graft or a memory file contains."),
    "bench": ("titans.cli.bench", "Bench", "Measure the speed of a model and of the machine."),
    "demo": ("titans.cli.demo", "Demo", "Have a pretrained model read a play with a memory and without."),
}
_SUITES = [name.removeprefix("eval ") for name in _COMMANDS if name.startswith("eval ")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 called wrongly, 130 interrupted."""
    status = _main(list(sys.argv[1:] if argv is None else argv))
    processes = sys.modules.get("titans.train.processes")
    return status if processes is None else processes.end(status)


def _main(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from titans import __version__

        print(f"titans {__version__}")
        return 0
    group, rest = ("eval", arguments[1:]) if arguments[:1] == ["eval"] else ("", arguments)
    if rest in ([], ["-h"], ["--help"]):
        (print if rest else report)(_overview(group))
        return 0 if rest else 2
    quieten_torch()
    try:
        others = Watch()
        with one_process_explains():
            command = _parse(arguments)
        choice = choose_threads(others, getattr(command, "threads", None))
        if choice and not is_follower():
            report(str(choice))
        with any_letter_is_shown():
            return int(command.run())
    except SystemExit as error:  # --help, or options that do not parse: already explained
        return error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt as error:
        return _complain(error, "interrupted", 130)
    except BrokenPipeError:  # whoever read the output has closed it: nothing is left to say, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "titans").partition(".")[0] == "titans":
            raise
        return _complain(
            ValueError(
                f"{error.name} is not installed: the command line needs pip install 'titans-ltm[train]'"
            ),
            "",
            1,
        )
    except UsageError as error:
        return _complain(error, "", 2)
    except (ValueError, OSError, ArithmeticError) as error:
        return _complain(error, type(error).__name__, 1)


def _complain(error: BaseException, otherwise: str, code: int) -> int:
    report(f"titans: {' '.join(str(error).split()) or otherwise}")
    return code


def _overview(group: str) -> str:
    """A line for each command; group: of this one's, such as eval, or of all where it is empty."""
    lines = [
        f"  {name:<17}{summary}" for name, (_, _, summary) in _COMMANDS.items() if name.startswith(group)
    ]
    usage = " ".join(word for word in ("titans", group, "COMMAND") if word)
    return "\n".join(
        (
            f"usage: {usage} ...",
            "",
            "Sequence models whose long-term memory learns while it reads.",
            "",
            *lines,
            "",
            f"{usage} --help describes a command and its options.",
        )
    )


def _parse(arguments: list[str]) -> Any:
    arguments = _with_checkpoint_first(arguments)
    words = 2 if arguments[:1] == ["eval"] else 1
    name, options = " ".join(arguments[:words]), arguments[words:]
    if name not in _COMMANDS:
        known = _SUITES if words == 2 else [name for name in _COMMANDS if " " not in name] + ["eval"]
        raise UsageError(f"{name}: choose one of {', '.join(known)}")
    import tyro

    from titans.cli.train import defaults_of

    return tyro.cli(
        _command(name),
        args=options,
        prog=f"titans {name}",
        default=defaults_of(options) if name == "train" else None,
    )


def _with_checkpoint_first(arguments: list[str]) -> list[str]:
    """`--checkpoint NAME`, wherever it stands, as the first thing that follows the command."""
    if "--checkpoint" not in arguments[:-1]:
        return arguments
    at = arguments.index("--checkpoint")
    rest = arguments[:at] + arguments[at + 2 :]
    words = 2 if rest[:1] == ["eval"] else 1
    return [*rest[:words], arguments[at + 1], *rest[words:]]


def _command(name: str) -> Any:
    # A command loads its own file alone.
    module, cls, _ = _COMMANDS[name]
    return getattr(import_module(module), cls)
