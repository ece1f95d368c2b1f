"""Locks between processes that a killed holder gives back, and that leave no file behind."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from e2e.cluster.progress import Progress


@contextmanager
def exclusive(path: Path, *, waiting_for: str = "", progress: Progress | None = None) -> Iterator[None]:
    """Hold the lock `path`, whose folder must exist; the last holder removes the file.

    Where another holds it, waits, and shows "waiting for `waiting_for`" if there is a `progress` to show it.
    """
    while True:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with progress.step(f"waiting for {waiting_for}") if progress else nullcontext():
                    fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_still(path, lock.fileno()):
                continue  # its last holder removed it while we waited
            try:
                yield
            finally:
                path.unlink()
            return


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
