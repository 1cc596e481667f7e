from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from titans.data import CarryDataset, WindowDataset
from titans.data.batches import ANSWER, STATEMENT


def encoded(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose tokens are all different, so that a token identifies its place."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.int32) for end, length in zip(ends, lengths, strict=True)]


def predictions(item: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """(token read, token to predict) of one item, after checking that masks, labels and padding agree."""
    ids, labels, read = item["input_ids"], item["labels"], item["attention_mask"].bool()
    count = int(read.sum())
    assert read[:count].all() and 0 < count < len(ids)
    assert torch.equal(labels[: count + 1], ids[: count + 1])
    assert (labels[count + 1 :] == -100).all() and (ids[count + 1 :] == 0).all()
    return list(zip(ids[:count].tolist(), labels[1 : count + 1].tolist(), strict=True))


documents_and_length = (
    st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda lengths: max(lengths) > 1),
    st.integers(1, 12),
)


@given(*documents_and_length, st.integers(0, 3), st.sampled_from([None, 0, 7]))
def test_windows_make_every_prediction_once_in_every_epoch(
    lengths: list[int], sequence_length: int, epoch: int, seed: int | None
) -> None:
    documents = encoded(lengths)
    windows = WindowDataset(documents, sequence_length, seed)
    size = len(windows)
    windows.set_epoch(epoch)
    assert len(windows) == size
    made = [pair for i in range(size) for pair in predictions(windows[i])]
    assert made == [(t, t + 1) for document in documents for t in document[:-1].tolist()]


@given(*documents_and_length, st.integers(1, 5), st.integers(0, 3))
def test_carried_rows_read_on_until_they_say_restart(
    lengths: list[int], sequence_length: int, batch_rows: int, epoch: int
) -> None:
    documents = encoded(lengths)
    carried = CarryDataset(documents, sequence_length, batch_rows)
    carried.set_epoch(epoch)
    assert len(carried) == carried.num_steps * batch_rows
    made = []
    for row in range(batch_rows):
        expected = None
        for step in range(carried.num_steps):
            item = carried[step * batch_rows + row]
            pairs = predictions(item)
            assert item["restart"].dtype == torch.bool and item["restart"].shape == ()
            if not item["restart"]:
                assert pairs[0][0] == expected  # no token between two steps is lost or read twice
            elif step:
                assert pairs[0][0] in [document[0] for document in documents if len(document)]
            expected = pairs[-1][1]
            assert all(target == token + 1 for token, target in pairs)
            made += pairs
    wanted = {(t, t + 1) for document in documents for t in document[:-1].tolist()}
    assert set(made) == wanted
    refilled = len(carried) - len(WindowDataset(documents, sequence_length))
    assert 0 <= refilled < batch_rows
    if refilled == 0:
        assert len(made) == len(wanted)


@pytest.mark.parametrize("make", [lambda d, s: WindowDataset(d, 8, s), lambda d, s: CarryDataset(d, 8, 3, s)])
def test_seed_and_epoch_decide_everything(make) -> None:  # type: ignore[no-untyped-def]
    documents = encoded([100, 37, 61, 203])

    def read(dataset: Dataset) -> list[list[int]]:
        return [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]  # type: ignore[arg-type]

    first, same, other_seed = make(documents, 0), make(documents, 0), make(documents, 1)
    assert read(first) == read(same) != read(other_seed)
    before = read(first)
    first.set_epoch(1)
    assert read(first) != before
    first.set_epoch(0)
    assert read(first) == before


def test_epochs_move_the_boundaries() -> None:
    windows = WindowDataset(encoded([1001 - 6]), 10)
    sizes = set()
    for epoch in range(50):
        windows.set_epoch(epoch)
        sizes.add(int(windows[0]["attention_mask"].sum()))
    assert sizes == {4, 5, 6, 7, 8, 9, 10}


def test_the_default_collator_stacks_rows_of_one_step() -> None:
    carried = CarryDataset([np.arange(50, dtype=np.uint8), np.arange(30, dtype=np.uint8)], 8, 4)
    batches = list(DataLoader(carried, batch_size=4))
    assert len(batches) == carried.num_steps
    assert batches[0]["restart"].tolist() == [True] * 4
    assert batches[0]["input_ids"].shape == (4, 9) and batches[0]["input_ids"].dtype == torch.int64


def test_refusals() -> None:
    with pytest.raises(ValueError, match="nothing to predict"):
        WindowDataset(encoded([1, 0]), 4)
    with pytest.raises(ValueError, match="sequence_length=0"):
        WindowDataset(encoded([9]), 0)
    with pytest.raises(ValueError, match="batch_rows=0"):
        CarryDataset(encoded([9]), 4, 0)
    with pytest.raises(ValueError, match=r"documents\[1\] has shape \(3,\) and dtype float64"):
        WindowDataset([np.arange(3), np.zeros(3)], 4)
    with pytest.raises(IndexError):
        WindowDataset(encoded([9]), 4)[2]


@given(*documents_and_length, st.integers(0, 3))
def test_answers_are_marked_at_the_labels_and_facts_at_the_tokens_that_state_them(
    lengths: list[int], sequence_length: int, epoch: int
) -> None:
    documents = encoded(lengths)
    marks = [
        np.select([document % 3 == 0, document % 3 == 1], [ANSWER, STATEMENT], 0).astype(np.uint8)
        for document in documents
    ]
    for dataset in (
        WindowDataset(documents, sequence_length, 0, marks),
        CarryDataset(documents, sequence_length, 2, 0, marks),
    ):
        dataset.set_epoch(epoch)
        for i in range(len(dataset)):
            item = dataset[i]
            assert torch.equal(item["answers"], (item["labels"] >= 0) & (item["labels"] % 3 == 0))
            real = item["attention_mask"].bool()
            assert torch.equal(item["facts"], real & (item["input_ids"] % 3 != 2))
