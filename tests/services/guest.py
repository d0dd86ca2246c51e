"""A guest in one sector: a hand-assembled boot sector that tells over the serial port which disk it runs from.

It prints a text of its own sector, then sector 1, then what it finds in sector 2, writes ``WROTE`` there, prints DONE
and halts. So the console shows what the guest read, and a second boot of the same disk what the first one wrote.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

WROTE = "written-by-the-guest"
"""What a guest leaves in sector 2."""

SECTOR = 512
_ORIGIN = 0x7C00
_BUFFER = 0x7E00
_CODE = 446


def image(banner: str, data: str, size: int) -> bytes:
    """A raw image of ``size`` bytes whose guest prints ``banner`` and, from sector 1, ``data``."""
    first = _boot_sector(banner, size // SECTOR)
    second = _text(data).ljust(SECTOR, b"\0")
    return (first + second).ljust(size, b"\0")


def _boot_sector(banner: str, sectors: int) -> bytes:
    code = _program(banner)
    # one active partition over the rest: what is bootable without one is taken for a damaged image by inspectors
    partition = struct.pack("<B3sB3sII", 0x80, b"\x00\x02\x00", 0x83, b"\xfe\xff\xff", 1, sectors - 1)
    return code.ljust(_CODE, b"\0") + partition + bytes(48) + b"\x55\xaa"


def _text(words: str) -> bytes:
    return words.encode("ascii") + b"\r\n\0"


class _Assembler:
    """Bytes with names for places; references to them are filled in at the end."""

    def __init__(self) -> None:
        self.code = bytearray()
        self._places: dict[str, int] = {}
        self._near: list[tuple[int, str]] = []
        self._calls: list[tuple[int, str]] = []
        self._addresses: list[tuple[int, str]] = []

    def put(self, *values: int) -> None:
        self.code.extend(values)

    def place(self, name: str, data: bytes = b"") -> None:
        self._places[name] = len(self.code)
        self.code.extend(data)

    def jump(self, opcode: int, name: str) -> None:
        """A jump with an offset of one byte: 0xEB always, 0x72 on carry, 0x74 on zero."""
        self.put(opcode)
        self._near.append((len(self.code), name))
        self.put(0)

    def call(self, name: str) -> None:
        self.put(0xE8)
        self._calls.append((len(self.code), name))
        self.put(0, 0)

    def address(self, *opcode_and_name: int | str) -> None:
        """An instruction that ends with the address of a place."""
        *opcode, name = opcode_and_name
        self.put(*(value for value in opcode if isinstance(value, int)))
        self._addresses.append((len(self.code), str(name)))
        self.put(0, 0)

    def finish(self) -> bytes:
        for at, name in self._near:
            struct.pack_into("<b", self.code, at, self._places[name] - (at + 1))
        for at, name in self._calls:
            struct.pack_into("<h", self.code, at, self._places[name] - (at + 2))
        for at, name in self._addresses:
            struct.pack_into("<H", self.code, at, _ORIGIN + self._places[name])
        if len(self.code) > _CODE:
            raise ValueError(f"{len(self.code)} bytes of code do not fit")
        return bytes(self.code)


def _program(banner: str) -> bytes:
    asm = _Assembler()
    buffer = struct.pack("<H", _BUFFER)
    wrote = _text(WROTE)
    asm.put(0xFA, 0x31, 0xC0)  # cli; xor ax, ax
    asm.put(0x8E, 0xD8, 0x8E, 0xC0, 0x8E, 0xD0)  # mov ds, ax; mov es, ax; mov ss, ax
    asm.put(0xBC, *struct.pack("<H", _ORIGIN))  # mov sp, origin
    asm.address(0x88, 0x16, "drive")  # mov [drive], dl: what the BIOS booted from
    asm.put(0xB8, 0xE3, 0x00, 0x31, 0xD2, 0xCD, 0x14)  # mov ax, 0x00e3; xor dx, dx; int 0x14: COM1, 9600 8N1
    asm.put(0xFC)  # cld
    asm.address(0xBE, "banner")  # mov si, banner
    asm.call("print")
    for sector in (2, 3):  # the BIOS counts sectors of a track from 1
        asm.put(0xB8, 0x01, 0x02)  # mov ax, 0x0201: read one sector
        asm.put(0xB9, sector, 0x00)  # mov cx, sector
        asm.call("disk")
        asm.put(0xBE, *buffer)  # mov si, buffer
        asm.call("print")
    asm.address(0xBE, "wrote")  # mov si, wrote
    asm.put(0xBF, *buffer)  # mov di, buffer
    asm.put(0xB9, len(wrote), 0x00)  # mov cx, length
    asm.put(0xF3, 0xA4)  # rep movsb
    asm.put(0xB8, 0x01, 0x03, 0xB9, 0x03, 0x00)  # mov ax, 0x0301; mov cx, 3: write one sector
    asm.call("disk")
    asm.address(0xBE, "done")  # mov si, done
    asm.place("end")
    asm.call("print")
    asm.place("halt")
    asm.put(0xFA, 0xF4)  # cli; hlt
    asm.jump(0xEB, "halt")

    asm.place("disk")
    asm.put(0xB6, 0x00)  # mov dh, 0
    asm.address(0x8A, 0x16, "drive")  # mov dl, [drive]
    asm.put(0xBB, *buffer, 0xCD, 0x13)  # mov bx, buffer; int 0x13
    asm.jump(0x72, "broken")  # jc broken
    asm.put(0xC3)  # ret
    asm.place("broken")
    asm.address(0xBE, "failed")  # mov si, failed
    asm.jump(0xEB, "end")

    asm.place("print")  # the text at ds:si, up to a zero, through the port's registers
    asm.put(0xAC, 0x84, 0xC0)  # lodsb; test al, al
    asm.jump(0x74, "printed")
    asm.put(0x50, 0xBA, 0xFD, 0x03)  # push ax; mov dx, 0x3fd
    asm.place("busy")
    asm.put(0xEC, 0xA8, 0x20)  # in al, dx; test al, 0x20: is the sender empty?
    asm.jump(0x74, "busy")
    asm.put(0x58, 0xBA, 0xF8, 0x03, 0xEE)  # pop ax; mov dx, 0x3f8; out dx, al
    asm.jump(0xEB, "print")
    asm.place("printed")
    asm.put(0xC3)  # ret

    asm.place("drive", b"\x80")
    asm.place("failed", _text("DISK ERROR"))
    asm.place("done", _text("DONE"))
    asm.place("wrote", wrote)
    asm.place("banner", _text(banner))
    return asm.finish()


if __name__ == "__main__":  # python -m services.guest FILE WORD
    Path(sys.argv[1]).write_bytes(image(sys.argv[2], f"{sys.argv[2]}, sector 1", 2**20))
