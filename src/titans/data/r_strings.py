"""Vectors of strings in the data of a package of R, without R."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

# Types of R's serialisation: a vector of strings, and one string.
_STRINGS, _STRING = 16, 9


def string_vectors(database: bytes) -> Iterator[list[str]]:
    """The vectors of strings in an .rdb file, in its order.

    Such a file is a sequence of records: the unpacked size (4 bytes, the highest first), and a zlib stream of
    one object in R's binary serialisation, version 2 or 3.

    Raises:
        ValueError: for a record that is something else.
    """
    while database:
        stream = zlib.decompressobj()
        try:
            record = stream.decompress(database[4:])
        except zlib.error as error:
            raise ValueError(f"a record that zlib cannot unpack: {error}") from None
        database = stream.unused_data
        yield _strings(record)


def _strings(record: bytes) -> list[str]:
    (version,) = struct.unpack_from(">i", record, 2)
    at = 14
    if version == 3:  # the name of an encoding follows
        at += 4 + struct.unpack_from(">i", record, at)[0]
    kind, count = struct.unpack_from(">ii", record, at)
    if record[:2] != b"X\n" or kind & 0xFF != _STRINGS:
        raise ValueError("a record that is no vector of strings")
    at, found = at + 8, []
    for _ in range(count):
        kind, length = struct.unpack_from(">ii", record, at)
        if kind & 0xFF != _STRING:
            raise ValueError("a vector with an element that is no string")
        at += 8
        # A missing string has length −1.
        found.append(record[at : at + max(length, 0)].decode("utf-8", "replace"))
        at += max(length, 0)
    return found
