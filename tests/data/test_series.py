"""Series and sequences: what a file may hold, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from titans.data.sequences import ALPHABET, encode_sequence, load_sequences, padded
from titans.data.series import Series, load_series, standardised, windows

ETT = """date,HUFL,HULL,OT
2016-07-01 00:00:00,,2.5,30.5
2016-07-01 01:00:00,5.0,NA,27.75
2016-07-01 02:00:00,?,1.5,
2016-07-01 03:00:00,"7.0",-1e2,25.0
"""


def test_a_csv_file_is_read_without_its_dates_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "ETTh1.csv"
    path.write_text(ETT)
    series = load_series(path, period=24)
    assert (series.name, series.columns, series.period) == ("ETTh1", ("HUFL", "HULL", "OT"), 24)
    assert series.values.dtype == np.float32
    assert series.values.tolist() == [[5, 2.5, 30.5], [5, 2.5, 27.75], [5, 1.5, 27.75], [7, -100, 25]]

    path.write_text("date,note\n2016,a\n")
    assert load_series(path).columns == ("date",)
    path.write_text("note\na\n")
    with pytest.raises(ValueError, match="no numeric column"):
        load_series(path)
    with pytest.raises(ValueError, match="'ETTh9' is neither a file nor one of beijing, "):
        load_series("ETTh9")


def test_windows_follow_each_other_and_only_training_decides_the_scale() -> None:
    values = np.arange(20, dtype=np.float32)[:, None] * np.array([1, -2], np.float32)
    past, future = windows(values, 4, 3)
    assert past.shape == (14, 4, 2) and future.shape == (14, 3, 2)
    assert past[5, :, 0].tolist() == [5, 6, 7, 8] and future[5, :, 1].tolist() == [-18, -20, -22]
    scaled = standardised(Series("line", ("a", "b"), values), train=0.5)
    assert np.allclose(scaled[:10].mean(0), 0, atol=1e-6) and np.allclose(scaled[:10].std(0), 1)
    with pytest.raises(ValueError, match="need 21 steps, and there are 20"):
        windows(values, 20, 1)


def test_a_fasta_file_is_read_with_classes_and_parts(tmp_path: Path) -> None:
    path = tmp_path / "some.fasta"
    path.write_text(">a|1|training\nACGT\nacgu\n>b|0|testing\nNNRY\n")
    first, second = load_sequences(path)
    assert ["".join(ALPHABET[n] for n in one.ids) for one in (first, second)] == ["ACGTACGT", "NNNN"]
    assert (first.label, first.testing, second.label, second.testing) == (1, False, 0, True)
    ids, mask = padded([first.ids, second.ids[:2]], 6)
    assert ids.shape == (2, 6) and mask.sum(1).tolist() == [6, 2] and ids[1, 2:].sum() == 0
    assert encode_sequence(b"gat").tolist() == [3, 1, 4]
    path.write_text(">a|x|training\nACGT\n")
    with pytest.raises(ValueError, match=r"has the header 'a\|x\|training'"):
        load_sequences(path)
