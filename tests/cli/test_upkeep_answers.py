"""What the commands about the whole cache answer: the keys and types of their JSON are an API."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any

from nova_imagecache.testing import FaultPlan

from .conftest import OPTIONAL_INT, OPTIONAL_TEXT, Site, matches

USAGE: dict[str, Any] = {
    "base_count": int,
    **dict.fromkeys(("allocated", "bases", "staging", "trash", "overhead", "reclaimable", "total", "free"), int),
    **dict.fromkeys(("own_filesystem", "local", "complete"), bool),
    "reserved_disk_mb": OPTIONAL_INT,
}
CLEANED: dict[str, Any] = {
    "image_id": str,
    "verdict": str,
    "outcome": OPTIONAL_TEXT,
    "reason": str,
    "allocated": int,
    "users": int,
    "idle": OPTIONAL_INT,
    "entry": NoneType,
}
SWEPT: dict[str, Any] = {
    "image_id": NoneType,
    "verdict": str,
    "outcome": str,
    "reason": str,
    "allocated": NoneType,
    "users": NoneType,
    "idle": NoneType,
    "entry": str,
}


def test_usage_counts_bytes_and_reserves_mebibytes(site: Site) -> None:
    """``reserved_disk_mb`` only where it is asked for."""
    site.image("img")
    site.ok("ensure", "img")
    usage = site.ok("usage")
    matches(usage, USAGE)
    assert (usage["base_count"], usage["complete"], usage["reserved_disk_mb"]) == (1, True, None)
    assert usage["allocated"] == usage["bases"] + usage["staging"] + usage["trash"] + usage["overhead"]
    reserved = site.ok("usage", "--static-mb", "512")
    matches(reserved, USAGE)
    assert reserved["reserved_disk_mb"] >= 512


def test_cleanup_shows_its_plan_and_then_what_became_of_it(site: Site) -> None:
    """A dry run shows the very plan and changes nothing."""
    for image_id in ("used", "idle", "told"):
        site.image(image_id)
    site.ok("create-disk", "used", "vm-1")
    site.ok("ensure", "idle", "told")
    plan = site.ok("cleanup", "--dry-run", "--max-idle", "0", "--in-use", "told")
    for row in plan:
        matches(row, CLEANED)
        assert row["outcome"] is None
        assert row["reason"]
    assert [row["image_id"] for row in site.ok("list")] == ["idle", "told", "used"]
    done = site.ok("cleanup", "--max-idle", "0", "--in-use", "told")
    for row in done:
        matches(row, CLEANED)
    assert {row["image_id"]: row["verdict"] for row in done} == {row["image_id"]: row["verdict"] for row in plan}
    outcomes = {row["image_id"]: row["outcome"] for row in done}
    assert outcomes == {"used": "kept", "told": "kept", "idle": "removed"}
    assert [row["image_id"] for row in site.ok("list")] == ["told", "used"]


def test_cleanup_tells_what_dead_processes_left(site: Site) -> None:
    """A row for each left-over that went with it, behind the bases; a dry run sweeps nothing."""
    site.image("img")
    site.ok("ensure", "img")
    litter = site.path / "cache" / "staging" / "img.0123456789abcdef"
    litter.mkdir()
    assert len(site.ok("cleanup", "--dry-run")) == 1
    base, swept = site.ok("cleanup")
    matches(base, CLEANED)
    matches(swept, SWEPT)
    assert (swept["verdict"], swept["outcome"], swept["entry"]) == ("sweep", "swept", f"staging/{litter.name}")
    assert len(site.ok("cleanup")) == 1
    litter.mkdir()
    answer = site.run("cleanup")
    assert answer.code == 0
    assert f"staging/{litter.name}" in answer.out, "a table says it as well"


def test_cleanup_tells_what_could_not_be_swept(site: Site) -> None:
    """The exit code is 1, and there is a row that says why."""
    site.image("img")
    site.ok("ensure", "img")
    (site.path / "cache" / "staging" / "img.0123456789abcdef").mkdir()
    with FaultPlan().fail("fs.rmtree", match="img.0123456789abcdef", nth=0, error=PermissionError(1, "not permitted")):
        answer = site.run("cleanup", "-f", "json")
    assert answer.code == 1
    [failed] = [row for row in answer.data if row["outcome"] == "failed"]
    matches(failed, SWEPT)
    assert failed["entry"] == "staging/img.0123456789abcdef"
    assert "not permitted" in failed["reason"]


def test_cleanup_marks_first(site: Site) -> None:
    """With the configured idle time a first pass removes nothing."""
    site.image("img")
    site.ok("ensure", "img")
    (row,) = site.ok("cleanup")
    assert row["outcome"] == "marked"
    assert site.ok("show", "img")["unused_since"] is not None


def test_verify_reads_all_bases_or_those_named(site: Site) -> None:
    """Whole bases; the exit code is 0."""
    for image_id in ("b", "a"):
        site.image(image_id)
    site.ok("ensure", "a", "b")
    rows = site.ok("verify")
    for row in rows:
        matches(row, {"image_id": str, "result": str, "error_type": OPTIONAL_TEXT, "error": OPTIONAL_TEXT})
    assert [(row["image_id"], row["result"]) for row in rows] == [("a", "whole"), ("b", "whole")]
    assert [row["image_id"] for row in site.ok("verify", "b")] == ["b"]


def test_verify_finds_damage_and_the_next_ensure_mends_it(site: Site) -> None:
    """The exit code is 1 where a base is damaged, and every base is looked at."""
    for image_id in ("a", "b"):
        site.image(image_id)
    rows = site.ok("ensure", "a", "b")
    with Path(rows[0]["location"]).open("r+b") as base:
        base.seek(4096)
        base.write(b"damage")
    answer = site.run("verify", "-f", "json")
    assert answer.code == 1
    assert [(row["image_id"], row["result"]) for row in answer.data] == [("a", "damaged"), ("b", "whole")]
    assert answer.data[0]["error_type"] == "BaseCorruptError"
    site.ok("ensure", "a")
    assert [row["result"] for row in site.ok("verify")] == ["whole", "whole"]


def test_recover_lists_what_it_found(site: Site) -> None:
    """Nothing to sweep is an empty list; a dead staging entry is a row."""
    site.image("img")
    site.ok("ensure", "img")
    assert site.ok("recover") == []
    (site.path / "cache" / "staging" / "img.0123456789abcdef").mkdir()
    rows = site.ok("recover")
    for row in rows:
        matches(row, {"entry": str, "outcome": str, "reason": OPTIONAL_TEXT})
    assert [row["outcome"] for row in rows] == ["removed"]


def test_check_gives_facts_and_problems(site: Site) -> None:
    """The exit code is 1 where a fact is a problem."""
    answer = site.run("check", "-f", "json")
    for row in answer.data:
        matches(row, {"name": str, "value": str, "ok": bool, "problem": OPTIONAL_TEXT})
        assert row["ok"] == (row["problem"] is None)
    assert answer.code == (0 if all(row["ok"] for row in answer.data) else 1)


def test_check_fails_where_there_is_a_problem(site: Site) -> None:
    """A user that is to read bases and does not exist is a problem."""
    site.configure('qemu_user = "nobody-of-this-name"')
    answer = site.run("check", "-f", "json")
    assert answer.code == 1
    assert any(row["problem"] for row in answer.data)


def test_backends_work_without_a_configuration(site: Site) -> None:
    """What is installed can be asked before there is a configuration; with one, the chosen ones are marked."""
    rows = site.ok("backends")
    for row in rows:
        matches(row, {"kind": str, "name": str, "configured": bool})
    chosen = {(row["kind"], row["name"]) for row in rows if row["configured"]}
    assert chosen == {("backend", "qcow2"), ("source", "directory")}
    site.config.unlink()
    bare = site.ok("backends")
    assert [row["name"] for row in bare] == [row["name"] for row in rows]
    assert {row["configured"] for row in bare} == {None}
