"""Kernel settings that a kubelet changes for the whole host, whatever namespaces it is in: kept, and put back.

They are saved when the first cluster of the machine comes up and restored when the last one goes, in a folder that a
reboot empties, as it does the settings. The same folder has the lock under which clusters take and give back what
belongs to the whole machine.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from e2e.cluster.locks import exclusive

FOLDER = Path("/run/kvplane")
NAMES = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)


@contextmanager
def machine_lock(folder: Path = FOLDER) -> Iterator[None]:
    """Hold what only one `up` or `down` on this machine may do at a time, whichever cache it works in."""
    with exclusive(folder.with_name(f"{folder.name}.lock")):
        folder.mkdir(exist_ok=True)
        try:
            yield
        finally:
            if not any(folder.iterdir()):
                folder.rmdir()


def save(cluster: str, *, folder: Path = FOLDER, proc: Path = Path("/proc/sys")) -> None:
    """Note the settings for `cluster`, unless another cluster has noted them; call it under the lock."""
    (folder / "users").mkdir(exist_ok=True)
    file = folder / "sysctl.json"
    if not file.exists():
        present = [name for name in NAMES if (proc / name).exists()]
        draft = file.with_suffix(".new")
        draft.write_text(json.dumps({name: (proc / name).read_text() for name in present}))
        draft.rename(file)
    (folder / "users" / cluster).touch()


def restore(
    cluster: str, *, alive: Callable[[str], bool], folder: Path = FOLDER, proc: Path = Path("/proc/sys")
) -> None:
    """Put the settings back if `cluster` is the last `alive` one that used them, and forget them; call it under the lock.

    A user that is not alive is a cluster whose folder somebody removed without taking it down.
    """
    users, file = folder / "users", folder / "sysctl.json"
    if not users.exists():
        return
    for user in list(users.iterdir()):
        if user.name == cluster or not alive(user.name):
            user.unlink()
    if any(users.iterdir()):
        return
    if file.exists():
        for name, value in json.loads(file.read_text()).items():
            (proc / name).write_text(value)
        file.unlink()
    users.rmdir()
