"""The wait for another host's import: how long, how often it is asked, and what ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from harness.images import raw
from harness.waiting import until
from nova_imagecache import CacheConfig, Event, ImageCache
from nova_imagecache.backends import Claim
from nova_imagecache.exceptions import CancelledError, DeadlineError, ImageCacheError, LockTimeoutError
from nova_imagecache.testing import FakeSource, MemoryBackend


class Claimed(MemoryBackend):
    """Storage where another host brings every image in until ``free`` is set. ``asked`` is when it was asked for."""

    def __init__(self) -> None:
        super().__init__({}, None)
        self.free = threading.Event()
        self.asked: list[float] = []

    def claim_import(self, image_id: str) -> Claim | None:
        self.asked.append(time.monotonic())
        return super().claim_import(image_id) if self.free.is_set() else None


def make_cache(
    directory: Path,
    backend: MemoryBackend,
    lock_timeout: float = 60,
    on_event: Callable[[Event], None] | None = None,
) -> ImageCache:
    config = CacheConfig(root=directory, backend="memory", lock_timeout=timedelta(seconds=lock_timeout))
    source = FakeSource({"img": raw("claimed").fake})
    return ImageCache(config, source=source, backend=backend, on_event=on_event)


@pytest.mark.slow
def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    """After lock_timeout the wait is an error that may be tried again; meanwhile it is asked less and less often."""
    backend = Claimed()
    with make_cache(tmp_path, backend, 1.5) as cache:
        start = time.monotonic()
        with pytest.raises(LockTimeoutError, match="another host's import of image img") as caught:
            cache.ensure_base("img")
        assert 1.5 <= time.monotonic() - start < 5
        assert caught.value.retryable
        assert caught.value.image_id == "img"
        assert caught.value.waited >= 1.5
        assert "without progress" not in str(caught.value), "nobody knows"
        assert 3 <= len(backend.asked) <= 6
        pauses = [after - before for before, after in zip(backend.asked, backend.asked[1:], strict=False)]
        assert pauses[-1] > 1.3 * pauses[0]
        backend.free.set()
        assert cache.ensure_base("img").image_id == "img"


@pytest.mark.slow
@pytest.mark.parametrize("end", [CancelledError, DeadlineError])
def test_the_caller_ends_it(tmp_path: Path, end: type[ImageCacheError]) -> None:
    """Cancel and deadline are looked at while it waits, however long the pauses are by then."""
    backend = Claimed()
    cancel = threading.Event()
    deadline = 2.0 if end is DeadlineError else None
    with make_cache(tmp_path, backend) as cache, ThreadPoolExecutor(1) as threads:
        start = time.monotonic()
        waiting = threads.submit(cache.ensure_base, "img", cancel=cancel, deadline=deadline)
        until(lambda: len(backend.asked) > 4, "pauses of some length")
        if deadline is None:
            start = time.monotonic() - 2.0
            cancel.set()
        with pytest.raises(end):
            waiting.result()
        assert time.monotonic() - start < 2.0 + 0.5


def _published(directory: Path, backend: Claimed) -> None:
    with make_cache(directory, MemoryBackend({}, None, storage=backend.storage)) as other:
        other.ensure_base("img")


def _given_back(directory: Path, backend: Claimed) -> None:
    del directory
    backend.free.set()


@pytest.mark.parametrize(("end", "told"), [(_published, "used"), (_given_back, "published")])
def test_the_other_host_ends_it(tmp_path: Path, end: Callable[[Path, Claimed], None], told: str) -> None:
    """What the other host publishes is the answer, and its event there; where it gave up, this one goes on."""
    backend = Claimed()
    cancel = threading.Event()
    events: list[Event] = []
    with make_cache(tmp_path / "this", backend, on_event=events.append) as cache, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(cache.ensure_base, "img", cancel=cancel)
        try:
            until(lambda: backend.asked, "the first question")
            assert not waiting.done()
            end(tmp_path / "other", backend)
            assert waiting.result(10).image_id == "img"
            assert [event.kind for event in events if event.kind != "usage-changed"] == [told]
        finally:
            cancel.set()
