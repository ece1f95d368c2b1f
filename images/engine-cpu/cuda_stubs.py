"""Stand-ins for NVIDIA's libraries, so that the CPU engine image need not carry 3 GB that no CPU ever runs.

The registry's torch for x86-64 Linux is the CUDA build. Its shared objects name cuBLAS, cuDNN, NCCL and nine more as
needed, so `import torch` fails without them, although on a machine without a GPU none of their functions is called.
This program reads from torch's own files which functions of which library are needed, and writes each library as a
small ELF file that defines exactly these. A stub that is called after all says so on stderr and raises SIGILL, which
Python's faulthandler turns into a traceback: an error that names its cause instead of a wrong number.

The CUDA runtime is not among them: torch does call it, to learn that there is no device; it is small and stays real.

Formats: System V ABI, chapters 4 and 5 (ELF, dynamic linking); the symbol versions are GNU's, described in the Linux
Standard Base Core, section 10.7. Runs during the image build with the interpreter alone:
`python cuda_stubs.py .../site-packages/torch/lib`.
"""

import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

STUBBED = (
    "cublas",
    "cublasLt",
    "cudnn",
    "cufft",
    "cufile",
    "cupti",
    "curand",
    "cusparse",
    "cusparseLt",
    "nccl",
    "nvrtc",
    "nvshmem_host",
)
"""Libraries written by this program: `lib` + name + `.so` + a major version."""

PT_LOAD, PT_DYNAMIC, PT_GNU_STACK = 1, 2, 0x6474E551
DT_NULL, DT_NEEDED, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_SONAME = 0, 1, 4, 5, 6, 10, 11, 14
DT_GNU_HASH, DT_VERSYM, DT_VERDEF, DT_VERDEFNUM = 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD
DT_VERNEED, DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
EM_X86_64 = 62
STB_GLOBAL, STT_FUNC = 1, 2
PAGE = 4096

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct("<IIQQQQQQ")
SYMBOL = struct.Struct("<IBBHQQ")
DYNAMIC = struct.Struct("<qQ")
VERNEED = struct.Struct("<HHIII")
VERNEED_ENTRY = struct.Struct("<IHHII")
VERDEF = struct.Struct("<HHHHIII")
VERDEF_NAME = struct.Struct("<II")


class NotReadableError(Exception):
    """A file is not an x86-64 ELF shared object."""


@dataclass(frozen=True)
class Reference:
    """A function that a shared object takes from elsewhere."""

    symbol: str
    library: str | None
    """The library's soname where the reference is versioned, None where any library may define it."""
    version: str | None


@dataclass(frozen=True)
class SharedObject:
    """What one shared object asks of others."""

    needed: frozenset[str]
    references: frozenset[Reference]
    """Without weak ones, which may stay undefined."""


def read_shared_object(path: Path) -> SharedObject:
    """What `path` needs; raises NotReadableError where it is no x86-64 ELF file with a dynamic section."""
    image = path.read_bytes()
    if image[:6] != b"\x7fELF\x02\x01" or HEADER.unpack_from(image)[2] != EM_X86_64:
        raise NotReadableError(f"{path} is not a 64-bit x86-64 ELF file; the stubs are written for x86-64 only.")
    header = HEADER.unpack_from(image)
    segments = [SEGMENT.unpack_from(image, header[5] + i * SEGMENT.size) for i in range(header[10])]
    dynamic_segment = next((s for s in segments if s[0] == PT_DYNAMIC), None)
    if dynamic_segment is None:
        raise NotReadableError(f"{path} has no dynamic section.")

    def offset(address: int) -> int:
        return int(next(address - s[3] + s[2] for s in segments if s[0] == PT_LOAD and s[3] <= address < s[3] + s[5]))

    entries = list(DYNAMIC.iter_unpack(image[dynamic_segment[2] : dynamic_segment[2] + dynamic_segment[5]]))
    table = dict(entries)
    strings = offset(table[DT_STRTAB])

    def text(at: int) -> str:
        return image[strings + at : image.index(0, strings + at)].decode()

    versions: dict[int, tuple[str, str]] = {}
    at = offset(table[DT_VERNEED]) if DT_VERNEED in table else 0
    for _ in range(table.get(DT_VERNEEDNUM, 0)):
        _, count, file, first, following = VERNEED.unpack_from(image, at)
        entry = at + first
        for _ in range(count):
            _, _, index, name, next_entry = VERNEED_ENTRY.unpack_from(image, entry)
            versions[index] = (text(file), text(name))
            entry += next_entry
        at += following

    references = set()
    for i in range(1, _undefined_symbols_end(image, table, offset)):
        name, info, _, section, _, _ = SYMBOL.unpack_from(image, offset(table[DT_SYMTAB]) + i * SYMBOL.size)
        if section == 0 and info >> 4 == STB_GLOBAL:
            index = struct.unpack_from("<H", image, offset(table[DT_VERSYM]) + 2 * i)[0] if DT_VERSYM in table else 0
            references.add(Reference(text(name), *versions.get(index & 0x7FFF, (None, None))))
    needed = frozenset(text(value) for tag, value in entries if tag == DT_NEEDED)
    return SharedObject(needed=needed, references=frozenset(references))


def _undefined_symbols_end(image: bytes, table: Mapping[int, int], offset: Callable[[int], int]) -> int:
    """Index after the last symbol that can be undefined: a GNU hash table covers the defined ones, at the end."""
    if DT_GNU_HASH in table:
        return int(struct.unpack_from("<I", image, offset(table[DT_GNU_HASH]) + 4)[0])
    return int(struct.unpack_from("<I", image, offset(table[DT_HASH]) + 4)[0])


def stub_symbols(objects: Iterable[SharedObject]) -> dict[str, dict[str, str | None]]:
    """Per missing library (soname) the symbols it must define, each with its version or None.

    A reference without a version belongs to the library with the longest name that its symbol starts with
    (`cusparseLtInit`: libcusparseLt).
    """
    objects = tuple(objects)
    wanted: dict[str, dict[str, str | None]] = {
        soname: {} for soname in sorted({name for o in objects for name in o.needed if _library(name) in STUBBED})
    }
    by_length = sorted(wanted, key=lambda soname: len(_library(soname)), reverse=True)
    for reference in sorted({r for o in objects for r in o.references}, key=lambda r: r.symbol):
        owner = reference.library
        if owner is None:
            symbol = reference.symbol.lower()
            owner = next((soname for soname in by_length if symbol.startswith(_library(soname).lower())), None)
        if owner in wanted:
            wanted[owner][reference.symbol] = reference.version
    return wanted


def _library(soname: str) -> str:
    """`nccl` of `libnccl.so.2`."""
    return soname.removeprefix("lib").split(".so")[0]


def sysv_hash(name: str) -> int:
    """The hash of a symbol or version name (System V ABI, figure 5-13)."""
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        value = (value ^ (value & 0xF0000000) >> 24) & 0x0FFFFFFF
    return value


def stub_library(soname: str, symbols: Mapping[str, str | None]) -> bytes:
    """An x86-64 ELF shared object called `soname` that defines `symbols`, each as a function that reports and traps."""
    strings = _Strings()
    names = list(symbols)
    versions = [soname, *sorted({v for v in symbols.values() if v is not None})]

    code, entry_points = _code(soname, names)
    hash_table = _hash_table(names)
    symbol_table = bytearray(SYMBOL.size)
    symbol_versions = bytearray(2)
    for name, version in symbols.items():
        symbol_table += SYMBOL.pack(strings.at(name), STB_GLOBAL << 4 | STT_FUNC, 0, 1, entry_points[name], 0)
        symbol_versions += struct.pack("<H", versions.index(version) + 1 if version is not None else 1)
    definitions = bytearray()
    for i, version in enumerate(versions):
        following = VERDEF.size + VERDEF_NAME.size if i + 1 < len(versions) else 0
        definitions += VERDEF.pack(1, int(i == 0), i + 1, 1, sysv_hash(version), VERDEF.size, following)
        definitions += VERDEF_NAME.pack(strings.at(version), 0)
    soname_at = strings.at(soname)

    # One read-only executable segment holds everything but the dynamic section, which the loader relocates in place.
    at, places, body = HEADER.size + 4 * SEGMENT.size, {}, bytearray()
    for tag, part in (
        (DT_HASH, hash_table),
        (DT_SYMTAB, symbol_table),
        (DT_VERSYM, symbol_versions),
        (DT_VERDEF, definitions),
        (DT_STRTAB, strings.data),
        (0, code),
    ):
        body += bytes(-(at + len(body)) % 16)
        places[tag] = at + len(body)
        body += part
    code_at = places.pop(0)
    for i in range(len(names)):
        value = SYMBOL.size * (i + 1) + 8 + places[DT_SYMTAB] - at
        struct.pack_into("<Q", body, value, struct.unpack_from("<Q", body, value)[0] + code_at)
    sizes = {DT_STRSZ: len(strings.data), DT_SYMENT: SYMBOL.size, DT_VERDEFNUM: len(versions), DT_SONAME: soname_at}
    dynamic = b"".join(DYNAMIC.pack(*entry) for entry in (*places.items(), *sizes.items(), (DT_NULL, 0)))

    end = at + len(body)
    dynamic_at = end + -end % 16
    address = dynamic_at + PAGE  # the same offset within a page of its own, as mmap asks
    header = HEADER.pack(
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 3, EM_X86_64, 1, 0, HEADER.size, 0, 0, HEADER.size, SEGMENT.size, 4,
        0, 0, 0,
    )  # fmt: skip
    segments = (
        SEGMENT.pack(PT_LOAD, 5, 0, 0, 0, end, end, PAGE)
        + SEGMENT.pack(PT_LOAD, 6, dynamic_at, address, address, len(dynamic), len(dynamic), PAGE)
        + SEGMENT.pack(PT_DYNAMIC, 6, dynamic_at, address, address, len(dynamic), len(dynamic), 8)
        + SEGMENT.pack(PT_GNU_STACK, 6, 0, 0, 0, 0, 0, 16)
    )
    return header + segments + bytes(body) + bytes(dynamic_at - end) + dynamic


def _code(soname: str, names: Iterable[str]) -> tuple[bytes, dict[str, int]]:
    """Machine code and the entry point of each name in it: write(2, message, length), then an invalid instruction."""
    report = bytes.fromhex("bf02000000 b801000000 0f05 0f0b")
    code, entry_points, messages = bytearray(report), {}, bytearray()
    for name in names:
        entry_points[name] = len(code)
        message = (
            f"{name} was called, but {soname} is a stub: this image has no CUDA libraries, use the CPU.\n".encode()
        )
        code += bytes.fromhex("488d35") + struct.pack("<i", len(messages))  # lea rsi, [rip + ...], completed below
        code += b"\xba" + struct.pack("<i", len(message))  # mov edx, length
        code += b"\xe9" + struct.pack("<i", -(len(code) + 5))  # jmp report
        messages += message
    for start in entry_points.values():
        after_lea = start + 7
        (at,) = struct.unpack_from("<i", code, start + 3)
        struct.pack_into("<i", code, start + 3, len(code) + at - after_lea)
    return bytes(code + messages), entry_points


def _hash_table(names: list[str]) -> bytes:
    """DT_HASH of a symbol table that holds the null symbol and then `names`."""
    buckets, chain = [0] * max(1, len(names)), [0] * (len(names) + 1)
    for index, name in enumerate(names, start=1):
        bucket = sysv_hash(name) % len(buckets)
        chain[index], buckets[bucket] = buckets[bucket], index
    return struct.pack(f"<{2 + len(buckets) + len(chain)}I", len(buckets), len(chain), *buckets, *chain)


class _Strings:
    """A string table under construction."""

    def __init__(self) -> None:
        self.data = bytearray(1)

    def at(self, text: str) -> int:
        start = len(self.data)
        self.data += text.encode() + b"\0"
        return start


def main(torch_libraries: Path) -> None:
    """Write the missing libraries into `torch_libraries`, where torch's own files look first."""
    objects = [read_shared_object(path) for path in sorted(torch_libraries.glob("*.so"))]
    for soname, symbols in stub_symbols(objects).items():
        (torch_libraries / soname).write_bytes(stub_library(soname, symbols))
        print(f"{soname}: a stub of {len(symbols)} functions")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
