"""What a benchmark keeps of its runs, so that one that was ended goes on where it was: a file of JSON lines, and a digest.

A file is only appended to. What was measured with other code is not mixed with what is measured now: the digest tells.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def digest(*words: str, files: Sequence[str], repository: Path = REPOSITORY) -> str:
    """16 hex digits that change with the words, with Python, and with any file of the patterns ``files``."""
    found = hashlib.blake2b(digest_size=8)
    for word in (platform.python_version(), *words):
        found.update(word.encode() + b"\0")
    for pattern in files:
        for path in sorted(repository.glob(pattern)):
            found.update(f"{path.relative_to(repository)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()


def lines(path: Path) -> list[Any]:
    """What the file has; a line that was being written when its process ended is dropped, and goes from the file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def append(path: Path, line: Mapping[str, object]) -> None:
    """Adds a line; it is on its way to the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
