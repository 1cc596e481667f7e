"""Names for objectives and rules: made from a name and described by it, whoever registered them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from titans.memory import OBJECTIVES, Huber, SquaredError
from titans.memory.registry import Registry


class Bare:
    """Neither a dataclass nor with parameters."""


@dataclass(frozen=True)
class Scaled:
    scale: float = 1.0


def test_what_is_made_is_described_by_what_made_it():
    parts: Registry[object] = Registry("part", bare=Bare, scaled=Scaled)
    parts["object"] = SquaredError()
    assert isinstance(parts.make("bare"), Bare) and parts.make("object") is parts["object"]
    for given in ({"name": "bare"}, {"name": "object"}, {"name": "scaled", "scale": 2.0}):
        assert parts.describe(parts.make(given)) == given
    assert OBJECTIVES.make({"name": "huber", "delta": 0.5}) == Huber(0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hubert", r"objective='hubert': choose one of \['adaptive_huber', .*'huber', .*\]"),
        ({"name": "huber", "size": 1}, r"objective 'huber' has no parameter 'size': choose from \['delta'\]"),
        ({"name": "huber", "delta": 0}, "delta=0: give a finite number above 0"),
        ({"name": "huber", "delta": "a"}, "objective 'huber': delta='a' is of type str: give float"),
        (3, "objective=3: give one of .*, a dict .*, or an object with value, gradient, curvature"),
        (
            {"delta": 2},
            r"objective=\{'delta': 2\} has no name: give 'name' too .*memory\.objective\.name",
        ),
        ({"name": ["huber"]}, r"objective=\['huber'\]: choose one of"),
        (Huber, r"objective=<class .*Huber'> is a class: give Huber\(\), or its registered name"),
    ],
)
def test_what_is_not_there_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        OBJECTIVES.make(given)


def test_only_what_is_registered_has_a_description():
    with pytest.raises(ValueError, match="is not registered: give its class a name"):
        OBJECTIVES.describe(Scaled())
