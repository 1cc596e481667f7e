"""DNA and RNA sequences with classes: from package archives, or any FASTA file."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from titans.data.archives import Archive, fetch

# Token ids; 0 is padding, and any other letter is N.
ALPHABET = "-ACGTN"
_IDS = np.full(256, ALPHABET.index("N"), np.uint8)
for _letter, _id in zip(b"ACGTUacgtu", (1, 2, 3, 4, 4) * 2, strict=True):
    _IDS[_letter] = _id
_ILEARN = Archive(
    package="ilearnplus",
    version="1.5",
    filename="ilearnplus-1.5-py3-none-any.whl",
    sha256="7ad9580f20d2d9aa3d22c4024eea0b5e2f32479b0a2d6de57a46ab0abae166b3",
)
BUILTIN_SEQUENCES = {
    "lncrna": (
        "12,000 transcripts of the mouse, 200 to 24,817 letters: long non-coding (1) or messenger RNA (0)"
    )
}


@dataclass(frozen=True)
class LabelledSequence:
    """ids: (length,) uint8, indices of `ALPHABET`. label: its class. testing: whether it is held out."""

    ids: np.ndarray
    label: int
    testing: bool


def encode_sequence(letters: str | bytes) -> np.ndarray:
    """Token ids (length,) uint8 of letters in any case; U counts as T."""
    data = letters.encode("ascii", "replace") if isinstance(letters, str) else letters
    return _IDS[np.frombuffer(data, np.uint8)]


def load_sequences(source: str | Path) -> list[LabelledSequence]:
    """A set of `BUILTIN_SEQUENCES`, or of a FASTA file with headers `>name|class|training` or `…|testing`.

    Raises:
        ValueError: for no such source, or a header of another form.
        ConnectionError: if an archive cannot be fetched.
    """
    if isinstance(source, str) and source in BUILTIN_SEQUENCES:
        with zipfile.ZipFile(io.BytesIO(fetch(_ILEARN))) as wheel:
            content = wheel.read("ilearnplus/data/lncRNA_sequences.txt").decode("ascii")
    elif Path(source).is_file():
        content = Path(source).read_text(encoding="ascii", errors="replace")
    else:
        known = ", ".join(BUILTIN_SEQUENCES)
        raise ValueError(f"sequences={str(source)!r} is neither a file nor one of {known}: give a FASTA file")
    found = []
    for record in content.lstrip(">").split("\n>") if content.strip() else []:
        header, _, letters = record.partition("\n")
        fields = header.strip().split("|")
        if len(fields) < 3 or not fields[-2].isdecimal() or fields[-1] not in ("training", "testing"):
            raise ValueError(
                f"sequences={str(source)!r} has the header {header.strip()[:60]!r}: give "
                ">name|class|training, or testing, with a whole number for the class"
            )
        ids = encode_sequence("".join(letters.split()))
        found.append(LabelledSequence(ids, int(fields[-2]), fields[-1] == "testing"))
    return found


def padded(sequences: Sequence[np.ndarray], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Sequences as rows: ids (batch, time) int64, cut after `length`, and the mask of real tokens."""
    cut = [ids[:length] for ids in sequences]
    time = max(map(len, cut))
    rows = np.zeros((len(cut), time), np.int64)
    for row, ids in zip(rows, cut, strict=True):
        row[: len(ids)] = ids
    found = torch.from_numpy(rows)
    return found, found != 0
