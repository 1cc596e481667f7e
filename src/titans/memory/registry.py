"""Names for the exchangeable parts of the inner problem, so that configurations and files can state them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any, Generic, TypeVar

Part = TypeVar("Part")


class Registry(dict[str, Any], Generic[Part]):
    """Name → class of one kind of part, such as objectives. A class is a frozen dataclass of plain numbers.

    To add one, also from outside the package: `OBJECTIVES["mine"] = Mine`. A part without parameters may be
    registered as an object too.

    Args:
        argument: what the part is called in an error.
        methods: what every object of the kind has.
    """

    def __init__(self, argument: str, methods: Sequence[str] = (), /, **classes: type[Part]) -> None:
        super().__init__(classes)
        self.argument, self.methods = argument, methods

    def make(self, given: Part | str | Mapping[str, Any]) -> Part:
        """The part that is meant: an object itself, a name, or {"name": …, parameter: …}.

        Raises:
            ValueError: for an unknown name or parameter, or a value that the class refuses.
        """
        if isinstance(given, str):
            given = {"name": given}
        if isinstance(given, type):
            raise ValueError(
                f"{self.argument}={given!r} is a class: give {given.__name__}(), or its registered name"
            )
        if not isinstance(given, Mapping):
            if not all(callable(getattr(given, method, None)) for method in self.methods):
                raise ValueError(
                    f"{self.argument}={given!r}: give one of {sorted(self)}, a dict with a name and "
                    f"parameters, or an object with {', '.join(self.methods)}"
                )
            return given
        parameters = dict(given)
        if "name" not in parameters:
            raise ValueError(
                f"{self.argument}={parameters!r} has no name: give 'name' too (in a configuration "
                f"memory.{self.argument}.name), one of {sorted(self)}"
            )
        name = parameters.pop("name")
        if not isinstance(name, str) or name not in self:
            raise ValueError(
                f"{self.argument}={name!r}: choose one of {sorted(self)}, or first import the "
                "file that registers it"
            )
        made = self[name]
        own = _fields(made)
        known = [field.name for field in own]
        if unknown := sorted(parameters.keys() - {*known}):
            raise ValueError(
                f"{self.argument} {name!r} has no parameter {unknown[0]!r}: choose from {known or 'none'}"
            )
        for field in own:
            if field.name in parameters:
                _check_type(f"{self.argument} {name!r}: {field.name}", parameters[field.name], field.type)
        return made(**parameters) if isinstance(made, type) else made

    def describe(self, part: Part) -> dict[str, Any]:
        """{"name": …, parameter: …} of a registered part, what `make` takes and JSON can hold.

        Raises:
            ValueError: for a part of a class that is not registered.
        """
        for name, known in self.items():
            if known is part:
                return {"name": name}
            if known is type(part):
                # Of the object, not of its class, which a compiled graph cannot take.
                own = fields(part) if is_dataclass(part) else ()  # type: ignore[arg-type]
                return {"name": name, **{field.name: getattr(part, field.name) for field in own}}
        raise ValueError(
            f"{self.argument}={part!r} is not registered: give its class a name in the registry first"
        )


def _fields(registered: Any) -> tuple[Field[Any], ...]:
    """The parameters of a registered class; none of an object, nor of a class that is no dataclass."""
    takes = isinstance(registered, type) and is_dataclass(registered)
    return fields(registered) if takes else ()


_KINDS = {"bool": (bool,), "int": (int,), "float": (int, float)}


def _check_type(name: str, value: Any, annotated: Any) -> None:
    """ValueError for a value that is not of the plain type a field is annotated with."""
    annotation = annotated if isinstance(annotated, str) else getattr(annotated, "__name__", "")
    kind, _, none = annotation.partition(" | ")
    if kind not in _KINDS or (value is None and none == "None"):
        return
    if type(value) not in _KINDS[kind]:
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}: give {annotation}")
