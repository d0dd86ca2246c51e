"""Pins: an owner's word that a base stays."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nova_imagecache._layout import Root
from nova_imagecache._models import Pin
from nova_imagecache.testing import FaultPlan

NOW = 1_700_000_000.0


@pytest.fixture
def root(tmp_path: Path) -> Root:
    made = Root(tmp_path / "cache", "files")
    made.prepare()
    return made


def owners(root: Root, image_id: str = "img", now: float = NOW) -> list[str]:
    return [pin.owner for pin in root.pins(image_id, now)]


def test_a_pin_holds_until_it_is_taken_away(root: Root) -> None:
    """Its owner's word, for good."""
    assert root.pins("img", NOW) == ()
    pin = Pin(image_id="img", owner="nova", until=None)
    root.pin(pin)
    assert root.pins("img", NOW) == (pin,)
    assert root.pins("img", NOW * 10) == (pin,)
    root.unpin("img", "nova")
    assert root.pins("img", NOW) == ()


def test_a_pin_with_an_end_holds_up_to_it(root: Root) -> None:
    """At its very end it holds no more."""
    pin = Pin(image_id="img", owner="nova", until=NOW + 10)
    root.pin(pin)
    assert root.pins("img", NOW + 9.9) == (pin,)
    assert root.pins("img", NOW + 10) == ()


def test_each_owner_has_one_pin(root: Root) -> None:
    """A second one takes the first one's place; others' stay."""
    root.pin(Pin(image_id="img", owner="nova", until=NOW + 10))
    root.pin(Pin(image_id="img", owner="me", until=None))
    root.pin(Pin(image_id="img", owner="nova", until=NOW + 99))
    assert root.pins("img", NOW) == (
        Pin(image_id="img", owner="me"),
        Pin(image_id="img", owner="nova", until=NOW + 99),
    )
    root.unpin("img", "me")
    assert owners(root) == ["nova"]


def test_pins_of_images_are_apart(root: Root) -> None:
    """Also where one id begins like another."""
    root.pin(Pin(image_id="img", owner="nova"))
    root.pin(Pin(image_id="img.2", owner="me"))
    assert owners(root, "img") == ["nova"]
    assert owners(root, "img.2") == ["me"]
    assert root.pinned() == frozenset({"img", "img.2"})


def test_taking_away_what_is_not_there_is_fine(root: Root) -> None:
    """Neither owner nor image need be known."""
    root.unpin("img", "nova")
    root.pin(Pin(image_id="img", owner="me"))
    root.unpin("img", "nova")
    assert owners(root) == ["me"]


def test_the_last_pin_takes_its_directory_along(root: Root) -> None:
    """A pass lists pinned images by one look."""
    root.pin(Pin(image_id="img", owner="nova"))
    assert root.pinned() == frozenset({"img"})
    root.unpin("img", "nova")
    assert root.pinned() == frozenset()


def test_an_owner_may_hold_dots(root: Root) -> None:
    """Also what looks like a suffix."""
    for owner in ("a.json", "a", "a.b.c", "x" * 127):
        root.pin(Pin(image_id="i" * 127, owner=owner))
    assert set(owners(root, "i" * 127)) == {"a.json", "a", "a.b.c", "x" * 127}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"{}", b'{"until": "soon"}', b"\xff\xfe", b'{"until": [1]}']
)
def test_a_pin_that_cannot_be_read_holds(root: Root, content: bytes) -> None:
    """Doubt keeps the base."""
    root.pin(Pin(image_id="img", owner="nova", until=NOW - 10))
    assert owners(root) == []
    (root.path / "pins" / "img" / "nova.json").write_bytes(content)
    assert root.pins("img", NOW) == (Pin(image_id="img", owner="nova", until=None),)


def test_a_pin_that_cannot_be_opened_holds(root: Root) -> None:
    """Whatever stands there under the name of one."""
    (root.path / "pins" / "img" / "nova.json").mkdir(parents=True)
    assert owners(root) == ["nova"]


def test_other_files_are_no_pins(root: Root) -> None:
    """An editor's leftovers hold nothing."""
    root.pin(Pin(image_id="img", owner="nova", until=NOW + 1))
    (root.path / "pins" / "img" / "nova.json~").write_text('{"until": null}')
    assert owners(root) == ["nova"]
    assert owners(root, now=NOW + 1) == []


def test_a_pin_beside_the_last_ones_end_is_kept(root: Root) -> None:
    """The directory does not go with the last pin at the moment in which another is written."""
    root.pin(Pin(image_id="img", owner="old"))
    plan = FaultPlan()
    pause = plan.pause("fs.rename", match="me")
    errors: list[BaseException] = []

    def work() -> None:
        try:
            root.pin(Pin(image_id="img", owner="me"))
        except BaseException as err:  # noqa: BLE001 - reason: shown by the assertion below
            errors.append(err)

    with plan:
        thread = threading.Thread(target=work)
        thread.start()
        pause.wait()
        with ThreadPoolExecutor(1) as pool:
            unpinning = pool.submit(root.unpin, "img", "old")
            time.sleep(0.2)
            pause.release()
            unpinning.result(20)
        thread.join(20)
    assert errors == []
    assert owners(root) == ["me"]
    assert list(root.staging.iterdir()) == []


def test_a_pin_whose_directory_goes_and_comes_is_not_swept_with_an_older_one(root: Root) -> None:
    """The last other pin takes it away before it is held, and an earlier pin of this owner, over by now, brings it."""
    root.pin(Pin(image_id="img", owner="old"))
    directory = root.path / "pins" / "img"
    plan = FaultPlan()
    beginning = plan.pause("fs.mkdir", match="pins/img", when="after")
    writing = plan.pause("fs.mkdir", match="staging/nova.json", when="after")
    sweeping = plan.pause("fs.unlink", match="nova.json")
    root.unpin("img", "old")
    with plan, ThreadPoolExecutor(2) as pool:
        pinning = pool.submit(root.pin, Pin(image_id="img", owner="nova"))
        beginning.wait()
        root.unpin("img", "old")
        beginning.release()
        writing.wait()
        directory.mkdir(exist_ok=True)
        (directory / "nova.json").write_text(json.dumps({"until": NOW}))
        swept = pool.submit(root.sweep_pins, NOW)
        time.sleep(0.2)
        writing.release()
        pinning.result(20)
        sweeping.release()
        swept.result(20)
    assert owners(root) == ["nova"]


def test_many_pin_and_unpin_at_once(root: Root) -> None:
    """Nobody fails because of another, and in the end nobody's pin is lost."""
    errors: list[BaseException] = []

    def work(owner: str) -> None:
        try:
            for _ in range(10):
                root.pin(Pin(image_id="img", owner=owner))
                root.unpin("img", owner)
            root.pin(Pin(image_id="img", owner=owner))
        except BaseException as err:  # noqa: BLE001 - reason: shown by the assertion below
            errors.append(err)

    threads = [threading.Thread(target=work, args=(f"owner{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert owners(root) == [f"owner{n}" for n in range(4)]


def test_a_pin_that_fails_leaves_the_old_one(root: Root) -> None:
    """A full disk loses no word."""
    root.pin(Pin(image_id="img", owner="nova", until=NOW + 5))
    with FaultPlan().fail("fs.write"), pytest.raises(OSError, match="fault"):
        root.pin(Pin(image_id="img", owner="nova", until=None))
    assert root.pins("img", NOW) == (Pin(image_id="img", owner="nova", until=NOW + 5),)


def test_pins_that_are_over_are_swept(root: Root) -> None:
    """And nothing else: none that holds, none that cannot be read, and no other files."""
    for image_id in ("a", "b"):
        root.pin(Pin(image_id=image_id, owner="over", until=NOW))
    root.pin(Pin(image_id="b", owner="later", until=NOW + 1))
    root.pin(Pin(image_id="c", owner="endless"))
    for number, content in enumerate((b"{", b'{"until": null}', b'{"until": NaN}', b'{"until": 1' + b"0" * 400 + b"}")):
        (root.path / "pins" / "c" / f"odd{number}.json").write_bytes(content)
    (root.path / "pins" / "c" / "over.json~").write_text('{"until": 1}')
    (root.path / "pins" / "file").touch()
    before = sorted((root.path / "pins" / "c").iterdir())
    assert root.sweep_pins(NOW) == (["a/over", "b/over"], {})
    assert root.sweep_pins(NOW) == ([], {})
    assert root.pinned() == frozenset({"b", "c", "file"})
    assert owners(root, "b") == ["later"]
    assert sorted((root.path / "pins" / "c").iterdir()) == before


def test_a_pin_that_cannot_be_swept_is_told(root: Root) -> None:
    """It stops no other."""
    for image_id in ("a", "b"):
        root.pin(Pin(image_id=image_id, owner="over", until=NOW))
    with FaultPlan().fail("fs.unlink", match="pins/a", error=PermissionError(1, "not permitted")):
        removed, failed = root.sweep_pins(NOW)
    assert removed == ["b/over"]
    assert "not permitted" in failed["a"]
    assert root.sweep_pins(NOW) == (["a/over"], {})


def test_a_pin_that_is_renewed_while_it_is_swept_stays(root: Root) -> None:
    """It was read as ended, and its owner comes before it is gone."""
    root.pin(Pin(image_id="img", owner="nova", until=NOW))
    plan = FaultPlan()
    pause = plan.pause("fs.unlink", match="nova.json")
    with plan, ThreadPoolExecutor(2) as pool:
        sweeping = pool.submit(root.sweep_pins, NOW)
        pause.wait()
        renewing = pool.submit(root.pin, Pin(image_id="img", owner="nova", until=NOW + 9))
        time.sleep(0.2)
        pause.release()
        assert sweeping.result(20) == (["img/nova"], {})
        renewing.result(20)
    assert owners(root) == ["nova"]


def test_a_pin_that_is_being_renewed_is_not_swept(root: Root) -> None:
    """A pass waits for nobody."""
    root.pin(Pin(image_id="img", owner="nova", until=NOW))
    plan = FaultPlan()
    pause = plan.pause("fs.rename", match="nova.json")
    with plan, ThreadPoolExecutor(1) as pool:
        renewing = pool.submit(root.pin, Pin(image_id="img", owner="nova", until=NOW + 9))
        pause.wait()
        assert root.sweep_pins(NOW) == ([], {})
        pause.release()
        renewing.result(20)
    assert owners(root) == ["nova"]
