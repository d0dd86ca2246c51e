"""Help, version, configuration and logging; and what starts without them."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys

import pytest

from nova_imagecache import __version__

from .conftest import Site

COMMANDS = [
    "backends", "check", "cleanup", "complete", "create-disk", "disks", "ensure", "help", "list", "pin", "precache",
    "recover", "remove", "remove-disk", "show", "unpin", "usage", "verify",
]  # fmt: skip


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_names_every_command(site: Site, arguments: list[str]) -> None:
    """On stdout, with one line each."""
    answer = site.run(*arguments)
    assert (answer.code, answer.err) == (0, "")
    listed = answer.out.partition("\ncommands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed if line.startswith("  ")] == COMMANDS
    assert all(len(line) <= 120 for line in listed)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "complete"])
def test_every_command_explains_itself(site: Site, command: str) -> None:
    """``help COMMAND``, ``COMMAND --help`` and ``COMMAND ... -h`` show the same."""
    by_name = site.run("help", command)
    assert by_name.code == 0
    assert by_name.out.startswith(f"usage: nova-imagecache {command} ")
    assert site.run(command, "--help").out == by_name.out
    assert site.run(command, "whatever", "-h").out == by_name.out


def test_no_command_shows_the_help_and_fails(site: Site) -> None:
    """There is no interactive mode to be surprised by."""
    answer = site.run()
    assert (answer.code, answer.out) == (2, "")
    assert "commands:" in answer.err


def test_a_mistyped_command_gets_a_hint(site: Site) -> None:
    """On stderr: stdout is for data."""
    answer = site.run("lst")
    assert (answer.code, answer.out) == (2, "")
    assert "list" in answer.err


def test_version(site: Site) -> None:
    """The library's own."""
    answer = site.run("--version")
    assert (answer.code, answer.out, answer.err) == (0, f"nova-imagecache {__version__}\n", "")


def test_global_options_may_follow_the_command(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--config`` wins over the environment, wherever it stands."""
    monkeypatch.setenv("NOVA_IMAGECACHE_CONFIG", "/does/not/exist.toml")
    assert site.run("list").code == 2
    assert site.run("list", "--config", str(site.config)).code == 0
    assert site.run("--config", str(site.config), "list").code == 0


def test_verbose_shows_the_log_on_stderr_and_data_stays_clean(site: Site) -> None:
    """``-v`` logs what happens, ``--log-file`` keeps it; without them only warnings and errors are shown."""
    site.image("img")
    log = site.path / "log"
    answer = site.run("-vv", "--log-file", str(log), "ensure", "img", "-f", "json")
    assert answer.code == 0
    assert answer.data[0]["result"] == "ready"
    assert all(line.startswith("nova-imagecache: ") for line in answer.err.splitlines())
    assert log.exists()


def test_a_log_file_that_cannot_be_written_is_an_error(site: Site) -> None:
    """Said in one line."""
    answer = site.run("--log-file", "/does/not/exist/log", "list")
    assert answer.code == 2
    assert answer.err.startswith("nova-imagecache: error: ")
    assert len(answer.err.splitlines()) == 1


def test_logging_of_the_process_stays_as_it_was(site: Site) -> None:
    """``main`` can be called by a program that has logging of its own."""
    root = logging.getLogger()
    before = (root.level, list(root.handlers), logging.getLogger("nova_imagecache").level)
    site.run("-v", "list")
    assert (root.level, list(root.handlers), logging.getLogger("nova_imagecache").level) == before


@pytest.mark.parametrize("missing", ["cliff", "rich"])
def test_without_the_extra_one_line_says_what_to_install(site: Site, missing: str) -> None:
    """The library does not need the command line's dependencies."""
    blocker = (
        "import sys, importlib.util\n"
        "real = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {missing!r} else real(name, *rest)\n"
        "import nova_imagecache.cli\n"
        "sys.exit(nova_imagecache.cli.main(['list']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocker], env=site.child_env(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"nova-imagecache: error: {missing} ")
    assert "nova-imagecache[cli]" in line


def test_help_starts_soon_and_imports_no_client(site: Site) -> None:
    """Clients of image services, and what draws progress, are imported by who needs them."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *site.argv("--help")[1:]],
        env=site.child_env(),
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"glanceclient", "keystoneauth1", "requests", "rich", "rich.progress", "cmd2", "yaml"}
    # processor time: a busy host does not change it
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_completion_for_bash_is_printed(site: Site) -> None:
    """For ``/etc/bash_completion.d``."""
    answer = site.run("complete")
    assert (answer.code, answer.err) == (0, "")
    assert "create-disk" in answer.out
