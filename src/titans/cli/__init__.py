"""The command `titans`: which file answers which command, and what an error looks like."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from titans.cli.errors import UsageError
from titans.cli.terminal import any_letter_is_shown, report
from titans.cli.threads import Watch, choose_threads

_COMMANDS = {
    "train": ("titans.cli.train", "Train"),
    "graft": ("titans.cli.graft", "Graft"),
    "generate": ("titans.cli.generate", "Generate"),
    "chat": ("titans.cli.chat", "Chat"),
    "serve": ("titans.cli.serve", "Serve"),
    "memorize": ("titans.cli.memorize", "Memorize"),
    "inspect": ("titans.cli.inspect", "Inspect"),
    "eval perplexity": ("titans.cli.perplexity", "EvalPerplexity"),
    "eval needle": ("titans.cli.needle", "EvalNeedle"),
    "info": ("titans.cli.info", "Info"),
    "bench": ("titans.cli.bench", "Bench"),
    "demo": ("titans.cli.demo", "Demo"),
}
_SUITES = [name.removeprefix("eval ") for name in _COMMANDS if name.startswith("eval ")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 called wrongly, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        from titans import __version__

        print(f"titans {__version__}")
        return 0
    try:
        others = Watch()
        command = _parse(arguments)
        if choice := choose_threads(others, getattr(command, "threads", None)):
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


def _parse(arguments: list[str]) -> Any:
    import tyro

    arguments = _with_checkpoint_first(arguments)
    if arguments[:1] == ["eval"] and (len(arguments) == 1 or arguments[1].startswith("-")):
        return tyro.extras.subcommand_cli_from_dict(
            {suite: _command(f"eval {suite}") for suite in _SUITES},
            args=arguments[1:],
            prog="titans eval",
            description=_measure.__doc__,
        )
    words = 2 if arguments[:1] == ["eval"] else 1
    name, options = " ".join(arguments[:words]), arguments[words:]
    if name in _COMMANDS:
        from titans.cli.train import defaults_of

        return tyro.cli(
            _command(name),
            args=options,
            prog=f"titans {name}",
            default=defaults_of(options) if name == "train" else None,
        )
    if words == 2:
        raise UsageError(f"eval {arguments[1]}: choose one of {', '.join(_SUITES)}")
    commands = {name: _command(name) for name in _COMMANDS if " " not in name}
    return tyro.extras.subcommand_cli_from_dict(
        {**commands, "eval": _measure},
        args=arguments,
        prog="titans",
        description="Sequence models whose long-term memory learns while it reads.",
    )


def _measure() -> None:
    """Measure a model: how well it predicts, and what it remembers."""


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
    module, cls = _COMMANDS[name]
    return getattr(import_module(module), cls)
