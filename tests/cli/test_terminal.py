"""What a person sees: progress on a terminal, quiet elsewhere, Ctrl-C and closed pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import tempfile
import time

import pytest

from .conftest import Site


class Terminal:
    """A child process whose stderr is a terminal of its own."""

    def __init__(self, argv: list[str], env: dict[str, str], columns: int = 100) -> None:
        self._main, child = pty.openpty()
        self._out = tempfile.TemporaryFile()  # noqa: SIM115  # closed by wait()
        self.process = subprocess.Popen(
            argv,
            env={**env, "COLUMNS": str(columns), "LINES": "24"},
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=child,
            start_new_session=True,
        )
        os.close(child)
        self.raw = ""

    @property
    def seen(self) -> str:
        """What was shown, without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw)

    def read_until(self, pattern: str, seconds: float = 20) -> str:
        """What the terminal showed, as soon as the pattern is in it or the process is gone."""
        end = time.monotonic() + seconds
        while re.search(pattern, self.seen) is None and time.monotonic() < end:
            if not select.select([self._main], [], [], 0.1)[0]:
                continue
            try:
                self.raw += os.read(self._main, 65536).decode()
            except OSError:
                # EIO: the last process that had the terminal open is gone
                break
        return self.seen

    def wait(self) -> tuple[int, str]:
        """The exit code and what went to stdout."""
        self.read_until("(?!)")
        code = self.process.wait(20)
        os.close(self._main)
        with self._out as out:
            out.seek(0)
            return code, out.read().decode()


@pytest.fixture
def slow(site: Site) -> Site:
    site.drip()
    return site


def test_a_fetch_shows_its_progress_on_a_terminal(slow: Site) -> None:
    """Bytes done of all, percentage, rate and time left, on stderr alone."""
    terminal = Terminal(slow.argv("ensure", "img", "-f", "json"), slow.child_env())
    shown = terminal.read_until(r"iB/s \d+:\d\d")
    terminal.process.send_signal(signal.SIGINT)
    code, out = terminal.wait()
    assert code == 130
    assert re.search(r"fetching img .*\d+% .*[KM]iB of 187.5 MiB, .*[KM]iB/s \d\d:\d\d", shown)
    assert "fetching" not in out


def test_progress_is_silent_where_stderr_is_no_terminal(site: Site) -> None:
    """Nothing on stderr at all: what cron mails is what went wrong."""
    site.image("img")
    answer = site.spawn("ensure", "img", "-f", "json")
    assert (answer.code, answer.err) == (0, "")


def test_quiet_shows_no_progress_on_a_terminal_either(site: Site) -> None:
    """``-q`` is for scripts that run in one."""
    site.image("img")
    terminal = Terminal(site.argv("-q", "ensure", "img", "-f", "json"), site.child_env())
    assert terminal.wait()[0] == 0
    assert terminal.raw == ""


def test_a_dumb_terminal_gets_no_escape_codes(site: Site) -> None:
    """TERM=dumb is a terminal that cannot move its cursor."""
    site.image("img")
    terminal = Terminal(site.argv("ensure", "img", "-f", "json"), {**site.child_env(), "TERM": "dumb"})
    assert terminal.wait()[0] == 0
    assert "\x1b" not in terminal.raw


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", [["ensure", "img"], ["create-disk", "img", "vm-1"], ["ensure", "stuck"]])
def test_a_signal_cancels_the_fetch_and_leaves_nothing(
    slow: Site, number: signal.Signals, code: int, command: list[str]
) -> None:
    """The process ends soon, also when the source hangs, without a traceback, and staging is empty."""
    child = subprocess.Popen(
        slow.argv(*command, "-f", "json"),
        env=slow.child_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    staging = slow.path / "cache" / "staging"
    wait_for(lambda: staging.is_dir() and any(staging.iterdir()))
    child.send_signal(number)
    _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (code, "")
    assert list(staging.iterdir()) == []
    assert list((slow.path / "cache").glob("bases/*")) == []


def test_what_was_ready_before_a_signal_is_in_the_answer(slow: Site) -> None:
    """A batch that is stopped says which images it brought."""
    terminal = Terminal(slow.argv("ensure", "img", "-f", "value", "-c", "result", "-c", "error_type"), slow.child_env())
    terminal.read_until("fetching")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.wait() == (130, "failed CancelledError\n")
    # the cursor that the bars hide is shown again
    assert terminal.raw.rindex("\x1b[?25h") > terminal.raw.rindex("\x1b[?25l")


@pytest.mark.parametrize("command", ["img", "stuck"])
def test_a_signal_that_is_sent_twice_is_one(slow: Site, command: str) -> None:
    """As timeout(1) does: to the process and to its group. Nothing is left behind."""
    child = subprocess.Popen(
        slow.argv("ensure", command, "-f", "json"),
        env=slow.child_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    staging = slow.path / "cache" / "staging"
    wait_for(lambda: staging.is_dir() and any(staging.iterdir()))
    child.send_signal(signal.SIGTERM)
    time.sleep(0.01)  # so that the kernel does not make one of them
    os.killpg(child.pid, signal.SIGTERM)
    out, err = child.communicate(timeout=20)
    # an interpreter that is just ending has no handlers any more: the same for whoever asks a shell
    assert child.returncode in (143, -signal.SIGTERM)
    assert err == ""
    assert [row["error_type"] for row in json.loads(out)] == ["CancelledError"]
    assert list(staging.iterdir()) == []


def test_a_second_signal_ends_it_at_once(slow: Site) -> None:
    """Whatever the library is waiting for."""
    child = subprocess.Popen(
        slow.argv("ensure", "img"), env=slow.child_env(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    staging = slow.path / "cache" / "staging"
    wait_for(lambda: staging.is_dir() and any(staging.iterdir()))
    child.send_signal(signal.SIGSTOP)
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGCONT)
    _, err = child.communicate(timeout=20)
    assert (child.returncode, err) in ((130, ""), (143, ""))


def test_a_reader_that_goes_away_is_no_error_to_talk_about(site: Site) -> None:
    """``nova-imagecache list | head -0`` says nothing on stderr."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        site.argv("backends"), env=site.child_env(), stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(site: Site, closed: str) -> None:
    """A service manager may start a command without stdout or stderr."""
    command = f'exec "$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", command, "sh", *site.argv("disks")], env=site.child_env(), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_argument_that_is_no_text_is_shown_escaped(site: Site) -> None:
    """Bytes that no encoding explains reach the answer and the error all the same."""
    done = subprocess.run(
        [*map(str.encode, site.argv("ensure")), b"\xff"], env=site.child_env(), capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"\\udcff" in done.stdout
    assert b"Traceback" not in done.stderr


def test_an_empty_table_says_so_on_a_terminal_only(site: Site) -> None:
    """A person sees that there is nothing; a program sees an empty answer."""
    terminal = Terminal(site.argv("list"), site.child_env())
    assert terminal.wait()[0] == 0
    assert "the cache holds no bases" in terminal.seen
    assert site.run("list").err == ""


def wait_for(true: object, seconds: float = 20) -> None:
    assert callable(true)
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
