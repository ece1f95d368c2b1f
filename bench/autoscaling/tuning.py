"""``python -m bench.autoscaling.tuning FIELD=VALUE,VALUE …``: our law with other parameters, on traffic that is not reported.

Fields are those of ``Tuning``, and ``cost_of_miss`` of ``spec.autoscaling``. One is changed at a time, the others stay; the first
line is as it is. It says what the one set of parameters that ``make bench-autoscaling`` reports might be exchanged for, and its
table belongs into docs/autoscaling.md.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from multiprocessing import get_context
from typing import Final

from bench import report
from bench.autoscaling.study import OURS, Cell, Result, Run, Size, cells, execute, mean
from bench.autoscaling.variants import FOLLOWED
from e2e.cluster.progress import Progress
from kvplane_operator.autoscaler.settings import Settings, Tuning

_COST: Final = "cost_of_miss"
HEADER: Final = ("tuning", "goodput_%", "hours", "code raw, goodput_%", "steady, reversals/h", "lost_%")


def variations(words: Sequence[str]) -> list[tuple[str, Settings]]:
    """The settings as they are, then each that the words ask for, by name. Raises ValueError, with a sentence."""
    default = Settings(max_replicas=1)
    kinds = {field.name: type(getattr(default.tuning, field.name)) for field in fields(Tuning)} | {_COST: float}
    found = [("as it is", default)]
    for word in words:
        name, _, values = word.partition("=")
        if name not in kinds:
            raise ValueError(f"{name} is no parameter; there are {', '.join(kinds)}.")
        for text in values.split(","):
            try:
                value = kinds[name](text)
            except ValueError:
                raise ValueError(f"{name} is a number; {text!r} is none. Write {name}=VALUE,VALUE.") from None
            changed = {name: value} if name == _COST else {"tuning": replace(default.tuning, **{name: value})}
            found.append((f"{name}={text}", replace(default, **changed)))
    return found


def row(name: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Of HEADER: goodput, hours and tokens lost over the variants that can be followed."""
    followed = [each for each in results if each.run.cell.variant in FOLLOWED]
    code = [each for each in results if each.run.cell.trace == "code" and each.run.cell.variant == "raw"]
    steady = [each for each in results if each.run.cell.variant == "steady"]
    return (
        name,
        f"{mean(followed, 'goodput_percent'):.1f}",
        f"{mean(followed, 'hours'):.2f}",
        f"{mean(code, 'goodput_percent'):.1f}",
        f"{mean(steady, 'reversals_per_hour'):.1f}",
        f"{mean(followed, 'lost_percent'):.1f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.autoscaling.tuning", description=__doc__)
    parser.add_argument("fields", nargs="*", metavar="FIELD=VALUE,VALUE")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    try:
        tried = variations(arguments.fields)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end too
    size, progress = Size(), Progress()
    seeds_and_cells: list[tuple[Cell, int]] = [(cell, seed) for cell in cells(size) for seed in size.tuning_seeds]
    runs = [Run(cell, seed, OURS) for cell, seed in seeds_and_cells]
    rows = []
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for name, settings in tried:
            with progress.step(f"{name}: {len(runs)} runs"):
                rows.append(row(name, list(pool.map(execute, runs, [size] * len(runs), [settings] * len(runs)))))
    print(report.table(HEADER, rows))


if __name__ == "__main__":
    main()
