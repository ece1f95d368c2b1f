"""The Debian base for machines that reach Debian's mirror but no image registry: debootstrap, trimmed, as one layer.

With Docker or Podman the base is the official Python image instead; every Containerfile takes either.
"""

import hashlib
from pathlib import Path

from images.recipes import KEY_DIGITS

SUITE = "bookworm"
PACKAGES = ("ca-certificates", "libgomp1", "libnuma1", "python3", "python3-venv")
CONTAINERFILE = "images/base/Containerfile"
OMITTED = (
    "./usr/share/info/*",
    "./usr/share/locale/*",
    "./usr/share/man/*",
    "./var/cache/apt/*",
    "./var/lib/apt/lists/*",
    "./var/log/*",
)
"""Left out of the layer, with the documentation: 140 of 276 MB that no program of ours reads."""


def base_key(repository: Path) -> str:
    """The key of the base; not of Debian's packages, which follow the mirror's state when the base is made."""
    parts = (SUITE, *PACKAGES, *OMITTED, (repository / CONTAINERFILE).read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:KEY_DIGITS]


def bootstrap_commands(folder: Path) -> tuple[tuple[str, ...], ...]:
    """Commands that leave `base.tar` in `folder`, from debootstrap's own mirror; as root.

    What an interrupted run left is removed first.
    """
    tree = str(folder / "tree")
    clear = ("rm", "-rf", "--one-file-system", tree)
    packages = ",".join(PACKAGES)
    # The licences in /usr/share/doc/*/copyright stay: they must travel with the binaries.
    licences = ("find", f"{tree}/usr/share/doc", "-type", "f", "!", "-name", "copyright", "-delete")
    excludes = (f"--exclude={pattern}" for pattern in OMITTED)
    return (
        clear,
        ("debootstrap", "--variant=minbase", f"--include={packages}", SUITE, tree),
        licences,
        ("tar", "-C", tree, "--numeric-owner", "--sort=name", *excludes, "-cf", str(folder / "base.tar"), "."),
        clear,
    )
