"""What has been measured so far: one JSON line for each run, so that a restart goes on where the last one ended.

A folder belongs to one size and one source of the benchmark; another one begins a new folder. The goals stand in a file
of their own, written before the first policy runs.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import kept
from bench.admission import goals
from bench.admission.goals import Goals, Summary
from bench.admission.plan import RunKey, Stage
from bench.admission.search import Probe

LONGEST_LATE_SECONDS = 0.1
"""Of the generator's own timers: a machine that lets it wait longer let the others wait too."""
MOST_OVERRUN_SHARE = 0.02


@dataclass(frozen=True)
class Machine:
    """Whether this machine kept up with a run."""

    late_seconds: float
    """How late the load generator was at worst."""
    overrun_share: float
    """Of the run, by which the engine's steps lasted longer than their pace."""

    @property
    def kept_up(self) -> bool:
        return self.late_seconds <= LONGEST_LATE_SECONDS and self.overrun_share <= MOST_OVERRUN_SHARE

    def __str__(self) -> str:
        return f"generator {1000 * self.late_seconds:.0f} ms late at worst, steps {100 * self.overrun_share:.1f} % over"


@dataclass(frozen=True)
class RunRecord:
    """One run, and the figures of the engine's work in it."""

    key: RunKey
    rate: float
    """Mean requests a second offered."""
    summary: Summary
    preemptions: int
    computed_tokens: int
    recomputed_tokens: int
    machine: Machine
    met: str
    """``1`` for each request that met its goals, in order of arrival: what pairing by request would need."""
    at: float | None = None
    """When it ended, in seconds since 1970; None where that was not noted."""


class Records:
    """The files of one folder; appended to, never changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "runs.jsonl"
        self.probes: dict[str, list[Probe]] = {}
        """Of the bisection, by mix, in order."""
        self.runs: dict[RunKey, RunRecord] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for line in kept.lines(self._file):
            if "probe" in line:
                self.probes.setdefault(line["mix"], []).append(Probe(**line["probe"]))
            else:
                record = _run(line["run"])
                self.runs[record.key] = record

    @property
    def goals(self) -> dict[str, Goals] | None:
        """None before they are known."""
        path = self._folder / "goals.json"
        return goals.read(path) if path.exists() else None

    def write_goals(self, goals_: Mapping[str, Goals]) -> None:
        goals.write(goals_, self._folder / "goals.json")

    def add_probe(self, mix: str, probe: Probe) -> None:
        self.probes.setdefault(mix, []).append(probe)
        kept.append(self._file, {"mix": mix, "probe": asdict(probe)})

    def add_run(self, record: RunRecord) -> None:
        self.runs[record.key] = record
        kept.append(self._file, {"run": asdict(record)})

    def forget(self, contestant: str) -> None:
        """Takes one contestant's runs out of the records and out of the file."""
        self.runs = {key: record for key, record in self.runs.items() if key.contestant != contestant}
        lines = [line for line in kept.lines(self._file) if "probe" in line or _run(line["run"]).key in self.runs]
        self._file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def plain(self) -> dict[str, object]:
        """Everything, as JSON can hold it."""
        return {
            "goals": {mix: asdict(each) for mix, each in (self.goals or {}).items()},
            "probes": {mix: [asdict(probe) for probe in probes] for mix, probes in self.probes.items()},
            "runs": [asdict(record) for record in self.runs.values()],
        }

    def goodputs(self) -> dict[RunKey, float]:
        return {key: record.summary.goodput for key, record in self.runs.items()}


def _run(document: dict[str, Any]) -> RunRecord:
    key = document["key"]
    return RunRecord(
        **document
        | {
            "key": RunKey(**key | {"stage": Stage(key["stage"])}),
            "summary": Summary(**document["summary"]),
            "machine": Machine(**document["machine"]),
        },
    )
