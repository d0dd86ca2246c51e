"""How errors end a command: one line on stderr, the exception's exit code, never a traceback."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from nova_imagecache.testing import FaultPlan

from .conftest import MIB, Answer, Site


def fails(answer: Answer, code: int, *words: str) -> None:
    assert answer.code == code, answer
    assert "Traceback" not in answer.err
    (line,) = answer.err.splitlines()
    assert line.startswith("nova-imagecache: error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    "command",
    [
        ["show", "absent"],
        ["remove", "absent"],
        ["verify", "absent"],
        ["ensure", "absent"],
        ["precache", "absent"],
        ["create-disk", "absent", "vm-1"],
        ["remove-disk", "absent"],
    ],
)
def test_what_is_not_there_is_4(site: Site, command: list[str]) -> None:
    """Images, bases and root disks alike; the line names what was asked for."""
    fails(site.run(*command), 4, "absent")


@pytest.mark.parametrize("bad", ["../x", "a/b", "", "x" * 1024, "\u00fc", "-", ".hidden"])
@pytest.mark.parametrize("command", ["ensure", "show", "remove", "verify"])
def test_a_bad_image_id_is_2(site: Site, command: str, bad: str) -> None:
    """Before anything is looked up or made."""
    fails(site.run(command, "--", bad), 2)


@pytest.mark.parametrize(
    "command",
    [
        ["create-disk", "img", "../x"],
        ["create-disk", "img", "vm-1", "--name", "a/b"],
        ["create-disk", "img", "vm-1", "--name", "disk.json"],
        ["create-disk", "img", "vm-1", "--size", "0"],
        ["remove-disk", "a/b"],
        ["pin", "img", "a/b"],
        ["precache", "--file", "/does/not/exist"],
        ["precache"],
        ["list", "-c", "colour"],
        ["ensure", "img", "-c", "colour"],
        ["help", "nonsense"],
        ["nonsense"],
        ["--nonsense"],
    ],
)
def test_a_bad_request_is_2(site: Site, command: list[str]) -> None:
    """Ids, names, sizes, files, columns and commands; nothing is done first."""
    site.image("img")
    fails(site.run(*command), 2)
    assert not (site.path / "disks").exists() or not any((site.path / "disks").iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["ensure"],
        ["show"],
        ["create-disk", "img"],
        ["create-disk", "img", "vm-1", "--size", "big"],
        ["create-disk", "img", "vm-1", "--size", "-5"],
        ["pin", "img", "me", "--until", "tomorrow"],
        ["pin", "img", "me", "--for", "ever"],
        ["pin", "img", "me", "--for", "7d", "--until", "2099-01-01"],
        ["usage", "--static-mb", "-1"],
        ["cleanup", "--max-idle", "soon"],
        ["list", "-f", "xml"],
        ["list", "extra"],
        ["ensure", "img", "--deadline", "soon"],
    ],
)
def test_usage_errors_are_2(site: Site, command: list[str]) -> None:
    """The parser shows the usage of that command and says what is wrong."""
    answer = site.run(*command)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"usage: nova-imagecache {command[0]} ")
    assert f"nova-imagecache {command[0]}: error: " in answer.err


def test_no_configuration_is_2(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says how to name one."""
    site.config.unlink()
    fails(site.run("list"), 2, str(site.config), "--config", "NOVA_IMAGECACHE_CONFIG")
    fails(site.run("--config", "/does/not/exist.toml", "list"), 2, "/does/not/exist.toml")
    fails(site.run("--config", "/does/not/exist.toml", "backends"), 2, "/does/not/exist.toml")


def test_all_problems_of_a_configuration_are_told_at_once(site: Site) -> None:
    """One line, every problem."""
    site.configure('max_idle = "soon"\nmax_bytes = "much"\ncolour = "red"')
    fails(site.run("list"), 2, "max_idle", "max_bytes", "colour")
    site.config.write_text("root = ")
    fails(site.run("list"), 2, str(site.config))


@pytest.mark.parametrize("text", ['backend = "nonsense"', "backend_options = {colour = 1}"])
def test_a_backend_that_cannot_be_had_is_2(site: Site, text: str) -> None:
    """An unknown name, or options that the plug-in does not know."""
    site.configure(text)
    fails(site.run("list"), 2)


@pytest.mark.parametrize("change", [{"layout": 99}, {"storage": "tape"}])
def test_a_root_of_another_kind_is_2(site: Site, change: dict[str, object]) -> None:
    """A newer layout, or what another backend keeps there: nothing is touched."""
    site.ok("list")
    stamp = site.path / "cache" / "cache.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | change))
    fails(site.run("list"), 2, str(site.path / "cache"))
    fails(site.run("ensure", "img"), 2, str(site.path / "cache"))


@pytest.mark.parametrize("root", ["/etc/hostname", "/proc/cache", "/etc/hostname/cache"])
def test_a_root_that_cannot_be_opened_is_2(site: Site, root: str) -> None:
    """It is the configuration that names it."""
    site.config.write_text(site.config.read_text().replace(f"{site.path}/cache", root))
    fails(site.run("list"), 2, root)


def test_a_full_filesystem_under_a_new_root_is_75(site: Site) -> None:
    """There may be room later."""
    with FaultPlan().fail(0):
        fails(site.run("list"), 75, "no space")


def test_a_pin_that_would_be_over_is_2(site: Site) -> None:
    """The pin that the owner has stays."""
    site.image("img")
    site.ok("ensure", "img")
    site.ok("pin", "img", "me")
    for end in (["--until", "2001-01-01"], ["--for", "0"]):
        fails(site.run("pin", "img", "me", *end), 2, "over already")
    assert site.ok("show", "img")["pins"] == [{"owner": "me", "until": None}]


def test_the_next_step_is_one_of_the_command_line(site: Site) -> None:
    """Where a deed has another name in Python, both are told."""
    fails(site.run("show", "absent"), 4, "ensure, or ensure_base in Python")
    site.image("img", os_hash_value=None, os_hash_algo=None)
    fails(site.run("ensure", "img"), 3, "turn on allow_unverified")
    site.image("img")
    site.ok("ensure", "img")
    fails(site.run("--disks", "/does/not/exist", "remove", "img"), 3, "/does/not/exist", "Correct its name")
    site.ok("create-disk", "img", "vm-1")
    fails(site.run("remove", "img"), 3, "flatten_root_disk in Python")


def test_a_base_in_use_is_3(site: Site) -> None:
    """The line names the root disk."""
    site.image("img")
    site.ok("create-disk", "img", "vm-1")
    fails(site.run("remove", "img"), 3, "used by")
    site.ok("remove-disk", "vm-1")
    site.ok("remove", "img")


def test_a_base_that_cannot_be_read(site: Site) -> None:
    """It is told of by its name, damaged and not absent, and goes as a base goes."""
    site.image("img")
    site.ok("create-disk", "img", "vm-1")
    record = site.path / "cache" / "bases" / "img" / "base.json"
    record.unlink()
    record.write_text("{")
    for command, code, words in (
        ("show", 4, "cannot be read: its record cannot be read: not JSON"),
        ("verify", 1, "ensure; or remove it"),
        ("remove", 3, "used by 1 root disk(s): vm-1/disk"),
    ):
        answer = site.run(command, "img")
        assert (answer.code, "Traceback" in answer.err) == (code, False), answer
        assert words in answer.err.splitlines()[-1]
    assert site.run("remove-disk", "vm-1").code == 0
    assert site.run("remove", "img").code == 0
    fails(site.run("remove", "img"), 4, "no base of this image")


def test_a_pinned_base_is_3(site: Site) -> None:
    """The line names the owner; a pin that is over does not count."""
    site.image("img")
    site.ok("ensure", "img")
    site.ok("pin", "img", "golden")
    fails(site.run("remove", "img"), 3, "pinned by golden")
    site.ok("unpin", "img", "golden")
    site.ok("remove", "img")


def test_a_disk_that_is_another_is_3(site: Site) -> None:
    """Another image or another size under the same id; a size below the image's."""
    for image_id in ("img", "other"):
        site.image(image_id)
    site.ok("create-disk", "img", "vm-1", "--size", "2M")
    fails(site.run("create-disk", "other", "vm-1"), 3, "vm-1")
    fails(site.run("create-disk", "img", "vm-1", "--size", "3M"), 3, "vm-1")
    fails(site.run("create-disk", "img", "vm-2", "--size", "512K"), 3, str(MIB))


def test_an_image_that_must_not_be_used_is_3(site: Site) -> None:
    """Not active, or unsafe."""
    site.image("queued", status="queued")
    site.qcow2("chained", backing=Path("/etc/passwd"))
    fails(site.run("ensure", "queued"), 3, "queued")
    fails(site.run("ensure", "chained"), 3, "refused")


def test_an_image_whose_digest_differs_is_1(site: Site) -> None:
    """Nothing of it stays."""
    site.image("img", os_hash_value="0" * 128)
    fails(site.run("ensure", "img"), 1, "damaged")
    assert site.ok("list") == []


def test_no_space_is_75(site: Site) -> None:
    """A later call may succeed: sysexits' EX_TEMPFAIL."""
    site.configure('min_free_bytes = "1000P"')
    site.image("img")
    fails(site.run("ensure", "img"), 75, "space")


@pytest.mark.parametrize(("image_id", "code"), [("unavailable", 75), ("forbidden", 1), ("broken", 1)])
def test_a_source_that_fails_has_its_own_code(site: Site, image_id: str, code: int) -> None:
    """Also one that raises what it should not: one line, whatever it raised."""
    site.drip()
    fails(site.spawn("ensure", image_id), code, image_id)
    fails(site.spawn("create-disk", image_id, "vm-1"), code, image_id)


@pytest.mark.parametrize("command", [["ensure", "img"], ["create-disk", "img", "vm-1"]])
def test_a_deadline_that_passes_is_75(site: Site, command: list[str]) -> None:
    """And nothing of the fetch stays."""
    site.drip()
    fails(site.spawn(*command, "--deadline", "0.3"), 75, "deadline")
    assert not any((site.path / "cache" / "staging").iterdir())


def test_debug_shows_the_traceback_and_keeps_the_code(site: Site) -> None:
    """The last word is still the exception's."""
    answer = site.run("--debug", "show", "absent")
    assert answer.code == 4
    assert "Traceback" in answer.err
    assert "BaseNotFoundError" in answer.err


def test_the_same_holds_for_the_real_process(site: Site) -> None:
    """``python -m nova_imagecache`` ends with the code and says the line."""
    fails(site.spawn("show", "absent"), 4, "absent")
    answer = site.spawn("ensure")
    assert (answer.code, "usage: nova-imagecache ensure" in answer.err) == (2, True)


def test_an_answer_that_cannot_be_written_is_1(site: Site) -> None:
    """A full disk behind stdout is said once."""
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            site.argv("backends", "-f", "json"),
            env=site.child_env(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    fails(Answer(done.returncode, "", done.stderr), 1, "No space left")
