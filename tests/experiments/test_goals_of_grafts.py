"""Goals of grafts: undecided without figures, and decided by the mean over tokens."""

from __future__ import annotations

import pytest

from titans.experiments.goals_of_grafts import TRAINED, graft_goals


def prediction(nats: list[float], tokens: int) -> dict:
    return {"dtype": "float32", "nats": nats, "bits": nats, "seconds": 1.0, "tokens": tokens, "bytes": 9e6}


def test_without_figures_no_goal_is_decided() -> None:
    assert all(goal.reached is None and not goal.figures for goal in graft_goals({}, {}))


@pytest.mark.parametrize("last, reached", [(3.80, False), (3.76, True)])
def test_the_loss_beyond_8192_tokens_is_a_mean_over_tokens(last: float, reached: bool) -> None:
    # 8,192 tokens at −1.25 % and 16,384 at −5 or −6 %: a mean of −3.75 or −4.4 %.
    cells = {
        "prediction, King Lear, 65536, window": prediction([4.0] * 5, 16384 + 16384),
        f"prediction, King Lear, 65536, {TRAINED}": prediction([4.0, 4.0, 4.0, 3.95, last], 16384 + 16384),
    }
    found = {goal.what: goal for goal in graft_goals(cells, {})}
    assert found[f"King Lear from token 8,192 on, {TRAINED}: loss against the same window"].reached is reached
    assert found["state of the memories"].reached is False


def test_every_kind_of_a_fact_counts_and_trainings_are_averaged() -> None:
    comparison = {f"four, 4096, {TRAINED}, seed 0": {"right": {"number": [12, 16], "word": [14, 16]}}}
    training = {
        f"seed {seed}, known wordings": {"1024": [right, 100], "16384": [right, 100]}
        for seed, right in enumerate((94, 97))
    }
    found = {goal.what: goal for goal in graft_goals(comparison, training)}
    alike = found["facts stated alike in 4,096 tokens, four numbers or four words, generated"]
    assert (alike.figures, alike.reached) == ("26 of 32", True)
    near = found["facts recalled after 1,024 tokens, wordings of training, mean of 2 trainings"]
    assert (near.figures, near.reached) == ("95.5 %", True)
