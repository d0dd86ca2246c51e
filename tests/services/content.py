"""Bytes for images, some of them more than memory holds."""

from __future__ import annotations

import hashlib
import struct
from typing import Protocol

_MIB = 2**20


class Content(Protocol):
    """Bytes of a known number."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset``, at least one before the end."""


class Fixed:
    """The bytes given."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


class Pattern:
    """``size`` bytes that are made when they are read: blocks of 1 MiB, each beginning with its number.

    No bytes of it look like the header of an image format, and no block is like another.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._block = hashlib.shake_256(b"pattern").digest(_MIB)

    def read(self, offset: int, length: int) -> bytes:
        number, start = divmod(offset, _MIB)
        block = struct.pack(">Q", number) + self._block[8:]
        return block[start : min(_MIB, start + length, start + self.size - offset)]

    def digest(self) -> str:
        """Its sha512; reads all of it, about a second for a GiB."""
        return digest(self)


def digest(content: Content) -> str:
    """The sha512 of the content."""
    hasher = hashlib.sha512()
    offset = 0
    while chunk := content.read(offset, _MIB):
        hasher.update(chunk)
        offset += len(chunk)
    return hasher.hexdigest()
