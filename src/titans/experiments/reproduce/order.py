"""In which order to measure, so that the first hours decide the most claims."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial


def most_decided_first(costs: Mapping[str, float], claims: Sequence[Collection[str]]) -> list[str]:
    """The measurements in an order in which claims are decided early.

    Step by step, what one claim still needs is taken next: of the claim for which the newly decided claims
    for each second of it are most. Measurements that no claim needs come last, in their own order.

    Args:
        costs: seconds of each measurement. claims: the measurements that each claim needs; a claim that needs
            one without a cost is left out.
    """
    waiting = [set(needed) for needed in claims if needed and costs.keys() >= set(needed)]
    order: list[str] = []
    while waiting:
        best = max(waiting, key=partial(_worth, costs=costs, done=set(order), waiting=waiting))
        order += [name for name in costs if name in best and name not in order]
        waiting = [needed for needed in waiting if not needed <= set(order)]
    return order + [name for name in costs if name not in order]


def _worth(needed: set[str], costs: Mapping[str, float], done: set[str], waiting: list[set[str]]) -> float:
    """Claims for each second that are decided by what this one still needs."""
    decided = sum(other <= done | needed for other in waiting)
    return decided / max(sum(costs[name] for name in needed - done), 1e-9)


def decided_after(order: Sequence[str], claims: Sequence[Collection[str]]) -> list[int]:
    """How many claims have all that they need after each measurement."""
    return [
        sum(bool(needed) and set(needed) <= set(order[: number + 1]) for needed in claims)
        for number in range(len(order))
    ]
