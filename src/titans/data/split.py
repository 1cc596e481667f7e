"""The split of a corpus into training and held-out documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Protocol, TypeVar

from titans.data.documents import Document


class Named(Protocol):
    """A document, tokenised or not."""

    @property
    def name(self) -> str: ...


AnyDocument = TypeVar("AnyDocument", bound=Named)


def hold_out(
    documents: Sequence[AnyDocument], fraction: float = 0.1, names: Iterable[str] | None = None
) -> tuple[list[AnyDocument], list[AnyDocument]]:
    """Split a corpus into (training, held-out) documents; no document is cut.

    With `names`, exactly these are held out. Otherwise documents are ranked by a hash of their names, and the
    first `fraction` of them (rounded, at least one, never all) is held out, so that a corpus has the same
    split everywhere. Both parts keep the order of `documents`.

    Raises ValueError for a single document, names that occur twice, a fraction outside (0, 1), an unknown
    name, or names that leave one side empty.
    """
    if len(documents) < 2:
        raise ValueError(
            f"documents holds {len(documents)} document(s), of which none can be held out whole; give "
            "evaluation data separately, or split the text into several files"
        )
    known = [document.name for document in documents]
    if len(set(known)) < len(known):
        twice = sorted({name for name in known if known.count(name) > 1})
        raise ValueError(
            f"documents has several named {', '.join(twice[:10])}; a split needs one name for each"
        )
    if names is not None:
        chosen = set(names)
        unknown = sorted(chosen.difference(known))
        if unknown:
            raise ValueError(f"names={unknown!r} are not in the corpus; it has {', '.join(known[:50])}")
        if not 0 < len(chosen) < len(known):
            raise ValueError(
                f"names={sorted(chosen)!r} leaves no document on one side; name some, but not all"
            )
    else:
        if not 0 < fraction < 1:
            raise ValueError(f"fraction={fraction!r} must lie between 0 and 1, both excluded")
        count = min(max(round(fraction * len(documents)), 1), len(documents) - 1)
        chosen = set(sorted(known, key=_rank)[:count])
    train = [document for document in documents if document.name not in chosen]
    held_out = [document for document in documents if document.name in chosen]
    return train, held_out


def _rank(name: str) -> tuple[bytes, str]:
    return hashlib.sha256(name.encode()).digest(), name


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a document of a corpus that is not known as a whole is held out: about this fraction is."""
    return int.from_bytes(_rank(name)[0][:8], "big") < fraction * 2**64


def in_turn(corpora: Iterable[Sequence[Document]]) -> list[Document]:
    """The documents of all corpora, one of each in turn, those of a corpus in the order of a hash of their
    names: the first few are an even mixture."""
    queues = [sorted(corpus, key=lambda document: _rank(document.name)) for corpus in corpora]
    turns = zip_longest(*queues)
    return [document for turn in turns for document in turn if document is not None]
