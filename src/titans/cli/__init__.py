"""The command `titans`: which file answers which command, and what an error looks like."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from titans.cli.errors import UsageError

_COMMANDS = {
    "train": "train:Train",
    "generate": "generate:Generate",
    "memorize": "memorize:Memorize",
    "eval": "evaluate:Eval",
    "info": "info:Info",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 called wrongly, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        from titans import __version__

        print(f"titans {__version__}")
        return 0
    try:
        return int(_parse(arguments).run())
    except SystemExit as error:  # --help, or options that do not parse: already explained
        return error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt as error:
        return _complain(error, "interrupted", 130)
    except UsageError as error:
        return _complain(error, "", 2)
    except (ValueError, OSError, ArithmeticError) as error:
        return _complain(error, type(error).__name__, 1)


def _complain(error: BaseException, otherwise: str, code: int) -> int:
    print(f"titans: {' '.join(str(error).split()) or otherwise}", file=sys.stderr)
    return code


def _parse(arguments: list[str]) -> Any:
    import tyro

    from titans.cli.train import from_config_file

    commands: list[Any] = []
    for name, place in _COMMANDS.items():
        module, _, cls = place.partition(":")
        if importlib.util.find_spec(f"titans.cli.{module}") is None:
            continue
        command = getattr(importlib.import_module(f"titans.cli.{module}"), cls)
        default = from_config_file(arguments) if arguments[:1] == ["train"] == [name] else None
        about = tyro.conf.subcommand(name) if default is None else tyro.conf.subcommand(name, default=default)
        commands.append(Annotated[command, about])
    return tyro.cli(
        functools.reduce(operator.or_, commands),
        args=arguments,
        prog="titans",
        description="Sequence models whose long-term memory learns while it reads.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
