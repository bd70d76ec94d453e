"""What a card must know of machine code before it launches a kernel."""

import functools
import struct
from collections.abc import Iterator

from qlorachat.kernels import cuda_source

_REGISTERS = 0x2F  # EIATTR_REGCOUNT
_NOBITS = 8  # a section that has a size and nothing in the file
_SIZED = 0x04  # an attribute with a payload of its own size; others have two bytes

# where shared memory begins
ARCHITECTURES = {"sm_80": 0, "sm_86": 0, "sm_89": 0, "sm_90a": 1024, "sm_120": 1024}


@functools.cache
def compiled(name: str, architecture: str) -> bytes:
    """A source for one of `ARCHITECTURES`, compiled once for all tests."""
    base = f"SHARED_BASE={ARCHITECTURES[architecture]}"
    return cuda_source.compile_source(name, architecture, [base])


def registers(code: bytes) -> dict[str, int]:
    """Registers of a thread, by kernel."""
    sections = dict(_sections(code))
    symbols, names, notes = (sections[name] for name in (".symtab", ".strtab", ".nv.info"))
    found, at = {}, 0
    while at < len(notes):
        kind, attribute, size = struct.unpack_from("<BBH", notes, at)
        if kind == _SIZED and attribute == _REGISTERS:
            symbol, count = struct.unpack_from("<II", notes, at + 4)
            (name,) = struct.unpack_from("<I", symbols, 24 * symbol)
            found[_text(names, name)] = count
        at += 4 + (size if kind == _SIZED else 0)
    return found


def opcodes(code: bytes, kernel: str) -> list[int]:
    """Of a kernel's instructions, in order; an instruction has 16 bytes."""
    text = dict(_sections(code))[f".text.{kernel}"]
    return [struct.unpack_from("<H", text, at)[0] & 0xFFF for at in range(0, len(text), 16)]


def shared_bytes(code: bytes, kernel: str) -> int:
    """That a block has whatever is asked for at its launch, what is the driver's included."""
    return len(dict(_sections(code))[f".nv.shared.{kernel}"])


def _sections(code: bytes) -> Iterator[tuple[str, bytes]]:
    """Of an ELF file of 64 bit."""
    (table,) = struct.unpack_from("<Q", code, 0x28)
    width, count, of_names = struct.unpack_from("<HHH", code, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", code, table + i * width) for i in range(count)]
    names = code[headers[of_names][4] :]
    for name, kind, _, _, offset, size in headers:
        yield _text(names, name), bytes(size) if kind == _NOBITS else code[offset : offset + size]


def _text(names: bytes, start: int) -> str:
    return names[start : names.index(b"\0", start)].decode()
