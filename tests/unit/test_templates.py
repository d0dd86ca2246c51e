"""Overlays from templates are byte for byte what qemu-img makes, and take no child process."""

from __future__ import annotations

import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness.children import child
from harness.gates import Gate
from harness.images import qemu_img
from nova_imagecache import _fs, _qcow2, _qemu
from nova_imagecache.backends._templates import Template, Templates
from nova_imagecache.exceptions import CommandError
from nova_imagecache.testing import FaultPlan

GIB = 2**30
SHAPES = [
    *(("raw", None, size) for size in (512, 2**20 + 512, GIB, 10 * GIB, 10 * 2**40)),
    *(("qcow2", cluster, size) for cluster in (4096, 65536, 2**21) for size in (2**20, 10 * GIB)),
    ("qcow2", 2**21, 10 * 2**40),
]


def overlay(templates: Templates, path: Path, backing: str, base: str, cluster: int | None, size: int) -> bytes:
    fd = _fs.create(path, 0o600)
    templates.get(base, cluster, size).write(fd, backing)
    os.close(fd)
    return path.read_bytes()


@pytest.mark.parametrize(("base", "cluster", "size"), SHAPES)
@pytest.mark.parametrize("backing", ["disk.base", "disk.rescue.base", "/a/long/path" + "/x" * 300 + "/disk"])
def test_an_overlay_is_what_qemu_img_makes(
    tmp_path: Path, base: str, cluster: int | None, size: int, backing: str
) -> None:
    """Of every shape, with every name, byte for byte; and no less sparse."""
    ours = overlay(Templates(tmp_path / "root"), tmp_path / "ours", backing, base, cluster, size)
    options = [] if cluster is None else ["-o", f"cluster_size={cluster}"]
    named = ("-F", base, "-b", backing, str(tmp_path / "theirs"), str(size))
    qemu_img("create", "-q", "-u", "-f", "qcow2", *options, *named)
    assert ours == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").stat().st_blocks <= (tmp_path / "theirs").stat().st_blocks


def test_qemu_img_runs_once_for_a_shape(tmp_path: Path) -> None:
    """Also for the next process, which reads what the first one kept."""
    with FaultPlan() as plan:
        first = overlay(Templates(tmp_path), tmp_path / "a", "disk.base", "raw", None, GIB)
    assert [step.name for step in plan.trace].count("exec.run") == 1
    with FaultPlan() as plan:
        again = Templates(tmp_path)
        assert overlay(again, tmp_path / "b", "disk.base", "raw", None, GIB) == first
        assert overlay(again, tmp_path / "c", "disk.base", "raw", None, GIB) == first
    assert "exec.run" not in {step.name for step in plan.trace}
    assert list((tmp_path / "staging").iterdir()) == []


def together(templates: Templates, count: int = 12) -> list[Template | Exception]:
    """What so many threads get that ask for one shape at the same moment."""
    barrier = threading.Barrier(count)

    def one(_number: int) -> Template | Exception:
        barrier.wait(20)
        try:
            return templates.get("raw", None, GIB)
        except CommandError as err:
            return err

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_of_threads_that_want_a_new_shape_together_one_makes_it(tmp_path: Path) -> None:
    """And all get the same."""
    with FaultPlan() as plan:
        made = together(Templates(tmp_path))
    assert isinstance(made[0], Template)
    assert made == [made[0]] * len(made)
    assert [step.name for step in plan.trace].count("exec.run") == 1
    assert list((tmp_path / "staging").iterdir()) == []


def test_where_the_first_thread_fails_the_others_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reasons may be its own."""
    failed = threading.Event()
    true_make = _qemu.create_overlay

    def create_overlay(path: Path, **options: Any) -> None:
        if not failed.is_set():
            failed.set()
            raise CommandError(["qemu-img"], 1, "no")
        true_make(path, **options)

    monkeypatch.setattr(_qemu, "create_overlay", create_overlay)
    templates = Templates(tmp_path)
    made = together(templates)
    assert sum(isinstance(one, CommandError) for one in made) == 1
    assert made.count(templates.get("raw", None, GIB)) == len(made) - 1


def test_a_thread_that_hangs_keeps_the_others_for_a_while_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They make it themselves."""
    monkeypatch.setattr("nova_imagecache.backends._templates._PATIENCE", 0.2)
    gate = Gate(monkeypatch, Templates, "_make")
    templates = Templates(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        hangs = pool.submit(templates.get, "raw", None, GIB)
        gate.wait()
        assert all(isinstance(one, Template) for one in together(templates, 3))
        gate.open()
        assert hangs.result(20) == templates.get("raw", None, GIB)


def test_a_child_waits_for_no_thread_of_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which made a template when it forked."""
    monkeypatch.setattr("nova_imagecache.backends._templates._PATIENCE", 600.0)
    gate = Gate(monkeypatch, Templates, "_make")
    templates = Templates(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(templates.get, "raw", None, GIB)
        gate.wait()
        with child(lambda: templates.get("raw", None, GIB)) as process:
            made = process.result()
        gate.open()
        assert making.result(20) == made


def test_a_damaged_template_is_made_anew(tmp_path: Path) -> None:
    """A file that somebody cut off or swapped is not handed to a guest."""
    good = overlay(Templates(tmp_path), tmp_path / "a", "disk.base", "raw", None, GIB)
    (kept,) = (tmp_path / "templates").iterdir()
    for bad in (b"", good[:40], good[:24] + (1).to_bytes(8, "big") + good[32:]):
        kept.unlink()
        kept.write_bytes(bad)
        assert (
            overlay(Templates(tmp_path), tmp_path / f"b{len(bad)}{bad[-1:].hex()}", "disk.base", "raw", None, GIB)
            == good
        )


@pytest.mark.parametrize(("base", "cluster", "size"), SHAPES)
def test_a_template_that_was_cut_off_is_made_anew(tmp_path: Path, base: str, cluster: int | None, size: int) -> None:
    """Wherever that was: behind the header, within a table, or at its last byte."""
    good = overlay(Templates(tmp_path), tmp_path / "good", "disk.base", base, cluster, size)
    (kept,) = (tmp_path / "templates").iterdir()
    kept.chmod(0o600)
    whole = kept.stat().st_size
    step = cluster or 65536
    for number, length in enumerate([*range(0, whole, step), 104, step + 8, whole - 1]):
        os.truncate(kept, length)
        assert overlay(Templates(tmp_path), tmp_path / f"{number}", "disk.base", base, cluster, size) == good
        assert kept.stat().st_size == whole


def test_a_name_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """As qemu-img refuses it: the specification allows 1023 bytes, and no more than the header's cluster holds."""
    templates = Templates(tmp_path)
    for number, (cluster, length) in enumerate([(None, 1024), (512, 400)]):
        template = templates.get("raw" if cluster is None else "qcow2", cluster, GIB)
        fd = _fs.create(tmp_path / f"x{number}", 0o600)
        with pytest.raises(_qcow2.Qcow2Error, match=f"{length} bytes does not fit"):
            template.write(fd, "n" * length)
        os.close(fd)
        assert (tmp_path / f"x{number}").stat().st_size == 0
        options = [] if cluster is None else ["-o", f"cluster_size={cluster}"]
        argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", *options, "-F", "raw", "-b", "n" * length]
        assert subprocess.run([*argv, str(tmp_path / "y"), str(GIB)], capture_output=True, check=False).returncode != 0
