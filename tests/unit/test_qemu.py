"""qemu-img: the format of every file stated, limits on every call, and errors that say what is meant."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.images import bomb as compressed_bomb
from nova_imagecache import _exec, _fs, _qcow2, _qemu
from nova_imagecache.exceptions import CommandError, DiskInUseError, NoSpaceError
from unit import images
from unit.images import MIB, SIZE

Limits = _exec.Limits


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Limits | None, float]]:
    """Every call of a child process: argv, limits, time-out."""
    made: list[tuple[list[str], Limits | None, float]] = []
    original = _exec.run

    def recording(
        argv: list[str],
        *,
        timeout: float,
        limits: Limits | None = None,
        stage: str | None = None,
        checkpoint: Callable[[], None] | None = None,
    ) -> str:
        made.append((list(argv), limits, timeout))
        return original(argv, timeout=timeout, limits=limits, stage=stage, checkpoint=checkpoint)

    monkeypatch.setattr(_exec, "run", recording)
    return made


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.write_bytes(images.guest_data())
    return path


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qcow2 image of less than 2 MiB that unpacks to 128."""
    image = tmp_path_factory.mktemp("bomb") / "image"
    image.write_bytes(compressed_bomb(128 * MIB))
    return image


@pytest.fixture
def overlay(tmp_path: Path, base: Path) -> Path:
    path = tmp_path / "overlay"
    _qemu.create_overlay(path, backing=str(base), backing_format="raw", cluster_size=None, size=2 * SIZE)
    return path


@contextmanager
def opened(path: Path, qemu_format: str) -> Iterator[None]:
    """Somebody has the disk open for writing and lets nobody else, as a guest's QEMU."""
    if qemu_format == "raw":
        # qemu-io shares raw disks. A guest's device does not: block/file-posix.c locks bytes 201 (write), 203 (resize)
        with path.open("rb") as file:
            for byte in (201, 203):
                lock = struct.pack("hhqqi0q", fcntl.F_RDLCK, 0, byte, 1, 0)
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
            yield
        return
    argv = ["qemu-io", "-f", qemu_format, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"length\n")
        holder.stdin.flush()
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.stdin.close()
            holder.wait(20)


def chain(path: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(
        images.qemu_img("info", "-f", "qcow2", "--backing-chain", "--output=json", path)
    )
    return found


def same(first: Path, second: Path, first_format: str = "qcow2", second_format: str = "raw") -> None:
    images.qemu_img("compare", "-f", first_format, "-F", second_format, first, second)


def after(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_every_call_states_its_formats_and_has_limits(
    tmp_path: Path, base: Path, calls: list[tuple[list[str], Limits | None, float]]
) -> None:
    """A guessed format is how guests read the host's files (CVE-2013-7130 and its kin)."""
    image = tmp_path / "image"
    image.write_bytes(images.converted(tmp_path, "qcow2"))
    disk = tmp_path / "disk"
    _qemu.measure(image, "qcow2")
    _qemu.convert(image, "qcow2", tmp_path / "out", virtual_size=SIZE)
    _qemu.create_overlay(disk, backing=str(base), backing_format="raw", cluster_size=None, size=SIZE)
    _qemu.resize(disk, "qcow2", 2 * SIZE)
    _qemu.set_backing(disk, str(tmp_path / "out"), "raw")
    _qemu.flatten(disk, 2 * SIZE)
    wanted = {
        "measure": {"-f": "qcow2", "-O": "qcow2"},
        "convert": {"-f": "qcow2", "-O": "raw"},
        "create": {"-f": "qcow2", "-F": "raw"},
        "resize": {"-f": "qcow2"},
    }
    assert [argv[1] for argv, _, _ in calls] == ["measure", "convert", "create", "resize", "rebase", "rebase"]
    for argv, limits, timeout in calls:
        assert argv[0] == "qemu-img"
        for flag, value in wanted.get(argv[1], {}).items():
            assert after(argv, flag) == value, argv
        assert limits is not None
        assert limits.cpu is not None
        assert limits.memory is not None
        assert 0 < timeout < 1000
    rebases = [argv for argv, _, _ in calls if argv[1] == "rebase"]
    assert [after(argv, "-f") for argv in rebases] == ["qcow2", "qcow2"]
    assert after(rebases[0], "-F") == "raw"
    # what is dropped needs no format
    assert after(rebases[1], "-b") == ""


def test_calls_that_write_data_are_limited_in_file_size(
    tmp_path: Path, calls: list[tuple[list[str], Limits | None, float]]
) -> None:
    """A conversion cannot write more than the size that was checked, and a little."""
    image = tmp_path / "image"
    image.write_bytes(images.created(tmp_path, "qcow2", size=1 << 30))
    _qemu.convert(image, "qcow2", tmp_path / "out", virtual_size=1 << 30)
    limits = calls[0][1]
    assert limits is not None
    assert limits.file_size is not None
    assert 1 << 30 <= limits.file_size <= (1 << 30) + 128 * MIB


def test_time_grows_with_the_size(tmp_path: Path, calls: list[tuple[list[str], Limits | None, float]]) -> None:
    """A large image is not taken for a hanging one."""
    image = tmp_path / "image"
    for size in (SIZE, 1 << 40):
        image.write_bytes(images.created(tmp_path, "qcow2", size=size))
        _qemu.convert(image, "qcow2", tmp_path / f"out{size}", virtual_size=size)
    assert calls[1][2] > 100 * calls[0][2]


@pytest.mark.parametrize("kind", sorted(kind for kind, (name, _) in images.MAKERS.items() if name in _qemu.FORMATS))
def test_every_format_converts_to_the_same_bytes(tmp_path: Path, kind: str) -> None:
    """Under the image service's names for them; holes are kept."""
    declared, maker = images.MAKERS[kind]
    image, target = tmp_path / "image", tmp_path / "target"
    image.write_bytes(maker(tmp_path))
    _qemu.convert(image, declared, target, virtual_size=SIZE)
    if declared == "raw":
        assert target.read_bytes() == image.read_bytes()
    else:
        assert target.read_bytes() == images.guest_data()
    assert target.stat().st_blocks * 512 < MIB or declared == "raw"
    # formats with coarse blocks are taken to be full of data
    assert _qemu.measure(image, declared) < (MIB if declared in ("qcow2", "vmdk") else SIZE + MIB)


def test_a_conversion_with_another_format_than_the_files_fails(tmp_path: Path) -> None:
    """What is stated is what is opened, whatever the bytes look like."""
    image = tmp_path / "image"
    image.write_bytes(images.guest_data())
    with pytest.raises(CommandError) as caught:
        _qemu.convert(image, "qcow2", tmp_path / "out", virtual_size=SIZE)
    assert "not in qcow2 format" in caught.value.stderr
    assert caught.value.stage == "convert"


def test_a_conversion_stops_at_a_checkpoint(tmp_path: Path, bomb: Path) -> None:
    """A cancelled call leaves no qemu-img at work."""

    def checkpoint() -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        _qemu.convert(bomb, "qcow2", tmp_path / "out", virtual_size=128 * MIB, checkpoint=checkpoint)
    # stopped before it made the file, where the machine is busy
    assert not (tmp_path / "out").exists() or (tmp_path / "out").stat().st_blocks * 512 < 128 * MIB


def test_a_bomb_measures_what_it_unpacks_to(bomb: Path) -> None:
    """A small file of 128 MiB of data says so before it is converted."""
    assert bomb.stat().st_size < 2 * MIB
    assert _qemu.measure(bomb, "qcow2") >= 128 * MIB


def test_a_conversion_that_outgrows_its_size_is_stopped(tmp_path: Path, bomb: Path) -> None:
    """A header that lied to the inspector costs no more than a little slack."""
    with pytest.raises(CommandError):
        _qemu.convert(bomb, "qcow2", tmp_path / "out", virtual_size=MIB)
    assert (tmp_path / "out").stat().st_blocks * 512 <= 66 * MIB


def test_an_overlay_names_its_backing_file_and_format(overlay: Path, base: Path, tmp_path: Path) -> None:
    """In its header, so that nobody ever guesses; the size is its own."""
    top, below = chain(overlay)
    assert (top["backing-filename"], top["backing-filename-format"]) == (str(base), "raw")
    assert top["virtual-size"] == 2 * SIZE
    assert below["filename"] == str(base)
    grown = tmp_path / "grown"
    grown.write_bytes(base.read_bytes() + bytes(SIZE))
    same(overlay, grown)


def test_a_relative_backing_name_stays_relative(tmp_path: Path, base: Path) -> None:
    """A moved directory takes its link along; the name need not resolve when it is written."""
    (tmp_path / "vm").mkdir()
    disk = tmp_path / "vm" / "disk"
    _qemu.create_overlay(disk, backing="disk.base", backing_format="raw", cluster_size=None, size=SIZE)
    assert images.info(disk, "qcow2")["backing-filename"] == "disk.base"
    (tmp_path / "vm" / "disk.base").hardlink_to(base)
    (tmp_path / "vm").rename(tmp_path / "moved")
    same(tmp_path / "moved" / "disk", base)


def test_an_overlay_has_the_cluster_size_asked_for(tmp_path: Path, base: Path) -> None:
    """That of its base, so that writes copy no more than a cluster."""
    disk = tmp_path / "disk"
    _qemu.create_overlay(disk, backing=str(base), backing_format="raw", cluster_size=2 * MIB, size=SIZE)
    assert images.info(disk, "qcow2")["cluster-size"] == 2 * MIB


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_a_disk_grows(tmp_path: Path, disk_format: str) -> None:
    """Its content stays; what is new reads as zeros."""
    disk = tmp_path / "disk"
    disk.write_bytes(images.guest_data() if disk_format == "raw" else images.converted(tmp_path, "qcow2"))
    _qemu.resize(disk, disk_format, 3 * SIZE)
    assert images.info(disk, disk_format)["virtual-size"] == 3 * SIZE
    grown = tmp_path / "grown"
    grown.write_bytes(images.guest_data() + bytes(2 * SIZE))
    same(disk, grown, disk_format)


def test_a_raw_disk_with_a_qcow2_header_grows_as_raw(tmp_path: Path) -> None:
    """What a guest wrote is never believed (CVE-2026-24708)."""
    disk = tmp_path / "disk"
    disk.write_bytes(images.created(tmp_path, "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw").ljust(SIZE, b"\0"))
    before = disk.read_bytes()
    _qemu.resize(disk, "raw", 2 * SIZE)
    assert disk.read_bytes() == before + bytes(SIZE)


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_an_open_disk_is_not_resized(tmp_path: Path, disk_format: str) -> None:
    """QEMU locks what it has open; the error says that, not how."""
    disk = tmp_path / "disk"
    disk.write_bytes(images.guest_data() if disk_format == "raw" else images.created(tmp_path, "qcow2"))
    with opened(disk, disk_format), pytest.raises(DiskInUseError) as caught:
        _qemu.resize(disk, disk_format, 2 * SIZE)
    assert caught.value.stage == "resize"
    assert isinstance(caught.value.__cause__, CommandError)
    _qemu.resize(disk, disk_format, 2 * SIZE)


def test_an_open_overlay_is_neither_flattened_nor_attached(overlay: Path, base: Path) -> None:
    """Both change what a guest is using."""
    with opened(overlay, "qcow2"):
        with pytest.raises(DiskInUseError):
            _qemu.flatten(overlay, 2 * SIZE)
        with pytest.raises(DiskInUseError):
            _qemu.set_backing(overlay, str(base), "raw")


def test_a_flattened_overlay_stands_alone(overlay: Path, base: Path, tmp_path: Path) -> None:
    """The same bytes, and no backing file."""
    _qemu.flatten(overlay, 2 * SIZE)
    grown = tmp_path / "grown"
    grown.write_bytes(base.read_bytes() + bytes(SIZE))
    base.unlink()
    assert len(chain(overlay)) == 1
    same(overlay, grown)


def test_another_backing_name_changes_the_header_alone(overlay: Path, base: Path, tmp_path: Path) -> None:
    """The content is taken to be the same."""
    moved = tmp_path / "moved"
    base.rename(moved)
    _qemu.set_backing(overlay, str(moved), "raw")
    assert chain(overlay)[0]["backing-filename"] == str(moved)
    assert len(chain(overlay)) == 2


def test_the_version_is_one_line() -> None:
    """For check()."""
    assert _qemu.version().startswith("qemu-img version ")
    assert "\n" not in _qemu.version()


@pytest.mark.services
def test_a_full_disk_is_no_space_error(xfs_path: Path, bomb: Path) -> None:
    """Not a bad image: the same call works when there is room."""
    figures = os.statvfs(xfs_path)
    fd = _fs.create(xfs_path / "ballast", 0o600)
    _fs.allocate(fd, figures.f_bavail * figures.f_frsize - 40 * MIB)
    os.close(fd)
    with pytest.raises(NoSpaceError) as caught:
        _qemu.convert(bomb, "qcow2", xfs_path / "out", virtual_size=128 * MIB)
    assert caught.value.stage == "convert"
    (xfs_path / "ballast").unlink()
    _qemu.convert(bomb, "qcow2", xfs_path / "other", virtual_size=128 * MIB)


@pytest.mark.parametrize(("first", "second"), [(1023, 9), (9, 1023), (300, 301)])
def test_another_backing_file_changes_one_block(tmp_path: Path, first: int, second: int) -> None:
    """File and format change within the first 4 KiB: whatever dies meanwhile, the header is the old or the new one."""
    path = tmp_path / "overlay"
    _qemu.create_overlay(path, backing="a" * first, backing_format="raw", cluster_size=None, size=SIZE)
    before = path.read_bytes()
    _qemu.set_backing(path, "b" * second, "qcow2")
    after = path.read_bytes()
    assert len(after) == len(before)
    assert after[4096:] == before[4096:]
    with path.open("rb") as file:
        assert _qcow2.read_backing_name(file) == "b" * second
        file.seek(0)
        assert _qcow2.read_backing_format(file) == "qcow2"
