"""What runs gave, a JSON line each, so that a benchmark of hours that was ended goes on where it was.

Time is simulated, so the same code gives the same results. They are kept in a file that is named by a digest of all that decides
them: other code, other traces or another size find none. To have all runs made again, delete the folder.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import kept
from bench.autoscaling.study import Cell, Result, Run, Size, Step

_DECIDING = (
    "bench/autoscaling/*.py",
    "bench/autoscaling/policies/*.py",
    "bench/engine/*.py",
    "bench/admission/workload.py",
    "bench/admission/replay/traces.py",
    "bench/traces/*.csv",
    "operator/kvplane_operator/autoscaler/*.py",
)


def digest(size: Size, repository: Path = kept.REPOSITORY) -> str:
    """16 hex digits that change with the code, the traces, the size or Python; not with the number of processes."""
    return kept.digest(str(replace(size, processes=1)), files=_DECIDING, repository=repository)


class Records:
    """The results in one file; it is only appended to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.results: dict[Run, Result] = {result.run: result for result in map(_result, kept.lines(path))}

    def add(self, result: Result) -> None:
        """Keeps a result."""
        self.results[result.run] = result
        kept.append(self._path, asdict(result))


def _result(document: dict[str, Any]) -> Result:
    run, step = document["run"], document["step"]
    return Result(
        **document
        | {
            "run": Run(**run | {"cell": Cell(**run["cell"])}),
            "step": step and Step(step["settled_goodput_percent"], tuple((at, ready) for at, ready in step["ready"])),
        }
    )
