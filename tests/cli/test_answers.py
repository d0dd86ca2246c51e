"""What every command answers: the keys and types of its JSON are an API."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import NoneType
from typing import Any

import pytest

from .conftest import MIB, OPTIONAL_INT, OPTIONAL_TEXT, TIME, Site, matches

ENSURED: dict[str, Any] = {
    "image_id": str,
    "result": str,
    "format": OPTIONAL_TEXT,
    "virtual_size": OPTIONAL_INT,
    "size": OPTIONAL_INT,
    "digest": OPTIONAL_TEXT,
    "location": OPTIONAL_TEXT,
    "error_type": OPTIONAL_TEXT,
    "error": OPTIONAL_TEXT,
}
DISK: dict[str, Any] = {
    "disk_id": str,
    "name": str,
    "image_id": str,
    "format": str,
    "virtual_size": int,
    "reference": str,
    "location": str,
    "location_type": str,
}
LISTED: dict[str, Any] = {
    "image_id": str,
    "format": str,
    "virtual_size": int,
    "allocated": int,
    "users": OPTIONAL_INT,
    "idle": OPTIONAL_INT,
    "pinned": bool,
    "managed": bool,
    "last_used": OPTIONAL_TEXT,
    "unused_since": OPTIONAL_TEXT,
}
SHOWN: dict[str, Any] = {
    "image_id": str,
    "format": str,
    "virtual_size": int,
    "size": int,
    "location": str,
    "location_type": str,
    "managed": bool,
    "digest": OPTIONAL_TEXT,
    "evidence": str,
    "made_by": str,
    "source": str,
    "source_format": str,
    "source_size": int,
    "fetched_at": str,
    "last_used": OPTIONAL_TEXT,
    "unused_since": OPTIONAL_TEXT,
    "inspector": int,
    "allocated": int,
    "idle": OPTIONAL_INT,
    "users": (list, NoneType),
    "pins": list,
}


def test_ensure_answers_with_a_row_for_each_image(site: Site) -> None:
    """One image or several: a list, in the order of the arguments, each image once."""
    site.image("b")
    site.image("a")
    rows = site.ok("ensure", "b", "a", "b")
    for row in rows:
        matches(row, ENSURED)
    assert [(row["image_id"], row["result"], row["error"]) for row in rows] == [
        ("b", "ready", None),
        ("a", "ready", None),
    ]
    assert rows[0]["virtual_size"] == MIB
    assert rows[0]["digest"].startswith("sha512:")
    assert Path(rows[0]["location"]).read_bytes()[:2] == b"\xeb\x3c"


def test_one_image_that_fails_stops_no_other(site: Site) -> None:
    """The exit code is that of the first failure; what went well is in the answer all the same."""
    site.image("good")
    site.image("queued", status="queued")
    answer = site.run("ensure", "missing", "queued", "good", "-f", "json")
    assert answer.code == 4
    for row in answer.data:
        matches(row, ENSURED)
    outcomes = [(row["image_id"], row["result"], row["error_type"]) for row in answer.data]
    assert outcomes == [
        ("missing", "failed", "ImageNotFoundError"),
        ("queued", "failed", "ImageNotActiveError"),
        ("good", "ready", None),
    ]
    lines = answer.err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("nova-imagecache: error: ") for line in lines)


def test_precache_reads_a_list_and_keeps_its_order(site: Site) -> None:
    """Arguments first, then the file's lines, without comments and blanks."""
    for image_id in ("c", "b", "a"):
        site.image(image_id)
    listing = site.path / "images.txt"
    listing.write_text("# golden images\n\nb  # the second\n a \n")
    rows = site.ok("precache", "c", "--file", str(listing))
    assert [row["image_id"] for row in rows] == ["c", "b", "a"]
    for row in rows:
        matches(row, ENSURED)


def test_precache_reads_standard_input(site: Site) -> None:
    """A list can come from a pipe."""
    site.image("a")
    answer = site.spawn("precache", "--file", "-", "-f", "json", input="a\n")
    assert (answer.code, answer.err) == (0, "")
    assert [row["image_id"] for row in answer.data] == ["a"]


def test_create_disk_answers_with_the_disk_to_boot_from(site: Site) -> None:
    """A second call shows the same disk."""
    site.image("img")
    disk = site.ok("create-disk", "img", "vm-1", "--size", "5M")
    matches(disk, DISK)
    assert (disk["disk_id"], disk["name"], disk["virtual_size"]) == ("vm-1", "disk", 5 * MIB)
    assert site.ok("create-disk", "img", "vm-1", "--size", str(5 * MIB)) == disk
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", disk["location"]], check=True, capture_output=True, text=True
    )
    facts = json.loads(info.stdout)
    assert (facts["format"], facts["virtual-size"]) == (disk["format"], disk["virtual_size"])


def test_disks_lists_every_root_disk(site: Site) -> None:
    """By id and name."""
    site.image("img")
    site.ok("create-disk", "img", "vm-2")
    site.ok("create-disk", "img", "vm-1", "--name", "disk.rescue")
    rows = site.ok("disks")
    for row in rows:
        matches(row, DISK)
    assert [(row["disk_id"], row["name"]) for row in rows] == [("vm-1", "disk.rescue"), ("vm-2", "disk")]


def test_remove_disk_says_what_is_gone(site: Site) -> None:
    """The disk, and nothing else of the instance."""
    site.image("img")
    location = site.ok("create-disk", "img", "vm-1")["location"]
    assert site.ok("remove-disk", "vm-1") == {"disk_id": "vm-1", "name": "disk", "removed": True}
    assert not os.path.lexists(location)


def test_list_shows_users_idle_time_and_pins(site: Site) -> None:
    """By image id; a base with users is not idle."""
    for image_id in ("b", "a"):
        site.image(image_id)
    site.ok("create-disk", "b", "vm-1")
    site.ok("ensure", "a")
    site.ok("pin", "a", "me")
    rows = site.ok("list")
    for row in rows:
        matches(row, LISTED)
        assert row["last_used"] is None or TIME.fullmatch(row["last_used"])
    assert [(row["image_id"], row["users"], row["pinned"]) for row in rows] == [("a", 0, True), ("b", 1, False)]
    assert rows[1]["idle"] is None
    assert 0 < rows[0]["allocated"] <= 2 * MIB


def test_show_tells_all(site: Site) -> None:
    """Facts, users and how each is known, pins with their ends."""
    site.qcow2("img")
    site.ok("create-disk", "img", "vm-1")
    site.ok("pin", "img", "me")
    site.ok("pin", "img", "you", "--until", "2099-01-01T00:00:00+01:00")
    facts = site.ok("show", "img")
    matches(facts, SHOWN)
    assert (facts["source_format"], facts["format"], facts["evidence"]) == ("qcow2", "raw", "os_hash")
    assert facts["virtual_size"] == 8 * MIB
    assert facts["source_size"] == (site.images / "img.img").stat().st_size
    assert TIME.fullmatch(facts["fetched_at"])
    (user,) = facts["users"]
    matches(user, {"disk_id": OPTIONAL_TEXT, "name": OPTIONAL_TEXT, "known_by": str, "certain": bool, "detail": str})
    pins = sorted(facts["pins"], key=lambda pin: str(pin["owner"]))
    assert pins == [{"owner": "me", "until": None}, {"owner": "you", "until": "2098-12-31T23:00:00Z"}]


def test_pin_and_unpin_answer_with_the_pin(site: Site) -> None:
    """A pin ends at a time, after a while, or never."""
    site.image("img")
    site.ok("ensure", "img")
    assert site.ok("pin", "img", "me") == {"image_id": "img", "owner": "me", "until": None}
    until = site.ok("pin", "img", "you", "--until", "2099-01-01")
    assert until == {"image_id": "img", "owner": "you", "until": "2099-01-01T00:00:00Z"}
    lasting = site.ok("pin", "img", "they", "--for", "7d")
    assert TIME.fullmatch(lasting["until"])
    assert site.ok("unpin", "img", "me") == {"image_id": "img", "owner": "me", "pinned": True}
    site.ok("unpin", "img", "you")
    assert site.ok("unpin", "img", "they") == {"image_id": "img", "owner": "they", "pinned": False}


def test_remove_takes_an_unused_base(site: Site) -> None:
    """The base is gone when the command answers."""
    site.image("img")
    site.ok("ensure", "img")
    assert site.ok("remove", "img") == {"image_id": "img", "removed": True}
    assert site.ok("list") == []


@pytest.mark.parametrize("command", [["list"], ["disks"], ["verify"], ["recover"], ["cleanup"]])
def test_an_empty_cache_answers_with_an_empty_list(site: Site, command: list[str]) -> None:
    """Before its first use a cache is empty, not an error."""
    assert site.ok(*command) == []


def test_sizes_are_bytes_for_programs_and_words_for_people(site: Site) -> None:
    """Tables have headings and units; json, yaml, value and csv have neither."""
    site.image("img")
    site.ok("ensure", "img")
    table = site.run("list").out
    assert "| Image ID |" in table
    assert "1 MiB" in table
    assert site.run("list", "-f", "value", "-c", "virtual_size").out == f"{MIB}\n"
    assert f"virtual_size: {MIB}" in site.run("show", "img", "-f", "yaml").out
    assert site.run("list", "-f", "csv", "-c", "image_id", "--quote", "none").out == "image_id\nimg\n"
    assert site.run("list", "-c", "Virtual Size", "-f", "value").out == f"{MIB}\n"


def test_what_scripts_read_has_no_words_of_python(site: Site) -> None:
    """Nothing, true, false and lists: as JSON says them, and empty where a field may be."""
    site.image("img")
    site.ok("ensure", "img")
    site.ok("pin", "img", "me")
    columns = ["-c", "pinned", "-c", "unused_since", "-c", "users", "-c", "managed"]
    assert site.run("list", "-f", "value", *columns).out == "0 true true null\n"
    assert site.run("list", "-f", "csv", *columns).out.splitlines()[1] == '"0","true","true",""'
    shown = ["-c", "managed", "-c", "unused_since", "-c", "pins", "-c", "users"]
    pins = '[{"owner": "me", "until": null}]'
    assert site.run("show", "img", "-f", "value", *shown).out.splitlines() == ["true", "null", "[]", pins]
    assert site.run("show", "img", "-f", "shell", *shown).out.splitlines() == [
        'managed="true"',
        'unused_since=""',
        'users="[]"',
        'pins="' + pins.replace('"', '\\"') + '"',
    ]


def test_rows_can_be_sorted_by_any_column(site: Site) -> None:
    """Also by one with gaps."""
    for image_id in ("a", "b"):
        site.image(image_id)
        site.ok("ensure", image_id)
    site.ok("create-disk", "b", "vm-1")
    rows = site.ok("list", "--sort-column", "idle")
    assert [row["image_id"] for row in rows] == ["b", "a"]
    assert "vm-1" not in site.run("list", "--sort-column", "last_used").out
