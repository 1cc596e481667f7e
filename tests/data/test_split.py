from __future__ import annotations

import pytest

from titans.data import Document, hold_out

DOCUMENTS = [Document(f"play-{number}", b"text") for number in range(20)]


def test_whole_documents_are_held_out_by_name_alone() -> None:
    train, held_out = hold_out(DOCUMENTS, fraction=0.2)
    assert len(held_out) == 4
    assert sorted(train + held_out, key=DOCUMENTS.index) == DOCUMENTS
    again = hold_out(DOCUMENTS[::-1], fraction=0.2)
    assert again == (train[::-1], held_out[::-1])
    assert [document.name for document in held_out] == ["play-10", "play-14", "play-18", "play-19"]


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.999, 19)])
def test_neither_side_is_empty(fraction: float, count: int) -> None:
    assert len(hold_out(DOCUMENTS, fraction)[1]) == count


def test_names_choose_exactly() -> None:
    train, held_out = hold_out(DOCUMENTS, names=["play-3", "play-1"])
    assert [document.name for document in held_out] == ["play-1", "play-3"]
    assert len(train) == 18


def test_refusals() -> None:
    with pytest.raises(ValueError, match="give evaluation data separately"):
        hold_out(DOCUMENTS[:1])
    with pytest.raises(ValueError, match="fraction=1"):
        hold_out(DOCUMENTS, fraction=1)
    with pytest.raises(ValueError, match=r"names=\['play-77'\] are not in the corpus"):
        hold_out(DOCUMENTS, names=["play-1", "play-77"])
    with pytest.raises(ValueError, match="leaves no document on one side"):
        hold_out(DOCUMENTS[:2], names=["play-0", "play-1"])
    with pytest.raises(ValueError, match="several named play-0"):
        hold_out(DOCUMENTS[:1] * 2)
