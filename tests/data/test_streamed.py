"""Streamed corpora: the same rows in any number of processes, and after a break."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from titans.data import Document, DocumentSource, StreamDataset, open_source, weighted_corpora
from titans.data.sources import is_streamed
from titans.data.streamed import num_deals


class Letters:
    """Shards of documents whose tokens say what they are: shard · 1000 + document · 10 + place."""

    def __init__(self, name: str, sizes: list[list[int]]) -> None:
        self.name, self.sizes, self.num_shards = name, sizes, len(sizes)

    def documents(self, shard: int, seed: tuple[int, ...]) -> Iterator[Document]:
        for number, size in enumerate(self.sizes[shard]):
            tokens = shard * 1000 + number * 10 + np.arange(size)
            yield Document(f"{self.name}/{shard}/{number}", tokens.astype(np.int32).tobytes())


def encode(document: Document, generator: np.random.Generator) -> tuple[np.ndarray, None]:
    base = 100_000 if document.name.startswith("b") else 0
    return np.frombuffer(document.data, np.int32) + base, None


def stream(rows: range | None = None, packed: bool = True, **changes: object) -> StreamDataset:
    generator = np.random.default_rng(5)
    sources: list[tuple[DocumentSource, float]] = [
        (Letters("a", generator.integers(1, 9, (3, 5)).tolist()), 0.75),  # fewer shards than rows
        (Letters("b", generator.integers(1, 9, (9, 4)).tolist()), 0.25),
    ]
    given = {"sources": sources, "encode": encode, "sequence_length": 5, "num_rows": 4, "num_steps": 60}
    return StreamDataset(**(given | changes), rows=rows, packed=packed)  # type: ignore[arg-type]


def items(dataset: StreamDataset, steps: range) -> list[dict[str, torch.Tensor]]:
    return [dataset[step * dataset.num_rows + row] for step in steps for row in dataset.rows]


def same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> bool:
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("packed", [True, False])
def test_any_number_of_processes_reads_the_same_and_goes_on_anywhere(packed: bool) -> None:
    whole = items(stream(packed=packed), range(60))
    steps = [whole[step * 4 : step * 4 + 4] for step in range(60)]
    for rows in (range(2), range(2, 4), range(3, 4)):
        wanted = [item for step in steps for item in step[rows.start : rows.stop]]
        assert same(items(stream(rows, packed), range(60)), wanted)
    for step in (1, 7, 33, 59):
        cursors = torch.stack([item["cursor"] for item in steps[step - 1]]).numpy()
        for rows in (range(4), range(2), range(1, 2)):
            later = stream(rows, packed)
            later.resume(step, cursors)
            wanted = [item for each in steps[step:] for item in each[rows.start : rows.stop]]
            assert same(items(later, range(step, 60)), wanted)


def test_packed_rows_hold_every_token_of_their_documents_in_order() -> None:
    rows = [[item["input_ids"].tolist() for item in items(stream(range(row, row + 1)), range(60))]
            for row in range(4)]  # fmt: skip
    seen = set()
    for row in rows:
        # The last token of an example is the first of the next one.
        assert all(one[-1] == other[0] for one, other in pairwise(row))
        text = row[0] + [token for piece in row[1:] for token in piece[1:]]
        starts = [place for place, token in enumerate(text) if token % 10 == 0]
        for begin, end in pairwise(starts):
            assert text[begin:end] == list(range(text[begin], text[begin] + end - begin))
        seen |= {text[begin] for begin in starts}
    # Every document of both corpora, and shares as asked for.
    assert len(seen) == 3 * 5 + 9 * 4
    tokens = np.array(rows).ravel()
    assert (tokens < 100_000).mean() == pytest.approx(0.75, abs=0.03)


def test_rows_that_share_shards_take_documents_in_turn() -> None:
    assert [num_deals(4, shards) for shards in (1, 2, 3, 4, 9)] == [1, 2, 2, 4, 4]
    assert num_deals(6, 5) == 3
    one = Letters("a", [[6] * 8])
    first = {}
    for row in range(4):
        dataset = stream(range(row, row + 1), False, sources=[(one, 1.0)], num_steps=2)
        first[row] = [int(dataset[step * 4 + row]["input_ids"][0]) // 10 for step in range(2)]
    assert first == {0: [0, 4], 1: [1, 5], 2: [2, 6], 3: [3, 7]}


def test_segments_restart_where_a_document_begins() -> None:
    dataset = stream(range(1), False, sources=[(Letters("a", [[9, 1, 3]]), 1.0)], num_rows=1)
    found = [dataset[step] for step in range(5)]
    assert [bool(item["restart"]) for item in found] == [True, False, True, True, False]
    assert [int(item["attention_mask"].sum()) for item in found] == [5, 3, 2, 5, 3]


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="corpus='a' holds no text to train on"):
        _ = stream(sources=[(Letters("a", [[4]]), 1.0)], keep=lambda document: False)[0]
    # Segments are of one document each; a second corpus does not hide that the first has none.
    short, whole = Letters("a", [[1] * 9, [1] * 4]), Letters("b", [[4] * 9])
    for sources in ([(short, 1.0)], [(short, 0.5), (whole, 0.5)]):
        with pytest.raises(ValueError, match=r"corpus='a': none of \d+ documents .* join them into longer"):
            items(stream(packed=False, sources=sources), range(60))
    assert stream(packed=False, sources=[(Letters("a", [[1] * 200 + [2]]), 1.0)])[0]
    dataset = stream()
    with pytest.raises(ValueError, match=r"cursors of shape \(4, 3\)"):
        dataset.resume(3, np.zeros((4, 3), dtype=np.int64))
    dataset.resume(3, torch.stack([item["cursor"] for item in items(dataset, range(1))]).numpy())
    with pytest.raises(IndexError, match="row 0 of step 1, is not read"):
        _ = dataset[4]


def test_corpora_are_written_with_weights(tmp_path: Path) -> None:
    assert [(c.name, c.weight) for c in weighted_corpora(["hf:a:en=0.7", "books/=3"])] == [
        ("hf:a:en", 0.7), ("books/", 3.0)
    ]  # fmt: skip
    odd = tmp_path / "x=2"
    odd.mkdir()
    assert weighted_corpora(str(odd))[0].name == str(odd) and weighted_corpora("a=b")[0].name == "a=b"
    assert [is_streamed(weighted_corpora(data)) for data in ("a", "hf:a", ("a", "b"))] == [False, True, True]
    for wrong, why in (
        (["a=0"], "weight above 0"),
        (["a=1", "b"], "all of them a weight"),
        ([], "no corpus"),
    ):
        with pytest.raises(ValueError, match=why):
            weighted_corpora(wrong)


def test_a_folder_and_a_data_set_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(str(number))
    folder = open_source(str(tmp_path))
    orders = {tuple(document.name for document in folder.documents(0, (seed,))) for seed in range(20)}
    assert len(orders) > 1 and {frozenset(order) for order in orders} == {
        frozenset(("0.txt", "1.txt", "2.txt"))
    }

    saved = tmp_path / "saved"
    saved.mkdir()
    for number in range(2):
        lines = [json.dumps({"text": f"{number} {line}" if line else None, "n": line}) for line in range(3)]
        (saved / f"{number}.jsonl").write_text("\n".join(lines))
    source = open_source(f"hf:{saved}")
    assert source.num_shards == 2
    found = [(document.name, document.data) for document in source.documents(1, (0,))]
    label = f"{saved}/train/00001"
    assert found == [(f"{label}/00000000", b""), (f"{label}/00000001", b"1 1"), (f"{label}/00000002", b"1 2")]
    with pytest.raises(ValueError, match=r"could not be loaded: .*test"):
        open_source(f"hf:{saved}::test")
    with pytest.raises(ValueError, match=r"no column of strings named 'n'.*text"):
        open_source(f"hf:{saved}:::n")
    (saved / "1.jsonl").write_text('{"text": "a", "n": 1}\n{"text')
    with pytest.raises(ValueError, match=r"could not be loaded: .*resume from the last checkpoint"):
        list(source.documents(1, (0,)))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets: pip install 'titans-ltm\[train\]'"):
        open_source("hf:anything")
