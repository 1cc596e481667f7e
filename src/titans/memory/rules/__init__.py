"""Update rules: how a gradient moves the weights, summed over a chunk, and what happens at a chunk's end.

`rule.py` says what a rule is. To add one, write a file with a class derived from `MomentumRule`, and give it
a name below.
"""

from titans.memory.registry import Registry
from titans.memory.rules.coefficients import ChunkCoefficients, EndCoefficients
from titans.memory.rules.long_chunks import end_coefficients
from titans.memory.rules.memora import Memora
from titans.memory.rules.momentum import MomentumRule
from titans.memory.rules.moneta import Moneta
from titans.memory.rules.omega import Atlas, Omega
from titans.memory.rules.orthogonal import LaCT
from titans.memory.rules.rule import UpdateRule, ended

UPDATE_RULES: Registry[UpdateRule] = Registry(
    "rule",
    ("step", "coefficients", "end"),
    momentum=MomentumRule,
    moneta=Moneta,
    memora=Memora,
    omega=Omega,
    atlas=Atlas,
    lact=LaCT,
)

__all__ = [
    "UPDATE_RULES",
    "Atlas",
    "ChunkCoefficients",
    "EndCoefficients",
    "LaCT",
    "Memora",
    "MomentumRule",
    "Moneta",
    "Omega",
    "UpdateRule",
    "end_coefficients",
    "ended",
]
