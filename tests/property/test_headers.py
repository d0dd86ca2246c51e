"""Properties of parsers of hostile input: a verdict or a refusal, never another exception."""

from __future__ import annotations

import contextlib
import io
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_imagecache import _qcow2
from nova_imagecache._inspect import StreamInspector
from nova_imagecache._qcow2 import Qcow2Error, parse_header
from nova_imagecache.exceptions import ImageRejectedError
from unit import images
from unit.images import KIB, MIB

DECLARED = ("raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi", "iso", "ami", "aki", "ari")
MAGICS = (
    b"",
    b"QFI\xfb\0\0\0\3",
    b"QED\0",
    b"KDMV\1\0\0\0",
    b"conectix",
    b"vhdxfile",
    b"LUKS\xba\xbe\0\1",
    b"# Disk DescriptorFile\nversion=1\n",
    b"<<< QEMU VM Virtual Disk Image >>>\n",
)
KINDS = sorted(images.MAKERS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Good images, to be damaged."""
    directory: Path = tmp_path_factory.mktemp("made")
    return {name: maker(directory) for name, (_, maker) in images.MAKERS.items()}


def judge(declared: str, data: bytes, chunk: int) -> StreamInspector | None:
    """The inspector if it takes the image; only ImageRejectedError comes out of one that does not."""
    inspector = StreamInspector(declared)
    with contextlib.suppress(ImageRejectedError):
        for offset in range(0, len(data), chunk):
            inspector.feed(data[offset : offset + chunk])
        inspector.finish()
        return inspector
    return None


class TestInspector:
    """StreamInspector on anything."""

    @given(
        st.sampled_from(DECLARED),
        st.sampled_from(MAGICS),
        st.binary(max_size=2000),
        st.sampled_from([0, 4096, 33 * KIB, 257 * KIB, 1100 * KIB]),
        st.sampled_from([100, 4096, 64 * KIB, 2 * MIB]),
    )
    def test_random_bytes_are_judged(self, declared: str, magic: bytes, noise: bytes, length: int, chunk: int) -> None:
        """With or without the first bytes of a format, short or long."""
        inspector = judge(declared, (magic + noise).ljust(length, b"\0"), max(chunk, length // 50))
        assert inspector is None or inspector.done

    @given(
        kind=st.sampled_from(KINDS),
        changes=st.lists(
            st.tuples(
                st.one_of(st.integers(0, 1100), st.integers(32 * KIB, 34 * KIB), st.integers(192 * KIB, 193 * KIB)),
                st.binary(min_size=1, max_size=16),
            ),
            min_size=1,
            max_size=6,
        ),
        cut=st.none() | st.integers(0, 300 * KIB),
    )
    def test_damaged_images_are_judged(
        self, made: dict[str, bytes], kind: str, changes: list[tuple[int, bytes]], cut: int | None
    ) -> None:
        """Headers with a few bytes changed, whole or cut; what is taken has a size that can be."""
        data = bytearray(made[kind] if cut is None else made[kind][:cut])
        for offset, new in changes:
            if offset < len(data):
                data[offset : offset + len(new)] = new
        inspector = judge(images.MAKERS[kind][0], bytes(data), 64 * KIB)
        if inspector is not None and inspector.disk_format != "raw":
            assert inspector.virtual_size is not None
            assert 0 < inspector.virtual_size < 1 << 63

    @given(
        text=st.lists(
            st.sampled_from(
                [
                    'createType="monolithicSparse"',
                    'createType="streamOptimized"',
                    'CreateType="monolithicFlat"',
                    'RW 8192 SPARSE "disk.vmdk"',
                    'RW 8192 FLAT "/etc/passwd" 0',
                    'rw 8192 sparse "nbd:x"',
                    "version=1",
                    "ddb.x = 1",
                    "# comment",
                    "nonsense",
                    "\xff",
                    "\0",
                ]
            ),
            max_size=8,
        )
    )
    def test_descriptors_are_judged_strictly(self, made: dict[str, bytes], text: list[str]) -> None:
        """Of any lines: taken is only one type that is sparse and one extent without a path."""
        body = "\n".join(text).encode("latin-1")
        data = images.patched(made["vmdk monolithicSparse"], 512, body.ljust(20 * 512, b"\0")[: 20 * 512])
        if judge("vmdk", data, 64 * KIB) is None:
            return
        seen = body.partition(b"\0")[0].lower()
        assert seen.count(b"createtype") == 1
        assert b"monolithicsparse" in seen or b"streamoptimized" in seen
        assert seen.count(b"8192") == 1
        assert b"/" not in seen
        assert b"nbd:" not in seen


class TestQcow2:
    """The header parser."""

    @given(st.binary(max_size=200))
    def test_any_bytes(self, data: bytes) -> None:
        """A header, or Qcow2Error."""
        with contextlib.suppress(Qcow2Error):
            parse_header(data)

    @given(st.binary(min_size=68, max_size=200), st.sampled_from([2, 3]))
    def test_any_fields(self, rest: bytes, version: int) -> None:
        """With magic and version in place; what is taken keeps to the specification."""
        data = b"QFI\xfb" + struct.pack(">I", version) + rest[4:]
        try:
            header = parse_header(data)
        except Qcow2Error:
            return
        assert header.version == version
        assert 512 <= header.cluster_size <= 2 * MIB
        assert header.cluster_size & (header.cluster_size - 1) == 0
        assert header.virtual_size == int.from_bytes(data[24:32], "big")
        assert header.encrypted == (data[32:36] != b"\0\0\0\0")
        assert version == 3 or header.incompatible == 0

    @given(st.sampled_from([2, 3]), st.binary(max_size=5000), st.integers(0, 600))
    def test_backing_format(self, version: int, rest: bytes, length: int) -> None:
        """Whatever stands in the header's extensions, a text or a refusal comes of them."""
        data = b"QFI\xfb" + version.to_bytes(4, "big") + bytes(12) + b"\0\0\0\x10" + bytes(76)
        with contextlib.suppress(Qcow2Error):
            assert isinstance(_qcow2.read_backing_format(io.BytesIO(data + length.to_bytes(4, "big") + rest)), str)

    @given(
        st.sampled_from([2, 3]),
        st.integers(9, 21),
        st.integers(0, (1 << 64) - 1),
        st.integers(0, (1 << 64) - 1),
        st.integers(0, 2),
        st.integers(0, (1 << 64) - 1),
    )
    def test_what_was_written_is_read(
        self, version: int, cluster_bits: int, size: int, backing: int, crypt: int, incompatible: int
    ) -> None:
        """Each field at its place, from bytes, bytearrays and views."""
        data = struct.pack(">4sIQIIQI", b"QFI\xfb", version, backing, 99, cluster_bits, size, crypt)
        data = (data.ljust(72, b"\0") + struct.pack(">Q", incompatible)).ljust(_qcow2.HEADER_BYTES, b"\0")
        for form in (data, bytearray(data), memoryview(data)):
            header = parse_header(form)
            assert (header.version, header.cluster_size, header.virtual_size) == (version, 1 << cluster_bits, size)
            assert (header.backing_offset, header.backing_length) == (backing, 99)
            assert header.encrypted is (crypt != 0)
            assert header.incompatible == (incompatible if version == 3 else 0)
