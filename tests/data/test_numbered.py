from __future__ import annotations

import re

import numpy as np
import pytest

from titans.data.numbered import with_numbered_lines

TEXT = b"".join(b"And so they went to the hill, all of them.\n" for _ in range(20_000))
LABEL = re.compile(r"(§|No\. |p\. |[(\[])?\d+(\.\d+)?([.:)\],]+ | |\n)")


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_lines_are_numbered_in_a_share_of_the_text_and_the_rest_is_unchanged(share: float) -> None:
    new = with_numbered_lines(TEXT, np.random.default_rng(1), share)
    assert new == with_numbered_lines(TEXT, np.random.default_rng(1), share)
    assert new != with_numbered_lines(TEXT, np.random.default_rng(2), share)
    assert LABEL.sub("", new.decode()).encode() == TEXT
    # Outside numbered stretches lines are far from the next number.
    at = np.array([match.start() for match in re.finditer(rb"\d+", new)])
    near = sum(np.diff(at) < 400) * np.diff(at)[np.diff(at) < 400].mean()
    assert near / len(new) == pytest.approx(share, abs=0.1)


def test_a_text_of_one_line_or_with_share_0_is_unchanged() -> None:
    line = b"no end in sight " * 500
    assert with_numbered_lines(line, np.random.default_rng(0), 0.5) == line
    assert with_numbered_lines(TEXT, np.random.default_rng(0), 0.0) == TEXT
