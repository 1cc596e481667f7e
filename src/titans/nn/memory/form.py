"""The form of a memory: its fast network, what keeps its updates stable, and what its gates see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from titans.memory import OBJECTIVES, UPDATE_RULES, InnerProblem, MemoryNetwork
from titans.memory.network import ACTIVATIONS
from titans.memory.objectives import Objective
from titans.memory.rules import UpdateRule

# Options of an update rule that a form states for it.
RULE_FIELDS = ("normalize_step", "length_floor", "row_limit")


@dataclass(frozen=True)
class MemoryForm:
    """Options of a `NeuralMemory` that belong together; the defaults are those of "stable" in `FORMS`.

    Args:
        activation, residual, norm, gated: of the fast network, see `MemoryNetwork`.
        normalize_step: divide each step size by a bound on the curvature of the inner objective.
        length_floor: with `normalize_step`, lengths below it count as this.
        row_limit: rows of the fast weights that are longer at a chunk's end are shortened to it; None for no
            limit.
        decay_to_initial: the fast weights are offsets on the learned initial ones, so that forgetting decays
            towards these. Otherwise they start there and decay towards 0, as in equation 13.
        max_momentum: upper bound of the momentum gate, below 1.
        max_step_size: upper bound of the step-size gate; None for the default of `largest_step`.
        bounded_half_lives: no head ever forgets more slowly than at first, so that the first heads stay
            short-term memories.
        gates_see_keys: gates are functions of the token and of each head's key, which depends on the tokens
            before it. Otherwise of the token alone.
        forget_by_row: every row of the fast weights has a forget gate of its own, the head's plus a function
            of the token of low rank, 0 at first: the channel-wise gate of the camera-ready.
        gate_hidden_size: units of a hidden layer in the gates, 0 for none. A linear gate cannot express a
            conjunction such as "a digit, and 'is' before it".

    Raises:
        ValueError: for a value outside its domain.
    """

    activation: str = "silu"
    residual: bool = False
    norm: bool = False
    normalize_step: bool = True
    length_floor: float = 1.0
    row_limit: float | None = 8.0
    decay_to_initial: bool = True
    max_momentum: float = 0.5
    max_step_size: float | None = None
    bounded_half_lives: bool = False
    gates_see_keys: bool = False
    gate_hidden_size: int = 0
    forget_by_row: bool = False
    gated: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: choose one of {sorted(ACTIVATIONS)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and type(value) is not bool:
                raise ValueError(f"{field.name}={value!r}: give True or False")
        if not _is_number(self.length_floor):
            raise ValueError(f"length_floor={self.length_floor!r}: give a finite number of at least 0")
        if self.row_limit is not None and not (_is_number(self.row_limit) and self.row_limit > 0):
            raise ValueError(f"row_limit={self.row_limit!r}: give None or a finite number above 0")
        if not (_is_number(self.max_momentum) and self.max_momentum < 1):
            raise ValueError(f"max_momentum={self.max_momentum!r}: give a number in [0, 1)")
        if self.max_step_size is not None and not _is_number(self.max_step_size):
            raise ValueError(
                f"max_step_size={self.max_step_size!r}: give None or a finite number of at least 0"
            )
        if type(self.gate_hidden_size) is not int or self.gate_hidden_size < 0:
            raise ValueError(f"gate_hidden_size={self.gate_hidden_size!r}: give a whole number of at least 0")

    @classmethod
    def of(cls, given: MemoryForm | str | Mapping[str, Any]) -> MemoryForm:
        """A form itself, a name in `FORMS`, or {"name": …, field: …}: a named form ("stable" if no name is
        given) with some fields replaced.

        Raises:
            ValueError: for an unknown name or field, or a value outside its domain.
        """
        if isinstance(given, MemoryForm):
            return given
        if isinstance(given, str):
            given = {"name": given}
        if not isinstance(given, Mapping):
            raise ValueError(
                f"form={given!r}: give one of {sorted(FORMS)}, a dict of fields, or a MemoryForm"
            )
        changes: dict[str, Any] = dict(given)
        name = changes.pop("name", "stable")
        if not isinstance(name, str) or name not in FORMS:
            raise ValueError(f"form={name!r}: choose one of {sorted(FORMS)}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(changes.keys() - {*known}):
            raise ValueError(f"form has no field {unknown[0]!r}: choose from {known}")
        return replace(FORMS[name], **changes)

    def rule(self, given: UpdateRule | str | Mapping[str, Any] | None = None) -> UpdateRule:
        """The update rule of a memory in this form.

        Args:
            given: a rule itself, which is taken unchanged; a name in `UPDATE_RULES`, or {"name": …,
                parameter: …}, whose parameters in `RULE_FIELDS` are the form's unless given; None for
                "momentum".

        Raises:
            ValueError: for an unknown name or parameter, or a value outside its domain.
        """
        if given is None or isinstance(given, str):
            given = {"name": given or "momentum"}
        if isinstance(given, Mapping):
            known = UPDATE_RULES.get(str(given.get("name")))
            parameters = {field.name for field in fields(known)} if isinstance(known, type) else set()
            own = {name: getattr(self, name) for name in RULE_FIELDS if name in parameters}
            given = {**own, **given}
        return UPDATE_RULES.make(given)

    def inner(
        self,
        head_dim: int,
        depth: int,
        expansion: int,
        objective: Objective | str | Mapping[str, Any] = "squared_error",
        rule: UpdateRule | str | Mapping[str, Any] | None = None,
        key_dim: int | None = None,
    ) -> InnerProblem:
        """What one head learns in this form, and how; objective and rule as `OBJECTIVES.make` and `rule` take
        them, key_dim as `MemoryNetwork` does.
        """
        network = MemoryNetwork(
            head_dim,
            depth,
            expansion,
            self.activation,
            self.residual,
            self.norm,
            key_dim=key_dim,
            gated=self.gated,
        )
        made = self.rule(rule)
        if made.needs_first_weights and self.decay_to_initial:
            raise ValueError(
                f"rule={type(made).__name__} keeps the lengths of the first rows, and offsets begin at 0: "
                "give decay_to_initial=False in the form"
            )
        return InnerProblem(network, OBJECTIVES.make(objective), made)

    def largest_step(self, inner: InnerProblem, chunk_size: int) -> float:
        """The upper bound of the step-size gate: `max_step_size`, or min(depth, 2) (1 − max_momentum) /
        chunk_size.

        With the latter and normalised steps a chunk that repeats one token corrects its error at most once in
        each layer (docs/how/stability.md). Steps that are not normalised have no such bound at depth 2.
        """
        if self.max_step_size is not None:
            return self.max_step_size
        return min(inner.network.depth, 2) * (1 - self.max_momentum) / chunk_size


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


# stable: cannot blow up, whatever it reads (docs/how/stability.md).
# paper: equations 12 to 15 and the network of the camera-ready, with nothing added for stability; a gate of
#   momentum that reaches 1 would allow no step at all.
# recall: the models in the zoo (docs/how/recall.md); stronger writes, gates that see what to write.
FORMS: dict[str, MemoryForm] = {
    "stable": MemoryForm(),
    "paper": MemoryForm(
        activation="gelu",
        residual=True,
        norm=True,
        normalize_step=False,
        length_floor=0.0,
        row_limit=None,
        decay_to_initial=False,
        max_momentum=0.9,
    ),
    "recall": MemoryForm(
        max_step_size=0.25, bounded_half_lives=True, gates_see_keys=True, gate_hidden_size=64
    ),
}
