"""A real libvirtd for tests and demonstrations: its own directory, its own namespaces, software emulation only.

Debian's packages libvirt-daemon, libvirt-daemon-driver-qemu and qemu-system-x86 are what it needs, and root.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from services import libvirtd_files
from services.ceph_daemon import Daemon

_PROGRAMS = ("libvirtd", "qemu-system-x86_64", "unshare", "setpriv")
_SYSTEM = "/usr/sbin:/sbin"


def missing() -> str | None:
    """What keeps a LibvirtDaemon from running here, None: nothing."""
    if os.geteuid() != 0:
        return "no libvirt: only root can give libvirtd namespaces of its own"
    path = f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM}"
    programs = [name for name in _PROGRAMS if shutil.which(name, path=path) is None]
    if programs:
        return f"no libvirt: {', '.join(programs)} missing; tools/setup.sh test installs them"
    if importlib.util.find_spec("libvirt") is None:
        return "no libvirt: Python has no libvirt; tools/setup.sh test installs it"
    return None


def missing_rbd() -> str | None:
    """What keeps a guest from running on a disk in Ceph, None: nothing."""
    found = any(Path("/usr/lib").glob("*/qemu/block-rbd.so"))
    return None if found else "qemu has no driver for Ceph: tools/setup.sh test installs qemu-block-extra"


def bindings() -> Any:
    """The module libvirt, which ships no types; it prints no errors: they are raised as well."""
    libvirt = importlib.import_module("libvirt")
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    return libvirt


class LibvirtDaemon:
    """A libvirtd below ``directory``, a path of at most 60 characters; a context manager, or ``start`` and ``stop``.

    With ``owners`` it is as in production: guests run as an unprivileged user, whose id is ``qemu``, and libvirt gives
    that user what a guest needs (dynamic_ownership=1). Without, guests run as root and no file changes its owner.

    The daemon and its guests live in a process namespace of their own: ``stop``, or the end of this process, ends
    them all. Filesystems that are mounted after ``start`` are not seen by it.
    """

    def __init__(self, directory: Path, *, owners: bool = False) -> None:
        self.dir = directory.absolute()
        self.owners = owners
        self.qemu = libvirtd_files.QEMU_ID if owners else 0
        self._starter: ThreadPoolExecutor | None = None
        self._daemon: Daemon | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<LibvirtDaemon at {self.uri}>"

    @property
    def uri(self) -> str:
        """What to connect to, from any process and user."""
        return f"qemu:///system?socket={self.dir}/run/libvirt-sock"

    def start(self) -> None:
        """Return when libvirtd answers; RuntimeError with the end of its log if it does not."""
        if len(str(self.dir)) > 60:
            raise ValueError(f"{self.dir} is too long: libvirt's sockets have paths of 107 characters")
        for name in ("etc", "run", "lib", "log", "cache"):
            (self.dir / name).mkdir(parents=True, exist_ok=True, mode=0o755)
        consoles = self.dir / "consoles"
        consoles.mkdir(exist_ok=True)
        consoles.chmod(0o777)
        values = {"dir": self.dir, "user": self.qemu, "owners": int(self.owners), "uuid": uuid.uuid4()}
        etc = self.dir / "etc"
        (etc / "libvirtd.conf").write_text(libvirtd_files.DAEMON.format(**values))
        (etc / "qemu.conf").write_text(libvirtd_files.QEMU.format(**values))
        (etc / "passwd").write_text(libvirtd_files.with_qemu_user(Path("/etc/passwd"), libvirtd_files.USER))
        (etc / "group").write_text(libvirtd_files.with_qemu_user(Path("/etc/group"), libvirtd_files.GROUP))
        self._starter = ThreadPoolExecutor(1, "libvirtd")
        command = ["env", f"PATH={os.environ.get('PATH', os.defpath)}:{_SYSTEM}", "unshare", "--mount", "--pid"]
        command += ["--fork", "--kill-child=KILL", "--mount-proc", "--propagation", "private"]
        command += ["sh", "-c", libvirtd_files.START, "sh", str(self.dir)]
        self._daemon = Daemon("libvirtd", command, self.dir / "log" / "out", self._starter)
        self._daemon.start()
        atexit.register(self.stop)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End libvirtd and its guests, at once; idempotent."""
        atexit.unregister(self.stop)
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon = None
        if self._starter is not None:
            self._starter.shutdown()
            self._starter = None

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        """A connection of libvirt-python, closed after the block."""
        connection = bindings().open(self.uri)
        try:
            yield connection
        finally:
            connection.close()

    def _wait(self) -> None:
        libvirt = bindings()
        assert self._daemon is not None
        deadline = time.monotonic() + 60
        while True:
            self._daemon.check()
            try:
                with self.connection():
                    return
            except libvirt.libvirtError as err:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"libvirtd does not answer ({err}); its logs are in {self.dir / 'log'}") from err
            time.sleep(0.05)
