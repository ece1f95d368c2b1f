"""What has been measured so far: one JSON line for each row, so that a restart goes on where the last one ended.

A folder belongs to one size; the first line says which, and another size needs another folder.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.ring.figures import Measured
from bench.ring.sizes import Size


class Records:
    """The file of one folder; appended to, never changed."""

    def __init__(self, folder: Path, size: Size) -> None:
        """Raises ValueError where the folder's rows are of another size."""
        self._path = folder / "rows.jsonl"
        self.rows: dict[str, Mapping[str, Any]] = {}
        """Measurements as plain data, by row."""
        folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(asdict(size)))
        lines = [json.loads(line) for line in self._whole_lines()]
        if not lines:
            self._append({"size": wanted})
        elif lines[0] != {"size": wanted}:
            raise ValueError(f"{self._path} holds rows of another size; give another --folder, or --fresh.")
        self.rows = {line["row"]: line["measured"] for line in lines[1:]}

    def add(self, row: str, measured: Measured) -> None:
        """Keeps a row's measurement."""
        document = json.loads(json.dumps(asdict(measured)))
        self.rows[row] = document
        self._append({"row": row, "measured": document})

    def _append(self, line: Mapping[str, object]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _whole_lines(self) -> list[str]:
        """A line that was being written when its process ended is dropped."""
        if not self._path.exists():
            return []
        text = self._path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._path.write_text(whole)
        return whole.splitlines()
