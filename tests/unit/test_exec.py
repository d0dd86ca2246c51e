"""Child processes: time-outs, limits, their own words in errors, and none that outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nova_imagecache import _exec
from nova_imagecache._exec import Limits
from nova_imagecache.exceptions import BackendError, CommandError

MIB = 1 << 20
SH = "/bin/sh"


def script(text: str, *, timeout: float = 30, limits: Limits | None = None, stage: str | None = None) -> str:
    """What a shell wrote."""
    return _exec.run([SH, "-c", text], timeout=timeout, limits=limits, stage=stage)


def failing(text: str, *, timeout: float = 30, limits: Limits | None = None) -> CommandError:
    with pytest.raises(CommandError) as caught:
        script(text, timeout=timeout, limits=limits)
    return caught.value


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether it comes true within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def lives(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_stdout_is_the_answer() -> None:
    """All of it, with or without limits."""
    assert script("echo a; echo b >&2; echo c") == "a\nc\n"
    assert script("echo a", limits=Limits(cpu=10, memory=1 << 30, file_size=MIB)) == "a\n"
    assert len(script("head -c 1000000 /dev/zero")) == 1000000


@pytest.mark.parametrize("limits", [None, Limits(), Limits(cpu=5)])
def test_a_failure_carries_code_words_and_stage(limits: Limits | None) -> None:
    """What the command said stands in the error."""
    with pytest.raises(CommandError) as caught:
        script("echo the words >&2; exit 3", limits=limits, stage="convert")
    error = caught.value
    assert (error.returncode, error.stderr, error.stage) == (3, "the words\n", "convert")
    assert error.argv == (SH, "-c", "echo the words >&2; exit 3")
    assert "the words" in str(error)


def test_only_the_end_of_long_words_is_kept() -> None:
    """The last lines say why."""
    error = failing("head -c 1000000 /dev/zero | tr '\\0' x >&2; echo the reason >&2; exit 1")
    assert len(error.stderr) <= 16 * 1024
    assert error.stderr.endswith("x" * 100 + "the reason\n")


def test_words_that_are_no_text_are_kept_as_far_as_they_are() -> None:
    """An error never fails of its message."""
    assert "a\ufffdb" in failing(r"printf 'a\377b' >&2; exit 1").stderr


def test_a_signal_is_a_negative_code() -> None:
    """As Python says it."""
    assert failing("kill -TERM $$").returncode == -signal.SIGTERM


def test_the_child_sees_a_c_locale_and_a_path_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are parsed, and an environment can hold secrets."""
    monkeypatch.setenv("OS_PASSWORD", "secret")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")
    names = {line.partition("=")[0] for line in _exec.run(["env"], timeout=10).splitlines()}
    assert names == {"LC_ALL", "PATH"}
    assert "LC_ALL=C\n" in _exec.run(["env"], timeout=10)


def test_stdin_is_empty() -> None:
    """A command that asks gets no answer instead of waiting for one."""
    assert script("cat") == ""


def test_a_missing_command_says_what_to_install() -> None:
    """Not a FileNotFoundError of something else."""
    with pytest.raises(BackendError, match="no-such-command is not installed") as caught:
        _exec.run(["no-such-command", "x"], timeout=10, stage="check")
    assert not isinstance(caught.value, CommandError)
    assert caught.value.todo is not None
    assert "no-such-command" in caught.value.todo


@pytest.mark.parametrize("limits", [None, Limits(cpu=60)])
def test_a_time_out_kills_the_child(tmp_path: Path, limits: Limits | None) -> None:
    """And says so, with what it had to say until then."""
    start = time.monotonic()
    error = failing(f"echo $$ > {tmp_path}/pid; echo busy >&2; exec sleep 60", timeout=0.5, limits=limits)
    assert time.monotonic() - start < 20
    assert error.returncode is None
    assert "busy" in error.stderr
    assert "timed out" in str(error)
    assert not lives(int((tmp_path / "pid").read_text()))


def test_a_checkpoint_that_raises_kills_the_child(tmp_path: Path) -> None:
    """What it raised comes out: a deadline, a cancel."""
    calls: list[float] = []

    def checkpoint() -> None:
        calls.append(time.monotonic())
        if (tmp_path / "pid").exists() and len(calls) > 2:
            raise KeyError("cancelled")

    start = time.monotonic()
    with pytest.raises(KeyError, match="cancelled"):
        _exec.run([SH, "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60"], timeout=60, checkpoint=checkpoint)
    assert time.monotonic() - start < 20
    assert not lives(int((tmp_path / "pid").read_text()))


def test_a_checkpoint_does_not_disturb_a_child_that_works() -> None:
    """It is called again and again, and all output is there."""
    calls: list[int] = []
    text = "for i in 1 2 3 4; do head -c 100000 /dev/zero; sleep 0.1; done"
    out = _exec.run([SH, "-c", text], timeout=30, checkpoint=lambda: calls.append(1))
    assert len(out) == 400000
    assert len(calls) >= 3


def test_a_checkpoint_does_not_lift_the_time_out() -> None:
    """Both hold."""
    with pytest.raises(CommandError) as caught:
        _exec.run(["sleep", "60"], timeout=0.3, checkpoint=lambda: None)
    assert caught.value.returncode is None


@pytest.mark.slow
def test_cpu_time_is_limited() -> None:
    """A malformed header must not burn a core for ever (CVE-2015-5162)."""
    error = failing("while :; do :; done", limits=Limits(cpu=1))
    assert error.returncode == -signal.SIGXCPU


@pytest.mark.slow
def test_memory_is_limited() -> None:
    """Nor eat the host's memory."""
    code = "bytearray(600 * 2**20)"
    _exec.run([sys.executable, "-S", "-c", code], timeout=30, limits=Limits(memory=2 << 30))
    with pytest.raises(CommandError, match="MemoryError"):
        _exec.run([sys.executable, "-S", "-c", code], timeout=30, limits=Limits(memory=400 << 20))


def test_file_size_is_limited(tmp_path: Path) -> None:
    """Nor fill the disk behind the checked size."""
    path = tmp_path / "big"
    error = failing(f"exec head -c 10000000 /dev/zero > {path}", limits=Limits(file_size=MIB))
    assert error.returncode in (-signal.SIGXFSZ, 1)
    assert path.stat().st_size == MIB


def test_no_core_is_dumped_under_limits() -> None:
    """A crash of qemu-img must not write guest data beside the cache."""
    assert script("ulimit -c", limits=Limits(cpu=5)) == "0\n"


@pytest.mark.parametrize("in_thread", [False, True], ids=["main thread", "another thread"])
def test_a_child_dies_with_its_parent(tmp_path: Path, in_thread: bool) -> None:
    """Kill -9 of the service ends its qemu-img, so that nobody writes to what recover sweeps."""

    def work() -> None:
        def run() -> None:
            script(f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 60", limits=Limits(cpu=60))

        if in_thread:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        else:
            run()

    parent = multiprocessing.get_context("fork").Process(target=work)
    parent.start()
    assert eventually((tmp_path / "pid").exists)
    child = int((tmp_path / "pid").read_text())
    assert lives(child)
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    assert eventually(lambda: not lives(child))


def test_own_hard_limits_hold_where_they_are_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root may raise one: asking for more would be an error of prlimit's."""
    import resource

    hard = {resource.RLIMIT_AS: 1 << 30, resource.RLIMIT_CPU: 2, resource.RLIMIT_FSIZE: MIB}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (hard[kind], hard[kind]))
    limits = Limits(cpu=10, memory=4 << 30, file_size=5 * MIB)
    assert script("ulimit -v; ulimit -t; ulimit -f", limits=limits).split() == ["1048576", "2", "2048"]
    limits = Limits(cpu=1, memory=1 << 29, file_size=512)
    assert script("ulimit -v; ulimit -t; ulimit -f", limits=limits).split() == ["524288", "1", "1"]


def test_limits_do_not_change_this_process() -> None:
    """They are the child's alone."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE), resource.getrlimit(resource.RLIMIT_CPU)
    script("true", limits=Limits(cpu=1, file_size=1, memory=1 << 30))
    assert (resource.getrlimit(resource.RLIMIT_FSIZE), resource.getrlimit(resource.RLIMIT_CPU)) == before


def test_many_threads_run_children_at_once() -> None:
    """Each gets its own answer."""
    answers: dict[int, str] = {}

    def work(number: int) -> None:
        answers[number] = script(f"echo {number}", limits=Limits(cpu=5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: f"{number}\n" for number in range(8)}
