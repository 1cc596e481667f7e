"""`titans train`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from titans.cli.errors import UsageError
from titans.cli.outputs import check_run_folder
from titans.cli.terminal import report
from titans.train.settings import (
    SETTINGS_FILE,
    FactSettings,
    TrainSettings,
    check_type,
    current_form,
    dotted,
    field_types,
    of_a_run,
)

if TYPE_CHECKING:
    from titans.train import TrainResult


def _parse_field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"{text!r} is not of the form field=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _parse_fields(texts: list[str]) -> dict[str, Any]:
    """Fields by name; those of a configuration inside are given as memory.form=recall."""
    fields: dict[str, Any] = {}
    for path, value in map(_parse_field, texts):
        *outer, last = path.split(".")
        place = fields
        for name in outer:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ValueError(f"{path}: {name} is given as a whole, too; give {name}.name for a name")
        if isinstance(place.get(last), dict):
            raise ValueError(f"{path}: {last} is given in parts, too; give {path}.name for a name")
        place[last] = value
    return fields


FIELDS: tyro.constructors.PrimitiveConstructorSpec[dict[str, Any]] = (
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="FIELD=VALUE",
        instance_from_str=_parse_fields,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda fields: [f"{name}={json.dumps(value)}" for name, value in fields.items()],
    )
)


CORPORA: tyro.constructors.PrimitiveConstructorSpec[str | tuple[str, ...]] = (
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="CORPUS[=WEIGHT]",
        instance_from_str=lambda texts: texts[0] if len(texts) == 1 else tuple(texts),
        is_instance=lambda value: isinstance(value, str | tuple),
        str_from_instance=lambda data: [data] if isinstance(data, str) else list(data),
    )
)


@dataclass(frozen=True)
class Train(TrainSettings):
    """Train a model.

    Example: titans train --data excerpt --output runs/tempest --variant mac --steps 300

    The output folder holds the model (for `titans generate`), its checkpoints, metrics.jsonl and curves.png.
    Ctrl-C finishes the step and writes a checkpoint; --resume goes on from the last one as if nothing had
    happened, with the options of then where no others are given.
    """

    data: Annotated[str | tuple[str, ...], CORPORA]
    """Corpus: a text file, a folder of them, hf:NAME, or a built-in name: excerpt, shakespeare, bible.
    Several are mixed, with weights as in books=0.3; these and hf:NAME are streamed."""
    config: Annotated[dict[str, Any], FIELDS] = field(default_factory=dict)
    """Fields of TitansConfig that differ from the preset, such as chunk_size=32 memory.form=recall."""
    config_file: Path | None = None
    """YAML file with any of these settings; options on the command line win."""
    dry_run: bool = False
    """Print what the run needs, and stop: parameters, memory of a device, operations per token, hours."""
    devices: int = 1
    """For --dry-run: how many, one process each."""
    rate: float | None = None
    """For --dry-run: tokens per second that one device trains with."""
    flops: float | None = None
    """For --dry-run, in place of --rate: operations per second that one device reaches in training."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Train, reporting to stderr."""
        settings = TrainSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TrainSettings)})
        try:
            settings.check()
        except ValueError as error:
            raise UsageError(str(error)) from None
        if self.dry_run:
            return self._plan(settings)
        from titans.train.processes import join

        processes = join()
        with processes.end_together():
            check_run_folder("output", settings.output)
            result = self._train(settings, prints=processes.is_first)
        if self.json and processes.is_first:
            print(json.dumps({**dataclasses.asdict(result), "output": str(result.output)}))
        return 0

    def _plan(self, settings: TrainSettings) -> int:
        from titans.train.plan import plan

        try:
            found = plan(settings, self.devices, self.rate, self.flops)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if self.json:
            print(json.dumps(dataclasses.asdict(found)))
        else:
            report(str(found))
        return 0

    def _train(self, settings: TrainSettings, prints: bool) -> TrainResult:
        from titans.cli.progress import Tokenising
        from titans.train.progress import ProgressLine
        from titans.train.recipe import TrainingRun, check

        try:
            check(settings)
        except ValueError as error:
            raise UsageError(str(error)) from None
        with Tokenising() as tokenising:  # in whichever process makes the cache
            run = TrainingRun(settings, tokenising)
        if not prints:
            return run.run()
        report(run.summary())
        with ProgressLine(settings.steps, bytes_are_tokens=settings.tokenizer == "bytes") as progress:
            result = run.run(progress)
        held_out = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.3f} bits/byte held out; "
        report(f"done: {held_out}{result.output} holds the model")
        return result


def defaults_of(arguments: list[str]) -> Train | None:
    """What options begin from: with --resume the settings of the run, and over them those of a --config-file.

    Raises:
        UsageError: if either cannot be read, or names something that is no setting.
    """
    values = {}
    if (path := _option(arguments, "--config-file")) is not None:
        values = _from_config_file(Path(path))
    if "--resume" in arguments:
        folder = _option(arguments, "--output") or values.get("output", TrainSettings.output)
        values = _of_the_run(Path(folder)) | values
    if not values:
        return None
    facts = {name.removeprefix("facts."): values.pop(name) for name in [*values] if name.startswith("facts.")}
    defaults: dict[str, Any] = {"data": tyro.MISSING, **values, "facts": FactSettings(**facts)}
    return Train(**defaults)


def _option(arguments: list[str], option: str) -> str | None:
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option:
            return value if equals else following
    return None


def _of_the_run(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        # The folder may have been moved.
        values = {name: value for name, value in values.items() if name not in ("output", "resume")}
    except (OSError, ValueError, AttributeError):
        raise UsageError(f"{file} is damaged: copy that of the newest checkpoint over it") from None
    try:
        values = of_a_run(values)
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from None
    return _checked(values, str(file))


def _from_config_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"config_file={str(path)!r} cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise UsageError(f"config_file={str(path)!r} holds no settings: write lines such as `steps: 300`")
    source = f"config_file={str(path)!r}"
    try:
        # Also names of before, when facts were settings among all others.
        values = current_form(values)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None
    return _checked(values, source)


def _checked(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The settings by name as `dotted` has them, each of its type."""
    if not isinstance(values.get("facts", {}), dict):
        raise UsageError(f"{source}: facts={values['facts']!r} holds no settings: give such as spacing: 400")
    types, values = field_types(), dotted(values)
    for name, value in values.items():
        if name not in types:
            raise UsageError(f"{source} sets {name!r}: choose from {', '.join(types)}")
        try:
            values[name] = _from_yaml(value, types[name])
            check_type(name, values[name])
        except ValueError as error:
            raise UsageError(f"{source}: {error}") from None
    return values


def _from_yaml(value: Any, types: tuple[type, ...]) -> Any:
    """YAML has no paths and no tuples, and takes 1e-4 for text; JSON neither."""
    if isinstance(value, list) and tuple in types:
        return tuple(value)
    if isinstance(value, str) and Path in types:
        return Path(value)
    if isinstance(value, str) and float in types:
        return float(value)
    return value
