"""Which clusters of a qcow2 file are unpacked and written together: a MiB's, though others lie between them. Pure.

qemu-img packs many clusters side by side and writes what is ready first: in a compressed image the clusters of one MiB
lie up to 80 places from each other. A MiB of which two threads have parts would have to be read back for its checksum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nova_imagecache._sums import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nova_imagecache._decoder import Plain
    from nova_imagecache._packed import Packed

FULL = MIB
"""Bytes of the guest from which on a batch takes only what belongs to the MiBs that it has begun."""

MOST = 3 * MIB
"""Bytes of the guest from which on it takes nothing."""

_OPEN = 4
"""Batches that are filled at once."""

_HELD = 4
"""Pieces of the file that these hold, at most: others have to be filled meanwhile."""


class Batch:
    """Clusters of the guest for one thread; it holds the pieces of the file that they lie in."""

    def __init__(self) -> None:
        self.found: list[Plain | Packed] = []
        self.weight = 0
        """Bytes of the guest."""
        self._mibs: set[int] = set()
        self._holds: dict[int, Callable[[], None]] = {}

    def takes(self, guest: int) -> bool:
        """Whether a cluster belongs here: with its neighbours while there is room for more, or with its own MiB's."""
        return self.weight < FULL or (self.weight < MOST and guest // MIB in self._mibs)

    def add(self, found: Plain | Packed, weight: int) -> None:
        """Take a cluster, or a run of plain ones."""
        self.found.append(found)
        self.weight += weight
        self._mibs.update(range(found.guest // MIB, -(-(found.guest + weight) // MIB)))

    def hold(self, piece: int, hold: Callable[[], Callable[[], None]]) -> None:
        """Have this piece, by its number, stay as it is."""
        if piece not in self._holds:
            self._holds[piece] = hold()

    @property
    def first_piece(self) -> int:
        """The number of the first piece that is held."""
        return min(self._holds)

    def let_go(self) -> None:
        """The pieces are needed no longer."""
        while self._holds:
            self._holds.popitem()[1]()


class Batches:
    """Those that are being filled. ``hold()`` has the piece that is fed stay as it is until its answer is called."""

    def __init__(self, hold: Callable[[], Callable[[], None]]) -> None:
        self._hold = hold
        self._piece = 0
        self._open: list[Batch] = []

    def __bool__(self) -> bool:
        return bool(self._open)

    def begin_piece(self) -> Iterator[Batch]:
        """The next piece is fed; those that have held one for long enough are handed out."""
        self._piece += 1
        while self._open and self._open[0].first_piece <= self._piece - _HELD:
            yield self._open.pop(0)

    def add(self, found: Plain | Packed, weight: int) -> Batch | None:
        """Take a cluster that stands for so many bytes of the guest; the batch that gives way to it, if any."""
        gone = None
        batch = next((batch for batch in self._open if batch.takes(found.guest)), None)
        if batch is None:
            if len(self._open) == _OPEN:
                gone = self._open.pop(0)
            batch = Batch()
            self._open.append(batch)
        batch.add(found, weight)
        batch.hold(self._piece, self._hold)
        return gone

    def rest(self) -> Iterator[Batch]:
        """There is nothing more to take: hand all out."""
        while self._open:
            yield self._open.pop(0)
