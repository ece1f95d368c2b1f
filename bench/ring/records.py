"""What has been measured so far: one JSON line for each row, so that a restart goes on where the last one ended.

A folder belongs to one size, one machine and one state of the code; the first line says which, and when it was begun. What a
restart adds is of that size, machine and code too, so the report has that date and that machine.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from bench import kept
from bench.report import Machine
from bench.ring.figures import Measured
from bench.ring.sizes import Size

_MEASURING: Final = ("decode", "exact", "faults", "latency", "models", "peers", "prefill", "ranks", "served", "sizes")
_DECIDING: Final = (
    "runtime/kvplane_runtime/ring/*.py",
    *(f"bench/ring/{module}.py" for module in _MEASURING),
    "bench/engine/*.py",
    *(f"tests/ring/{module}.py" for module in ("proved", "tiny", "world")),
)


def code(repository: Path = kept.REPOSITORY) -> str:
    """A digest of the engine, of what measures it, and of the libraries that compute."""
    libraries = (f"{name}={metadata.version(name)}" for name in ("torch", "transformers"))
    return kept.digest(*libraries, files=_DECIDING, repository=repository)


class Records:
    """The file of one folder; appended to, never changed."""

    def __init__(self, folder: Path, size: Size, *, code: str, machine: Machine, now: datetime) -> None:
        """``code``: see :func:`code`. Raises ValueError where the folder's rows are of another size, code or machine."""
        self._path = folder / "rows.jsonl"
        self.rows: dict[str, Mapping[str, Any]] = {}
        """Measurements as plain data, by row."""
        folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(
            json.dumps({"size": asdict(size), "code": code, "machine": asdict(machine), "started": now.isoformat()})
        )
        lines = kept.lines(self._path)
        if not lines:
            kept.append(self._path, wanted)
            lines = [wanted]
        first = lines[0]
        for what, name in (("size", "size"), ("code", "engine"), ("machine", "machine")):
            if _lasting(first.get(what)) != _lasting(wanted[what]):
                raise ValueError(f"{self._path} holds rows of another {name}; give another --folder, or --fresh.")
        self.started = datetime.fromisoformat(first["started"])
        """When the first row was begun."""
        self.machine = Machine(**first["machine"])
        """With the load of that moment."""
        self.rows = {line["row"]: line["measured"] for line in lines[1:]}

    def add(self, row: str, measured: Measured) -> None:
        """Keeps a row's measurement."""
        document = json.loads(json.dumps(asdict(measured)))
        self.rows[row] = document
        kept.append(self._path, {"row": row, "measured": document})


def _lasting(value: object) -> object:
    """Without a machine's load, which is of a moment."""
    return {key: each for key, each in value.items() if key != "load_average"} if isinstance(value, dict) else value
