"""mount(2), umount2(2), unshare(2): the three calls that a machine is made with. Stdlib only, for pid 1."""

import ctypes
import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC = 1, 32, 4096, 16384
_MS_PRIVATE, _MS_SHARED = 1 << 18, 1 << 20
_MNT_DETACH = 2
_LIBC = ctypes.CDLL(None, use_errno=True)

Target = str | PathLike[str]


@dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mountinfo: the folder of the file system, where it is mounted, and its type."""

    root: str
    at: str
    kind: str


def unshare(flags: int) -> None:
    """Move this process into new namespaces (for CLONE_NEWPID: its children).

    Raises:
        OSError: not root, or the kernel lacks such namespaces.
    """
    if _LIBC.unshare(flags) != 0:
        _fail("unshare")


def bind(source: Target, at: Target, *, recursive: bool = False, read_only: bool = False) -> None:
    """Show `source` at `at`, too."""
    _mount(source, at, None, _MS_BIND | (_MS_REC if recursive else 0))
    if read_only:
        _mount(None, at, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY)


def fresh(kind: str, at: Target) -> None:
    """Mount a new file system of a kind that needs no device: "tmpfs", "proc"."""
    _mount(kind, at, kind, 0)


def private() -> None:
    """Keep every mount of this namespace to itself, and those of others out of it."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)


def shared() -> None:
    """Let mounts of this namespace appear in namespaces made from it, as containers and volumes need."""
    _mount(None, "/", None, _MS_REC | _MS_SHARED)


def detach(at: Target) -> None:
    """Unmount now for new users, and altogether when the last one leaves."""
    if _LIBC.umount2(os.fsencode(at), _MNT_DETACH) != 0:
        _fail("umount", at)


def mounted() -> list[Mount]:
    """The mounts of this namespace, oldest first."""
    return [parse(line) for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def parse(line: str) -> Mount:
    """The parts of one line of mountinfo; see proc_pid_mountinfo(5)."""
    fields = line.split()
    root, at = (os.fsdecode(field.encode().decode("unicode_escape").encode("latin-1")) for field in fields[3:5])
    return Mount(root=root, at=at, kind=fields[fields.index("-") + 1])


def _mount(source: Target | None, at: Target, kind: str | None, flags: int) -> None:
    arguments = (os.fsencode(item) if item is not None else None for item in (source, at, kind))
    if _LIBC.mount(*arguments, ctypes.c_ulong(flags), None) != 0:
        _fail("mount", at)


def _fail(call: str, path: Target = "") -> None:
    code = ctypes.get_errno()
    raise OSError(code, f"{call}: {os.strerror(code)}", str(path))
