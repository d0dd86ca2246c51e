"""The qcow2 decoder gives what QEMU gives, for every legal file in every order; and refuses what it cannot prove."""

from __future__ import annotations

import random
import subprocess
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import qcow2
from harness.images import qemu_img
from nova_imagecache._inflate import PackedError
from nova_imagecache._packed import SurpriseError
from nova_imagecache._qcow2 import Qcow2Error

MIB = 1 << 20
REFUSED = (SurpriseError, PackedError, Qcow2Error)
KINDS = ("plain", "packed", "zero", "zero-allocated", "hole")


@st.composite
def layouts(draw: st.DrawFn) -> qcow2.Layout:
    """Hand-made images of every cluster size, a few MiB at most."""
    bits = draw(st.integers(9, 21))
    version = draw(st.sampled_from([2, 3]))
    kinds = KINDS if version == 3 else ("plain", "packed", "hole")
    count = draw(st.integers(1, max(2, min(200, (6 * MIB) >> bits))))
    return qcow2.Layout(
        cluster_bits=bits,
        kinds=tuple(draw(st.lists(st.sampled_from(kinds), min_size=count, max_size=count))),
        version=version,
        zstd=version == 3 and draw(st.booleans()),
        seed=draw(st.one_of(st.none(), st.integers(0, 1 << 32))),
        tail=512 * draw(st.integers(0, (1 << bits) // 512 - 1)),
    )


def by_qemu(file: bytes, directory: Path) -> bytes | None:
    """What qemu-img makes of it; None: it refuses."""
    source, target = directory / "x.qcow2", directory / "x.raw"
    source.write_bytes(file)
    argv = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(source), str(target)]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=60)
    return target.read_bytes() if done.returncode == 0 else None


@settings(max_examples=80, deadline=None)
@given(layout=layouts(), clusters=st.integers(1, 8))
def test_any_legal_order_gives_the_guests_bytes(layout: qcow2.Layout, clusters: int) -> None:
    """Tables behind their data, data in any order, clusters that share clusters of the file; in pieces of a few
    clusters, so that much has passed before its table comes."""
    made = qcow2.make(layout)
    guest, _kept = qcow2.decode(made.file, clusters << layout.cluster_bits)
    assert guest == made.guest


@settings(max_examples=25, deadline=None)
@given(layout=layouts())
def test_hand_made_images_are_what_qemu_reads(layout: qcow2.Layout) -> None:
    """Otherwise the test above would prove nothing."""
    made = qcow2.make(layout)
    with tempfile.TemporaryDirectory() as name:
        assert by_qemu(made.file, Path(name)) == made.guest


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 3 * MIB // 512).map(lambda sectors: sectors * 512),
    writes=st.lists(st.tuples(st.integers(0, 3 * MIB), st.integers(1, MIB // 2), st.booleans()), max_size=8),
    cluster=st.sampled_from(["512", "4k", "64k", "512k", "2M"]),
    options=st.sampled_from([(), ("-c",), ("-W",), ("-c", "-W")]),
    more=st.sampled_from(["", ",compression_type=zstd", ",compat=0.10", ",preallocation=metadata"]),
)
def test_what_qemu_img_writes_is_read_back(
    size: int, writes: list[tuple[int, int, bool]], cluster: str, options: tuple[str, ...], more: str
) -> None:
    """Of every cluster size and kind that qemu-img convert makes."""
    guest = bytearray(size)
    for number, (offset, length, noise) in enumerate(writes):
        rng = random.Random(number)
        data = rng.randbytes(length) if noise else (b"%d words " % number) * (length // 8 + 1)
        end = min(size, offset + length)
        guest[offset:end] = data[: max(0, end - offset)]
    if more == ",preallocation=metadata":
        options = ()
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name, "raw"), Path(name, "qcow2")
        source.write_bytes(guest)
        made_of = ("-o", f"cluster_size={cluster}{more}", str(source), str(target))
        qemu_img("convert", "-q", "-f", "raw", "-O", "qcow2", *options, *made_of)
        decoded, _kept = qcow2.decode(target.read_bytes())
    assert decoded == bytes(guest)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["write", "write", "write", "discard", "write -z", "write -c", "snapshot"]),
            st.integers(0, 63),
            st.integers(1, 5),
        ),
        min_size=1,
        max_size=25,
    ),
    cluster=st.sampled_from(["4k", "64k", "1M"]),
)
def test_images_that_guests_wrote_are_read(steps: list[tuple[str, int, int]], cluster: str) -> None:
    """In the order in which things happened: rewritten, discarded, zeroed, snapshotted inside the file."""
    unit = 64 * 1024
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "disk")
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", str(path), str(64 * unit))
        commands: list[str] = []

        def flush() -> None:
            if commands:
                argv = ["qemu-io", "-t", "unsafe", "-f", "qcow2"]
                argv += [word for command in commands for word in ("-c", command)]
                # QEMU refuses some, such as compressing over data: what it did is what counts
                subprocess.run([*argv, str(path)], check=False, capture_output=True, timeout=60)
                commands.clear()

        for number, (what, start, count) in enumerate(steps):
            length = min(count, 64 - start) * unit
            if what == "snapshot":
                flush()
                qemu_img("snapshot", "-c", f"s{number}", str(path))
            elif what == "write -c":
                # compressed writes are of whole clusters, as backup tools make them
                commands.append(f"write -c -P {number % 250 + 1} {start // 16 * MIB} {MIB}")
            else:
                pattern = f"-P {number % 250 + 1} " if what == "write" else ""
                commands.append(f"{what} {pattern}{start * unit} {length}")
        flush()
        file = path.read_bytes()
        expected = by_qemu(file, Path(name))
        assert expected is not None
        decoded, _kept = qcow2.decode(file)
        assert decoded == expected


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(layout=layouts(), data=st.data())
def test_tampered_tables_are_refused_or_read_as_they_stand(layout: qcow2.Layout, data: st.DataObject) -> None:
    """No crash, no hang, nothing outside of the virtual size; what is taken is taken as QEMU takes it."""
    made = qcow2.make(layout)
    file = bytearray(made.file)
    for _ in range(data.draw(st.integers(1, 4))):
        offset, length = data.draw(st.sampled_from(made.tables))
        at = offset + data.draw(st.integers(0, length - 1))
        file[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del file[data.draw(st.integers(1, len(file))) :]
    try:
        decoded, _kept = qcow2.decode(bytes(file))
    except REFUSED:
        return
    with tempfile.TemporaryDirectory() as name:
        theirs = by_qemu(bytes(file), Path(name)) if len(decoded) < 64 * MIB else None
    if theirs is not None:
        assert decoded == theirs


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.95])
def test_a_file_that_was_cut_off_is_no_whole_one(cut: float) -> None:
    """Tables or data that never came."""
    made = qcow2.make(qcow2.Layout(cluster_bits=16, kinds=("plain", "packed") * 40))
    with pytest.raises(REFUSED):
        qcow2.decode(made.file[: int(len(made.file) * cut)])


def test_clusters_that_lie_over_one_another_take_no_more_memory() -> None:
    """A few guest clusters that name the same compressed bytes are read; many are not held until those have passed."""
    guest, _kept = qcow2.decode(qcow2.one_for_all(2))
    assert guest == b"x" * (4 * MIB)
    file = qcow2.one_for_all(100)
    tracemalloc.start()
    try:
        with pytest.raises(SurpriseError, match="over one another"):
            qcow2.decode(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # the harness holds as many bytes as the guest and the file have
    assert peak < 200 * MIB + len(file) + 40 * MIB


def test_nothing_is_kept_behind_the_last_table() -> None:
    """No table can name it any more. In front of it, it may be named, and is kept."""
    size = 1 << 12
    made = qcow2.make(qcow2.Layout(cluster_bits=12, kinds=("plain", "packed") * 20))
    unnamed = b"x" * (100 * size)
    guest, kept = qcow2.decode(made.file + unnamed, piece=size)
    assert (guest, kept) == (made.guest, size)  # the reference counts, which lie in front of the tables


@pytest.mark.slow
def test_of_what_qemu_img_writes_only_metadata_is_kept(tmp_path: Path) -> None:
    """A table comes before what it names, so that nothing of the data is written twice."""
    source, target = tmp_path / "raw", tmp_path / "qcow2"
    source.write_bytes(random.Random(1).randbytes(24 * MIB))
    for options in ((), ("-c",)):
        qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, str(source), str(target))
        guest, kept = qcow2.decode(target.read_bytes())
        assert guest == source.read_bytes()
        assert kept <= 4 * 65536
