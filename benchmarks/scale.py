"""How much is measured: everything, or a little of everything to see that it works."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
GIB = 2**30
TIB = 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes and counts.

    Attributes:
        name: of the scale; images are kept by it.
        rounds: of each measurement, unless told otherwise.
        disk, small, sparse: virtual size and data in MiB of the three images that others are made from.
        warm_disks: root disks in a process, for the library and for what takes a hundred times as long.
        hits: calls of ``ensure_base`` in a process.
        crowd: processes and threads that ask for one cold image at once.
        crowd_beside: the same, for all, threads of one process.
        at_once: warm root disks at one moment.
        bases: sizes of a cleanup pass.
        peer_bases: those of them that a peer's pass is run for.
        clones: RBD clones in a process.
    """

    name: str
    rounds: int
    disk: tuple[int, int]
    small: tuple[int, int]
    sparse: tuple[int, int]
    warm_disks: tuple[int, int]
    hits: int
    crowd: tuple[int, int]
    crowd_beside: int
    at_once: int
    bases: tuple[int, ...]
    peer_bases: tuple[int, ...]
    clones: int


FULL = Scale(
    name="full",
    rounds=5,
    disk=(2048, 600),
    small=(64, 40),
    sparse=(10240, 64),
    warm_disks=(200, 20),
    hits=5000,
    crowd=(4, 100),
    crowd_beside=8,
    at_once=50,
    bases=(1000, 2000, 10000),
    peer_bases=(1000, 2000),
    clones=50,
)
QUICK = Scale(
    name="quick",
    rounds=1,
    disk=(96, 24),
    small=(16, 8),
    sparse=(512, 8),
    warm_disks=(30, 4),
    hits=500,
    crowd=(2, 20),
    crowd_beside=4,
    at_once=10,
    bases=(50, 100),
    peer_bases=(50,),
    clones=10,
)
