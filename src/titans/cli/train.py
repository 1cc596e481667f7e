"""`titans train`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from titans.cli.errors import UsageError
from titans.train.settings import TrainSettings, check_type, field_types


def _parse_field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"{text!r} is not of the form field=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


FIELDS: tyro.constructors.PrimitiveConstructorSpec[dict[str, Any]] = (
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="FIELD=VALUE",
        instance_from_str=lambda texts: dict(map(_parse_field, texts)),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda fields: [f"{name}={json.dumps(value)}" for name, value in fields.items()],
    )
)


@dataclass(frozen=True)
class Train(TrainSettings):
    """Train a model.

    Example: titans train --data excerpt --output runs/tempest --variant mac --steps 300

    The output folder holds the model (for `titans generate`), its checkpoints, metrics.jsonl and curves.png.
    Ctrl-C finishes the step and writes a checkpoint; --resume goes on from the last one as if nothing had
    happened.
    """

    config: Annotated[dict[str, Any], FIELDS] = field(default_factory=dict)
    """Fields of TitansConfig that differ from the preset, such as chunk_size=32 hidden_size=192."""
    config_file: Path | None = None
    """YAML file with any of these settings; options on the command line win."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Train, reporting to stderr."""
        settings = TrainSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TrainSettings)})
        try:
            settings.check()
        except ValueError as error:
            raise UsageError(str(error)) from None
        from titans.train.progress import ProgressLine
        from titans.train.recipe import TrainingRun, check

        try:
            check(settings)
        except ValueError as error:
            raise UsageError(str(error)) from None
        run = TrainingRun(settings)
        print(run.summary(), file=sys.stderr)
        with ProgressLine(settings.steps, bytes_are_tokens=settings.tokenizer == "bytes") as progress:
            result = run.run(progress)
        held_out = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.3f} bits/byte held out; "
        print(f"done: {held_out}{result.output} holds the model", file=sys.stderr)
        if self.json:
            print(json.dumps({**dataclasses.asdict(result), "output": str(result.output)}))
        return 0


def defaults_from_config_file(arguments: list[str]) -> Train | None:
    """The defaults that a --config-file among the arguments asks for, or None without one.

    Raises:
        UsageError: if it cannot be read, or names something that is no setting.
    """
    path = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if name in ("--config-file", "--config_file"):
            path = Path(value if equals else following)
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"config_file={str(path)!r} cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise UsageError(f"config_file={str(path)!r} holds no settings: write lines such as `steps: 300`")
    types = field_types()
    for name, value in values.items():
        if name not in types:
            raise UsageError(f"config_file={str(path)!r} sets {name!r}: choose from {', '.join(types)}")
        try:
            values[name] = _from_yaml(value, types[name])
            check_type(name, values[name])
        except ValueError as error:
            raise UsageError(f"config_file={str(path)!r}: {error}") from None
    return Train(**{"data": tyro.MISSING, **values})


def _from_yaml(value: Any, types: tuple[type, ...]) -> Any:
    """YAML has no paths and no tuples, and takes 1e-4 for text."""
    if isinstance(value, list) and tuple in types:
        return tuple(value)
    if isinstance(value, str) and Path in types:
        return Path(value)
    if isinstance(value, str) and float in types:
        return float(value)
    return value
