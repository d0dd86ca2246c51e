"""Images are judged on the live stream: what may come in, what is refused, and after how many bytes."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_imagecache._inspect import INSPECTOR_VERSION, StreamInspector, inspect_file
from nova_imagecache.exceptions import ImageRejectedError
from unit import images
from unit.images import KIB, MIB, SIZE

CHUNK = 64 * KIB
STEP = 64 * KIB
KINDS = sorted(images.MAKERS)
DECLARED = ("raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi", "iso", "ami", "aki", "ari")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every accepted image, by name."""
    directory = tmp_path_factory.mktemp("made")
    return {name: maker(directory) for name, (_, maker) in images.MAKERS.items()}


def judge(declared: str, data: bytes, chunk: int = CHUNK) -> StreamInspector:
    """The inspector after the whole stream."""
    inspector = StreamInspector(declared, image_id="img")
    for offset in range(0, len(data), chunk):
        inspector.feed(data[offset : offset + chunk])
    inspector.finish()
    return inspector


def refused(declared: str, data: bytes, chunk: int = CHUNK) -> tuple[str, int]:
    """(why, after how many bytes) an image is refused."""
    inspector = StreamInspector(declared, image_id="img")
    fed = 0
    try:
        for offset in range(0, len(data), chunk):
            fed = min(offset + chunk, len(data))
            inspector.feed(data[offset : offset + chunk])
        inspector.finish()
    except ImageRejectedError as err:
        if err.image_id == "img":
            return err.reason, fed
    pytest.fail(f"taken as {declared}, or refused without the image's id")


def verdict(declared: str, data: bytes, cuts: list[int]) -> tuple[str, int | None]:
    """What is decided of an image that comes in pieces of these sizes, over and over."""
    inspector = StreamInspector(declared)
    try:
        position, index = 0, 0
        while position < len(data):
            step = cuts[index % len(cuts)]
            inspector.feed(data[position : position + step])
            position, index = position + step, index + 1
        inspector.finish()
    except ImageRejectedError as err:
        return err.reason, None
    return "taken", inspector.virtual_size


def qcow2_header(data: bytes, **fields: int) -> bytes:
    """The qcow2 image with fields of its header changed."""
    places = {
        "version": (4, ">I"),
        "backing_offset": (8, ">Q"),
        "backing_length": (16, ">I"),
        "cluster_bits": (20, ">I"),
        "size": (24, ">Q"),
        "crypt": (32, ">I"),
        "refcount_table": (56, ">I"),
        "incompatible": (72, ">Q"),
        "refcount_order": (96, ">I"),
        "length": (100, ">I"),
        "compression": (104, ">B"),
    }
    for name, value in fields.items():
        offset, layout = places[name]
        data = images.patched(data, offset, struct.pack(layout, value))
    return data


def vmdk_descriptor(data: bytes, old: bytes, new: bytes) -> bytes:
    """The VMDK with its descriptor changed, in its place and of the old length."""
    start, length = 512, 20 * 512
    text = data[start : start + length].rstrip(b"\0")
    assert old in text
    text = text.replace(old, new)
    return images.patched(data, start, text.ljust(length, b"\0"))


# --- what is taken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_accepted_format_passes_and_says_its_virtual_size(made: dict[str, bytes], kind: str) -> None:
    """What the image service may call a disk image comes in, with the size a guest will see."""
    declared = images.MAKERS[kind][0]
    inspector = judge(declared, made[kind])
    assert inspector.done
    assert inspector.decided
    if declared in images.RAW_DECLARED:
        assert (inspector.disk_format, inspector.virtual_size) == ("raw", None)
    else:
        assert (inspector.disk_format, inspector.virtual_size) == (declared, SIZE)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith(("vmdk", "vhdx"))])
def test_most_formats_are_decided_by_the_first_mebibyte(made: dict[str, bytes], kind: str) -> None:
    """The verdict is there early, so that nothing is fetched for an image that is refused."""
    inspector = StreamInspector(images.MAKERS[kind][0])
    fed = 0
    for offset in range(0, MIB, STEP):
        if inspector.done:
            break
        inspector.feed(made[kind][offset : offset + STEP])
        fed = offset + STEP
    assert inspector.done
    assert fed <= MIB


def test_a_vhdx_is_decided_within_four_mebibytes(tmp_path: Path) -> None:
    """Its metadata lies behind its log."""
    data = images.created(tmp_path, "vhdx", size=SIZE).ljust(8 * MIB, b"\0")
    inspector = StreamInspector("vhdx")
    for offset in range(0, 4 * MIB, STEP):
        inspector.feed(data[offset : offset + STEP])
    assert inspector.done
    assert inspector.virtual_size == SIZE


def test_a_streamed_vmdk_tells_its_size_early_and_its_verdict_late(tmp_path: Path) -> None:
    """The virtual size is compared with the disk before all of it came; the footer counts at the end."""
    data = images.streamed_vmdk(tmp_path, size=64 * MIB, padding=2 * MIB)
    inspector = StreamInspector("vmdk")
    for offset in range(0, MIB, STEP):
        inspector.feed(data[offset : offset + STEP])
    assert inspector.decided
    assert not inspector.done
    assert inspector.virtual_size == 64 * MIB
    inspector.feed(data[MIB:])
    inspector.finish()
    assert inspector.done


def test_a_vhd_rounded_to_cylinders_is_taken(tmp_path: Path) -> None:
    """Without force_size a VHD's header says the size that was asked for; QEMU rounds it up."""
    data = images.converted(tmp_path, "vpc", "-o", "subformat=dynamic", size=20 * MIB)
    size = judge("vhd", data).virtual_size
    assert size is not None
    assert 20 * MIB <= size < 21 * MIB


def test_text_is_a_raw_image_like_any_other() -> None:
    """A script, an initrd's list, a text that turns into binary: bytes of a disk."""
    for data in (b"#!ipxe\nboot\n" * 99, b"hello " * 200 + bytes(range(128, 256)) * 4000, b"a", b"version=1\n" * 9999):
        assert judge("raw", data).disk_format == "raw"
        assert judge("aki", data).disk_format == "raw"


def test_a_fat_boot_sector_is_raw() -> None:
    """It has the signature of a partition table, and code where the table would be."""
    sector = bytearray(512)
    sector[:3], sector[0x10], sector[0x15], sector[510:] = b"\xeb\x3c\x90", 2, 0xF8, b"\x55\xaa"
    assert judge("raw", bytes(sector) + bytes(SIZE)).done


@pytest.mark.parametrize("declared", ["aki", "ari", "ami"])
def test_a_kernel_for_x86_is_no_partitioned_disk(declared: str) -> None:
    """Its boot flag is the signature of a partition table, without a table before it: for a disk that is refused."""
    assert judge(declared, images.kernel()).disk_format == "raw"
    reason, fed = refused("raw", images.kernel(), STEP)
    assert "gpt" in reason
    assert fed <= MIB


def test_feeding_after_the_verdict_is_harmless(made: dict[str, bytes]) -> None:
    """The caller need not look before it feeds, nor before it finishes."""
    inspector = judge("qcow2", made["qcow2 v3"])
    inspector.feed(b"QED\0" + bytes(512))
    inspector.finish()
    inspector.finish()
    assert inspector.virtual_size == SIZE


@given(
    kind=st.sampled_from(KINDS),
    declared=st.sampled_from((*DECLARED, *(images.MAKERS[kind][0] for kind in KINDS))),
    cuts=st.lists(st.integers(min_value=1, max_value=3 * MIB), min_size=1, max_size=5).filter(
        lambda cuts: sum(cuts) / len(cuts) > 5000
    ),
)
def test_the_verdict_does_not_depend_on_the_chunks(
    made: dict[str, bytes], kind: str, declared: str, cuts: list[int]
) -> None:
    """A source may give bytes in pieces of any size."""
    data = made[kind]
    assert verdict(declared, data, cuts) == verdict(declared, data, [CHUNK])


@pytest.mark.parametrize("chunk", [1, 3, 511, 4096, 10 * MIB])
def test_a_text_vmdk_is_found_in_chunks_of_any_size(chunk: int) -> None:
    """A descriptor without a sparse header is a VMDK too, also when it comes a few bytes at a time."""
    text = b'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 8 FLAT "/etc/shadow" 0\n'
    reason, _ = refused("raw", text + b"# more text\n" * 99 + bytes(4096), chunk)
    assert "vmdk" in reason


# --- what is refused -------------------------------------------------------------------------------------------------


def allowed(declared: str, kind: str) -> bool:
    """Whether an image of this kind may be declared so (NOVA.md C1: GPT is raw, AMIs are what they like)."""
    own = images.MAKERS[kind][0]
    if declared in ("ami", "aki", "ari"):
        return own in ("raw", "iso", "ami", "aki", "ari") and kind != "iso hybrid"
    if declared == "raw":
        return own in ("raw", "ami", "aki", "ari") and kind != "aki for x86"
    return own == declared


@pytest.mark.parametrize("declared", DECLARED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_declared_must_be_what_is_found(made: dict[str, bytes], kind: str, declared: str) -> None:
    """A wrong label is refused in every pairing (CVE-2024-40767)."""
    if allowed(declared, kind):
        assert judge(declared, made[kind]).done
    else:
        _, fed = refused(declared, made[kind])
        limit = 4 * MIB if declared == "vhdx" else MIB
        assert fed <= limit or kind == "vmdk with footer"


@pytest.mark.parametrize("declared", ["raw", "qcow2", "vhd", "vdi", "iso", "ami"])
def test_wrong_labels_are_refused_within_a_mebibyte(tmp_path: Path, declared: str) -> None:
    """Also where the format that is there is one that decides late."""
    for maker in ("qcow2", "vmdk", "vhdx"):
        if maker == declared:
            continue
        data = images.created(tmp_path, maker, size=64 * MIB).ljust(9 * MIB, b"\1")
        _, fed = refused(declared, data, STEP)
        assert fed <= MIB


def test_unknown_formats_are_refused_before_a_byte() -> None:
    """Glance knows formats that nobody here takes; the error lists those that are."""
    for declared in ("ploop", "docker", "qed", "luks", "", "QCOW2"):
        with pytest.raises(ImageRejectedError, match=r"not supported \(supported: aki, ami, ari, iso, qcow2, raw"):
            StreamInspector(declared)


@pytest.mark.parametrize("kind", ["qcow2 v3", "qcow2 v2"])
def test_a_backing_file_is_refused_early(tmp_path: Path, kind: str) -> None:
    """It would let a guest read the host's files (CVE-2013-1922 and kin)."""
    compat = "1.1" if kind.endswith("3") else "0.10"
    target = tmp_path / "overlay"
    options = f"compat={compat},backing_file=/etc/passwd,backing_fmt=raw"
    images.qemu_img("create", "-q", "-u", "-f", "qcow2", "-o", options, target, str(SIZE))
    reason, fed = refused("qcow2", target.read_bytes().ljust(8 * MIB, b"\0"), STEP)
    assert "backing" in reason
    assert fed <= MIB


def test_a_data_file_is_refused_early(tmp_path: Path) -> None:
    """It would be opened, and even created, by whoever opens the image (CVE-2024-32498)."""
    data = images.created(tmp_path, "qcow2", "-o", f"data_file={tmp_path}/data,data_file_raw=on")
    reason, fed = refused("qcow2", data.ljust(8 * MIB, b"\0"), STEP)
    assert "data_file" in reason
    assert fed <= MIB


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"incompatible": 1 << 5}, "feature"),
        ({"incompatible": 1 << 63}, "feature"),
        ({"incompatible": 1 << 2}, "data_file"),
        ({"incompatible": 1 << 1}, "corrupt"),
        ({"version": 4}, "version"),
        ({"version": 1}, "version"),
        ({"version": 0}, "version"),
        ({"crypt": 1}, "encrypted"),
        ({"crypt": 2}, "encrypted"),
        ({"backing_offset": 1}, "backing"),
        ({"cluster_bits": 8}, "cluster_bits"),
        ({"cluster_bits": 22}, "cluster_bits"),
        ({"size": 0}, "virtual size"),
        ({"size": 1 << 63}, "virtual size"),
        ({"size": (1 << 64) - 1}, "virtual size"),
    ],
)
def test_qcow2_headers_outside_the_rules_are_refused_early(
    made: dict[str, bytes], fields: dict[str, int], words: str
) -> None:
    """Features nobody knows, sizes nobody has, keys nobody holds, versions nobody wrote."""
    reason, fed = refused("qcow2", qcow2_header(made["qcow2 v3"], **fields).ljust(8 * MIB, b"\0"), STEP)
    assert words in reason
    assert fed <= MIB


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"refcount_table": 0}, "reference counts"),
        ({"refcount_order": 7}, "refcount_order 7"),
        ({"length": 103}, "header of 103 bytes"),
        ({"length": (64 << 10) + 8}, "header of 65544 bytes"),
        ({"compression": 1}, "compression type 1"),
        ({"incompatible": 1 << 3}, "compression type 0"),
    ],
)
def test_qcow2_headers_that_qemu_refuses_are_refused(
    made: dict[str, bytes], tmp_path: Path, fields: dict[str, int], words: str
) -> None:
    """No disk on such a base would open."""
    (tmp_path / "image").write_bytes(qcow2_header(made["qcow2 v3"], **fields))
    with pytest.raises(subprocess.CalledProcessError):
        images.qemu_img("info", "-f", "qcow2", tmp_path / "image")
    reason, fed = refused("qcow2", (tmp_path / "image").read_bytes().ljust(8 * MIB, b"\0"), STEP)
    assert words in reason
    assert fed <= MIB


@pytest.mark.parametrize(
    "encryption", ["format=aes", pytest.param("format=luks,encrypt.iter-time=10", marks=pytest.mark.slow)]
)
def test_an_encrypted_qcow2_is_refused(tmp_path: Path, encryption: str) -> None:
    """Nobody here has its key."""
    data = images.encrypted(tmp_path, "qcow2", f"encrypt.{encryption},encrypt.key-secret=key")
    assert "encrypted" in refused("qcow2", data)[0]


@pytest.mark.parametrize("declared", ["raw", "qcow2", "ami"])
def test_qed_is_refused_whatever_it_is_called(tmp_path: Path, declared: str) -> None:
    """Nobody supports it, QEMU opens it."""
    _, fed = refused(declared, images.created(tmp_path, "qed").ljust(8 * MIB, b"\0"), STEP)
    assert fed <= MIB


@pytest.mark.parametrize("declared", ["raw", "qcow2", "ami"])
@pytest.mark.parametrize("version", [1, 2])
def test_luks_is_refused_whatever_it_is_called(declared: str, version: int) -> None:
    """Encrypted content cannot be judged."""
    text = (b"aes", b"xts-plain64", b"sha256")
    header = struct.pack(">6sH32s32s32sII20s32sI", b"LUKS\xba\xbe", version, *text, 4096, 32, b"\1", b"\2", 1000)
    _, fed = refused(declared, header.ljust(8 * MIB, b"\0"), STEP)
    assert fed <= MIB


@pytest.mark.slow
def test_luks_from_qemu_img_is_refused(tmp_path: Path) -> None:
    """Making one means stretching a passphrase for seconds."""
    data = images.encrypted(tmp_path, "luks", "key-secret=key,iter-time=10")
    assert "luks" in refused("raw", data)[0]


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse"])
@pytest.mark.parametrize("declared", ["vmdk", "raw"])
def test_vmdk_that_lies_in_several_files_is_refused(tmp_path: Path, subformat: str, declared: str) -> None:
    """Its descriptor names files of the host (CVE-2022-47951)."""
    refused(declared, images.created(tmp_path, "vmdk", "-o", f"subformat={subformat}"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'SPARSE "', b'SPARSE "/etc/'),
        (b'SPARSE "', b'SPARSE "nbd:localhost:'),
        (b'SPARSE "', b'SPARSE "..\\'),
        (b" SPARSE ", b" FLAT "),
        (b'createType="monolithicSparse"', b'createType="monolithicFlat"'),
        (b'createType="monolithicSparse"', b'createType="monolithicSparse"\nCREATETYPE="monolithicFlat"'),
        (b'createType="monolithicSparse"', b'createtype="monolithicSparse"\ncreateType="monolithicFlat"'),
        (b'createType="monolithicSparse"', b""),
        (b"RW ", b'RW 8 SPARSE "other.vmdk"\nRW '),
        (b"RW ", b"# RW "),
        (b"RW ", b'RW\t8 FLAT "/etc/passwd" 0\nRW '),
        (b"# The Disk Data Base", b"an unknown line"),
        (b"version=1", b"version=1\n\xff"),
    ],
)
def test_vmdk_descriptors_outside_the_rules_are_refused(made: dict[str, bytes], old: bytes, new: bytes) -> None:
    """Exactly one type, exactly one sparse extent, with a plain name."""
    refused("vmdk", vmdk_descriptor(made["vmdk monolithicSparse"], old, new))


def test_a_vmdk_of_capacity_0_is_refused(made: dict[str, bytes]) -> None:
    """QEMU then opens what its descriptor names."""
    refused("vmdk", images.patched(made["vmdk monolithicSparse"], 12, struct.pack("<Q", 0)))


@pytest.mark.parametrize(
    ("offset", "new"),
    [
        (-1024, b"KDMX"),
        (-1024 + 4, struct.pack("<I", 2)),
        (-1024 + 28, struct.pack("<Q", 99)),
        (-1024 + 36, struct.pack("<Q", 1)),
        (-1024 + 56, b"\xff" * 8),
        (-1536 + 12, struct.pack("<I", 1)),
        (-512, b"\1"),
    ],
)
def test_a_vmdk_whose_footer_differs_is_refused(made: dict[str, bytes], offset: int, new: bytes) -> None:
    """QEMU believes the footer, so it must say what the header said."""
    refused("vmdk", images.patched(made["vmdk with footer"], offset, new))


def test_a_vmdk_whose_footer_has_another_capacity_is_refused(made: dict[str, bytes]) -> None:
    """The virtual size that is compared with the disk is the one that QEMU will use."""
    refused("vmdk", images.patched(made["vmdk with footer"], -1024 + 12, struct.pack("<Q", 1 << 40)))


@pytest.mark.parametrize("creator", [b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0", b"vpc ", b"qemu", b"vbox"])
@pytest.mark.parametrize("largest", [False, True])
def test_a_vhd_is_as_large_as_qemu_takes_it_for(tmp_path: Path, creator: bytes, largest: bool) -> None:
    """Resized, its current size is another than its original one; some makers go by cylinders, heads and sectors."""
    data = images.created(tmp_path, "vpc", "-o", "subformat=dynamic", size=300 * MIB)
    geometry = struct.pack(">HBB", 65535, 16, 255) if largest else data[56:60]
    for at in (0, len(data) - 512):
        data = images.patched(data, at + 28, creator)
        data = images.patched(data, at + 40, struct.pack(">QQ", 64 * MIB, 299 * MIB) + geometry)
        footer = images.patched(data[at : at + 512], 64, bytes(4))
        data = images.patched(data, at + 64, struct.pack(">I", ~sum(footer) & 0xFFFF_FFFF))
    path = tmp_path / "patched"
    path.write_bytes(data)
    assert judge("vhd", data).virtual_size == images.info(path, "vpc")["virtual-size"]


@pytest.mark.parametrize("length", [0, 16])
def test_a_vhdx_whose_size_is_no_number_is_refused(made: dict[str, bytes], length: int) -> None:
    """The metadata item says that it is of another length than a size has."""
    data = made["vhdx"]
    item = data.index(bytes.fromhex("2442a52f1bcd7648b2115dbed83bf4b8"))
    reason, _fed = refused("vhdx", images.patched(data, item + 20, struct.pack("<I", length)))
    assert "not the vhdx image" in reason


def test_a_differencing_vhd_is_refused(made: dict[str, bytes]) -> None:
    """It reads from another file, as a qcow2 with a backing file does."""
    reason, fed = refused("vhd", images.patched(made["vhd dynamic"], 60, struct.pack(">I", 4)), STEP)
    assert "VHD type 4" in reason
    assert fed <= MIB


def test_a_fixed_vhd_is_refused(tmp_path: Path) -> None:
    """It has its mark at the end only: seen from the front it is raw."""
    refused("vhd", images.created(tmp_path, "vpc", "-o", "subformat=fixed,force_size=on"))


def test_a_vhdx_with_far_metadata_is_refused_after_four_mebibytes(made: dict[str, bytes]) -> None:
    """The search for its size is not allowed to go through the whole image."""
    data = made["vhdx"]
    region = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
    for table in (192 * KIB, 256 * KIB):
        entry = data.index(region, table)
        data = images.patched(data, entry + 16, struct.pack("<Q", 12 * MIB))
    reason, fed = refused("vhdx", data.ljust(40 * MIB, b"\0"), STEP)
    assert "4 MiB" in reason
    assert fed <= 4 * MIB


@pytest.mark.parametrize("declared", ["qcow2", "iso", "raw", "ami"])
def test_a_qcow2_that_is_an_iso_too_is_refused(made: dict[str, bytes], declared: str) -> None:
    """Two formats at once: each program would see another disk."""
    _, fed = refused(declared, images.with_descriptor(made["qcow2 v3"]).ljust(8 * MIB, b"\0"), STEP)
    assert fed <= MIB


@pytest.mark.parametrize("declared", ["qcow2", "raw"])
def test_a_qcow2_with_a_partition_table_is_refused(made: dict[str, bytes], declared: str) -> None:
    """Only an ISO may be a partitioned disk as well."""
    _, fed = refused(declared, images.with_table(made["qcow2 v3"], 0xEE, 1).ljust(8 * MIB, b"\0"), STEP)
    assert fed <= MIB


@pytest.mark.parametrize("declared", ["ami", "aki", "ari"])
@pytest.mark.parametrize(
    "kind", ["qcow2 v3", "vmdk monolithicSparse", "vmdk with footer", "vhd dynamic", "vhdx", "vdi"]
)
@pytest.mark.parametrize("flag", [b"", b"\x55\xaa"], ids=["bare", "with a boot flag"])
def test_no_other_format_hides_in_a_kernel(made: dict[str, bytes], declared: str, kind: str, flag: bytes) -> None:
    """What a kernel may have in its first sector, another format may not have beside it."""
    data = images.patched(made[kind], 510, flag) if flag else made[kind]
    refused(declared, data)


def test_a_vhd_that_is_an_iso_too_is_refused(made: dict[str, bytes]) -> None:
    """Formats that begin where the other has room."""
    refused("vhd", images.with_descriptor(made["vhd dynamic"]))


@pytest.mark.parametrize(
    "table",
    [
        images.partition_table(0xEE, 1)[:16] + images.partition_table(0x83)[:16] + bytes(32) + b"\x55\xaa",
        b"\x42" + images.partition_table(0x83)[1:],
        images.partition_table(0xEE, 77),
        bytes(64) + b"\x55\xaa",
    ],
    ids=["GPT and more", "boot flag", "GPT elsewhere", "empty"],
)
def test_raw_disks_with_nonsense_for_a_partition_table_are_refused(table: bytes) -> None:
    """As Nova and Glance refuse them, by the same inspector."""
    data = images.guest_data()
    refused("raw", data[:446] + table + data[512:])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if images.MAKERS[kind][0] not in images.RAW_DECLARED])
@pytest.mark.parametrize("length", [1, 4, 63, 100])
def test_headers_cut_short_are_refused(made: dict[str, bytes], kind: str, length: int) -> None:
    """The stream ended before the image said what it is."""
    refused(images.MAKERS[kind][0], made[kind][:length])


@pytest.mark.parametrize("length", [200 * KIB, 600 * KIB, 2 * MIB + 4096])
def test_a_vhdx_cut_before_its_metadata_ends_is_refused(made: dict[str, bytes], length: int) -> None:
    """Its size is unknown then."""
    refused("vhdx", made["vhdx"][:length])


def test_a_streamed_vmdk_cut_before_its_footer_is_refused(made: dict[str, bytes]) -> None:
    """What stands at the end is then no footer."""
    data = made["vmdk with footer"]
    for length in (len(data) - 1, len(data) - 512, len(data) - 1536, len(data) // 2, 12000):
        refused("vmdk", data[:length])


def test_an_iso_cut_before_its_descriptor_is_refused() -> None:
    """It would be raw bytes, which is not what it claims."""
    refused("iso", images.iso()[: 33 * KIB])


@pytest.mark.parametrize("declared", ["qcow2", "vmdk", "vhd", "vhdx", "vdi", "iso"])
def test_an_empty_stream_is_no_image_of_a_format(declared: str) -> None:
    """Nothing fed, then the end."""
    refused(declared, b"")


# --- files that are here already -------------------------------------------------------------------------------------


def test_a_file_is_judged_by_the_same_rules(tmp_path: Path, made: dict[str, bytes]) -> None:
    """A newer inspector looks again at bases that lie in the cache."""
    path = tmp_path / "base"
    path.write_bytes(made["qcow2 v3"])
    inspect_file(path, "qcow2", image_id="img")
    path.write_bytes(qcow2_header(made["qcow2 v3"], incompatible=4))
    with pytest.raises(ImageRejectedError) as caught:
        inspect_file(path, "qcow2", image_id="img")
    assert caught.value.image_id == "img"
    assert INSPECTOR_VERSION >= 1
