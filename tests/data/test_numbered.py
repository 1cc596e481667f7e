from __future__ import annotations

import numpy as np
import pytest

from titans.data.numbered import with_numbers

TEXT = "".join(
    f"Line {'x' * (i % 37)} of a play.\n{'' if i % 5 else chr(10)}" for i in range(20_000)
).encode()


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_a_share_of_the_lines_gets_a_number_in_front_and_nothing_else_changes(share: float) -> None:
    new = with_numbers(TEXT, np.random.default_rng(1), share)
    assert new == with_numbers(TEXT, np.random.default_rng(1), share)
    before, after = TEXT.split(b"\n"), new.split(b"\n")
    assert all(b.endswith(a) for a, b in zip(before, after, strict=True))
    added = [b[: len(b) - len(a)] for a, b in zip(before, after, strict=True)]
    assert all(any(chr(c).isdigit() for c in one) == bool(one) for one in added)
    filled = sum(bool(line) for line in before)
    assert sum(map(bool, added)) / filled == pytest.approx(share, abs=0.12)


def test_numbers_count_up_within_a_stretch_and_begin_anywhere() -> None:
    new = with_numbers(TEXT, np.random.default_rng(2), 0.3)
    heads = [line.split(b" ")[0] for line in new.split(b"\n") if line]
    plain = [int(head) for head in heads if head.isdigit()]
    steps = np.diff(plain)
    assert (steps == 1).mean() > 0.9 and len({len(str(n)) for n in plain}) > 1


def test_no_share_leaves_the_text_alone() -> None:
    assert with_numbers(TEXT, np.random.default_rng(0), 0.0) is TEXT
