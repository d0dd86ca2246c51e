"""Guests of a LibvirtDaemon: defined with given disks, started, and listened to."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from services.libvirtd import LibvirtDaemon, bindings

_DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
  <cpu mode='custom'><model>qemu64</model></cpu>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    {disks}
    <serial type='file'><source path='{console}'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def listen(console: Path) -> list[str]:
    """The lines that a guest has written when it has done what it does."""
    deadline = time.monotonic() + 120  # emulated, beside other tests
    while True:
        said = console.read_text() if console.exists() else ""
        if said.endswith(("DONE\n", "ERROR\n")):
            return said.split("\n")[:-1]
        if time.monotonic() > deadline:
            raise AssertionError(f"{console.name} says nothing more than {said!r}")
        time.sleep(0.01)


@contextlib.contextmanager
def ceph_secret(connection: Any, user: str, key: str) -> Iterator[str]:
    """The uuid of a secret of libvirt that holds the key of a Ceph user, while the block runs."""
    name = str(uuid.uuid4())
    xml = (
        f"<secret ephemeral='yes' private='yes'><uuid>{name}</uuid>"
        f"<usage type='ceph'><name>{user} {name}</name></usage></secret>"
    )
    defined = connection.secretDefineXML(xml)
    defined.setValue(base64.b64decode(key))
    try:
        yield name
    finally:
        defined.undefine()


def plain_disk(path: Path, image_format: str = "qcow2", target: str = "vda") -> ET.Element:
    """A ``<disk>`` as drivers write it that leave the rest to libvirt."""
    disk = ET.Element("disk", type="file", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type=image_format)
    ET.SubElement(disk, "source", file=str(path))
    ET.SubElement(disk, "target", dev=target, bus="virtio")
    return disk


def domain_xml(name: str, disks: Sequence[ET.Element], *, console: Path, domain_uuid: uuid.UUID | None = None) -> str:
    """A domain of software emulation that boots from the first of these disks and talks into a file."""
    text = "\n".join(ET.tostring(disk, encoding="unicode") for disk in disks)
    return _DOMAIN.format(name=name, uuid=domain_uuid or uuid.uuid4(), disks=text, console=console)


class Guest:
    """A persistent domain."""

    def __init__(self, daemon: LibvirtDaemon, connection: Any, name: str) -> None:
        self.name = name
        self.console = daemon.dir / "consoles" / name
        self._connection = connection
        self._uuid = uuid.uuid4()
        self.domain: Any = None

    def define(self, disks: Sequence[ET.Element]) -> None:
        """Define it, or define it anew, with these disks; libvirt's schema is asked whether they are right."""
        xml = domain_xml(self.name, disks, console=self.console, domain_uuid=self._uuid)
        self.domain = self._connection.defineXMLFlags(xml, bindings().VIR_DOMAIN_DEFINE_VALIDATE)

    def start(self) -> None:
        """Start it."""
        self.console.unlink(missing_ok=True)
        self.domain.create()

    def boot(self) -> list[str]:
        """Start it; the lines of its console when it has done what it does."""
        self.start()
        return listen(self.console)

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Its qemu stands still while the block runs."""
        # the pid that libvirtd knows is that of another process namespace
        wanted = str(self._uuid).encode()
        [pid] = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if wanted in _read(path)]
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def destroy(self) -> None:
        """Switch it off; it stays defined. One that is off already, or gone, is fine."""
        libvirt = bindings()
        try:
            if self.domain is not None:
                self.domain.destroy()
        except libvirt.libvirtError as err:
            if err.get_error_code() not in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
                raise

    def forget(self) -> None:
        """Switch it off and undefine it."""
        self.destroy()
        if self.domain is not None:
            libvirt = bindings()
            with contextlib.suppress(libvirt.libvirtError):  # a transient one is gone already
                self.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
            self.domain = None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


class Guests:
    """The guests of one test."""

    def __init__(self, daemon: LibvirtDaemon, connection: Any) -> None:
        self.daemon = daemon
        self.connection = connection
        self._guests: dict[str, Guest] = {}

    def __getitem__(self, name: str) -> Guest:
        return self._guests.setdefault(name, Guest(self.daemon, self.connection, name))

    def boot(self, name: str, *disks: ET.Element) -> list[str]:
        """Define the guest of that name with these disks and start it; what its console says."""
        self[name].define(disks)
        return self[name].boot()

    def forget(self) -> None:
        """Undefine them all."""
        for guest in self._guests.values():
            guest.forget()


@contextlib.contextmanager
def guests(daemon: LibvirtDaemon) -> Iterator[Guests]:
    """Guests that are gone after the block."""
    with daemon.connection() as connection:
        these = Guests(daemon, connection)
        try:
            yield these
        finally:
            these.forget()
