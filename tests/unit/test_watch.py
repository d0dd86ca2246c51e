"""One call's deadline, cancel and progress."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from nova_imagecache import CacheConfig, ImageCache, Progress
from nova_imagecache._watch import Watch, call_safely
from nova_imagecache.backends import BackendPaths
from nova_imagecache.backends.file import FileBackend
from nova_imagecache.exceptions import CancelledError, DeadlineError
from nova_imagecache.testing import FakeSource

MIB = 1 << 20


def test_a_watch_without_terms_never_ends_a_call() -> None:
    """No deadline, no cancel."""
    Watch("img").check("fetch")


def test_a_deadline_is_in_seconds_from_now() -> None:
    """Before it nothing, after it an error that names image and stage."""
    watch = Watch("img", deadline=0.05)
    watch.check("fetch")
    time.sleep(0.1)
    with pytest.raises(DeadlineError) as caught:
        watch.check("fetch")
    assert (caught.value.image_id, caught.value.stage) == ("img", "fetch")


def test_a_deadline_of_0_has_passed() -> None:
    """The caller has no time at all."""
    watch = Watch("img", deadline=0)
    time.sleep(0.001)
    with pytest.raises(DeadlineError):
        watch.check()


def test_cancel_ends_the_call_at_its_next_look() -> None:
    """Before the deadline is looked at."""
    cancel = threading.Event()
    watch = Watch("img", deadline=0, cancel=cancel)
    cancel.set()
    with pytest.raises(CancelledError) as caught:
        watch.check("convert")
    assert (caught.value.image_id, caught.value.stage) == ("img", "convert")


def test_without_a_stage_the_error_names_the_last_one_reported() -> None:
    """What the call was at."""
    cancel = threading.Event()
    cancel.set()
    watch = Watch("img", cancel=cancel)
    watch.report("publish", 1, 2)
    with pytest.raises(CancelledError) as caught:
        watch.check()
    assert caught.value.stage == "publish"


def test_progress_ends_with_the_last_word() -> None:
    """Not every report is told, the last one is, and none afterwards."""
    told: list[Progress] = []
    with Watch("img", progress=told.append) as watch:
        for done in range(1000):
            watch.report("fetch", done, 1000)
        watch.report("publish", 1000, 1000)
    assert told[-1] == Progress(image_id="img", stage="publish", done=1000, total=1000)
    assert len(told) < 100
    count = len(told)
    watch.report("late", 1, 1)
    time.sleep(0.15)
    assert len(told) == count


def test_progress_is_told_from_time_to_time_and_never_twice() -> None:
    """About ten times a second while something changes."""
    told: list[Progress] = []
    with Watch("img", progress=told.append) as watch:
        for done in range(5):
            watch.report("fetch", done, None)
            time.sleep(0.12)
    assert 3 <= len(told) <= 10
    assert len(set(told)) == len(told)


def test_progress_is_told_when_the_call_fails() -> None:
    """The last word says how far it came."""
    told: list[Progress] = []

    def fail() -> None:
        with Watch("img", progress=told.append) as watch:
            watch.report("fetch", 7, 9)
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert told[-1].done == 7


def test_a_call_without_reports_tells_nothing() -> None:
    """A hit starts no thread."""
    told: list[Progress] = []
    before = threading.active_count()
    with Watch("img", progress=told.append):
        assert threading.active_count() == before
    assert told == []


def test_what_progress_raises_is_logged_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """The caller's mistake does not fail the fetch, and the next call of it comes all the same."""
    calls: list[Progress] = []

    def broken(progress: Progress) -> None:
        calls.append(progress)
        raise ZeroDivisionError("my own mistake")

    with caplog.at_level(logging.ERROR), Watch("img", progress=broken) as watch:
        watch.report("fetch", 1, 2)
        time.sleep(0.25)
        watch.report("fetch", 2, 2)
    assert len(calls) == 2
    assert "my own mistake" in caplog.text


def test_a_slow_callback_does_not_hold_up_the_work() -> None:
    """It runs in a thread of its own."""
    release = threading.Event()

    def slow(_progress: Progress) -> None:
        release.wait(10)

    with Watch("img", progress=slow) as watch:
        start = time.monotonic()
        watch.report("fetch", 1, 2)
        time.sleep(0.15)
        for done in range(1000):
            watch.report("fetch", done, None)
            watch.check("fetch")
        assert time.monotonic() - start < 5
        release.set()


def test_safe_calls_return_whatever_happens(caplog: pytest.LogCaptureFixture) -> None:
    """Events and progress alike."""
    got: list[int] = []
    call_safely(got.append, 7)
    assert got == [7]

    def broken(_value: int) -> None:
        raise RuntimeError("mine")

    call_safely(broken, 7)
    assert "mine" in caplog.text


def test_callbacks_may_call_back_into_the_cache(tmp_path: Path) -> None:
    """No lock is held while they run, also not the one of the image that is being fetched."""
    config = CacheConfig(root=tmp_path / "cache")
    backend = FileBackend({}, BackendPaths(root=config.root, disks_dir=tmp_path / "disks"))
    source = FakeSource({"img": b"\xeb\x3c" + bytes(3 * MIB), "other": b"\xeb\x3c" + bytes(MIB)}, chunk_size=MIB)
    seen: list[object] = []
    cache: ImageCache

    def on_progress(_progress: Progress) -> None:
        seen.append(cache.ensure_base("other").image_id)
        seen.append([base.image_id for base in cache.bases()])

    def on_event(_event: object) -> None:
        seen.append(cache.usage().base_count)

    cache = ImageCache(config, source=source, backend=backend, on_event=on_event)
    cache.ensure_base("img", progress=on_progress)
    assert "other" in seen
    assert ["img", "other"] in seen
    assert 2 in seen
