"""What a person sees of a fetch, and how Ctrl-C ends it: quiet where stderr is no terminal."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nova_imagecache import ImageCacheError
from nova_imagecache.cli._cells import human_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

    from rich.progress import Progress as Bars
    from rich.progress import Task, TaskID

    from nova_imagecache import Event, Progress

_STAGES = {"wait": "waiting", "fetch": "fetching", "convert": "converting", "publish": "publishing"}
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_REQUEST = 1.0
"""Seconds in which a signal of the same kind is the same request: timeout(1) sends one to its child and one to all."""
_WIDE = 120
_SHOW_CURSOR = b"\x1b[?25h"


class Interrupt:
    """While entered, SIGINT and SIGTERM set ``event`` instead of ending the process; another one ends it at once, but
    for one of the same kind within a second.

    A fetch that is cancelled takes its half-written base with it; what a process leaves that is ended at once,
    ``recover`` sweeps. ``exit_code`` is None while no signal came. An error that follows a signal ends the command
    quietly with that code.

    Signals are read by a thread. A handler would run in the main thread alone, between two of its steps: where that is
    about to wait for a lock when the signal comes, as long as the fetch takes.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.exit_code: int | None = None
        self._stopped = 0.0
        self._restore = ExitStack()

    def __enter__(self) -> Self:
        # Python lets only the main thread say how signals are handled
        if threading.current_thread() is threading.main_thread():
            with ExitStack() as stack:
                self._listen(stack)
                self._restore = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore.close()
        if self.exit_code is not None and isinstance(error, ImageCacheError):
            raise SystemExit(self.exit_code) from error

    def _listen(self, stack: ExitStack) -> None:
        told, tell = socket.socketpair()
        stack.enter_context(told)
        thread = threading.Thread(target=self._read, args=(told,), name="signals", daemon=True)
        thread.start()
        stack.callback(thread.join)
        # closing this end is what ends the thread
        stack.enter_context(tell)
        tell.setblocking(False)
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False))
        for number in _SIGNALS:
            # without a handler of its own a signal is not told
            stack.callback(self._give_back, number, signal.signal(number, lambda *_: None))

    def _give_back(self, number: int, handler: Any) -> None:
        if self.exit_code == 128 + number:
            # the process is about to end: the same request again must not cut off its answer
            signal.signal(number, lambda again, _: self._stop(again))
        else:
            signal.signal(number, handler)

    def _read(self, told: socket.socket) -> None:
        while number := told.recv(1):
            if number[0] in _SIGNALS:
                self._stop(number[0])

    def _stop(self, number: int) -> None:
        if self.event.is_set():
            if self.exit_code == 128 + number and time.monotonic() - self._stopped < _SAME_REQUEST:
                return
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR + b"\n")
            os._exit(128 + number)
        self.exit_code = 128 + number
        self._stopped = time.monotonic()
        self.event.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What the library calls while it works; None: nothing is shown."""

    progress: Callable[[Progress], None] | None = None
    on_event: Callable[[Event], None] | None = None


@contextmanager
def progress_bars(interrupt: Interrupt, *, quiet: bool) -> Iterator[Callbacks]:
    """What to hand to the library to get bars on stderr for the time of the context."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield Callbacks()
        return
    with _bars(interrupt.event) as bars:
        reporter = _Reporter(bars)
        yield Callbacks(progress=reporter.report, on_event=reporter.notice)


def _bars(stopping: threading.Event) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column
    from rich.text import Text

    class Bytes(ProgressColumn):
        """Bytes done of all, and the rate, in the units of the tables."""

        def render(self, task: Task) -> Text:
            if not task.completed:
                return Text("")
            done = human_size(task.completed)
            text = f"{done} of {human_size(task.total)}" if task.total else done
            return Text(text + (f", {human_size(task.speed)}/s" if task.speed else ""), no_wrap=True)

    class Stage(ProgressColumn):
        """What happens to the image."""

        def render(self, task: Task) -> Text:
            if stopping.is_set():
                return Text("stopping (again: at once)", no_wrap=True)
            return Text(str(task.fields["stage"]), no_wrap=True)

    console = Console(stderr=True)
    return RichProgress(
        Stage(),
        # the beginning of an id tells images apart where the whole of it would leave no room for the rest
        TextColumn("{task.description}" if console.width >= _WIDE else "{task.description:.8}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        Bytes(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        console=console,
        transient=True,
        expand=True,
    )


class _Reporter:
    """One bar for each image, from its first report until it is ready. Called from several threads."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._lock = threading.Lock()
        self._tasks: dict[str, tuple[TaskID, str]] = {}

    def report(self, progress: Progress) -> None:
        """Move the image's bar; a new stage starts it again, so that the rate is the stage's own."""
        stage = _STAGES.get(progress.stage, progress.stage)
        # as long as nothing is done the bar only shows that something goes on: a conversion may tell only its end
        total = progress.total if progress.done else None
        with self._lock:
            task, shown = self._tasks.get(progress.image_id, (None, ""))
            if task is None:
                task = self._bars.add_task(progress.image_id, total=total, stage=stage)
            elif shown != stage:
                self._bars.reset(task, total=total, stage=stage)
            self._tasks[progress.image_id] = task, stage
            self._bars.update(task, completed=progress.done, total=total)

    def notice(self, event: Event) -> None:
        """Take away the bar of an image that is ready, so that a long list does not fill the screen."""
        # the image's last report may follow its event: it moves the bar and does not show it again
        with self._lock:
            task, _ = self._tasks.get(event.image_id or "", (None, ""))
        if task is not None:
            self._bars.update(task, visible=False)
