"""A real engine's schedule, as ``bench.engine.recorder`` wrote it: read, timed, kept small, and repeated by the simulator.

``repeat`` gives the simulated engine the same requests before the same steps and compares every decision: what ran, how
many of its tokens were there before and how many are new, who was preempted, how many ran and waited, how many blocks
were free. Time plays no part in it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from bench.engine.model import Engine, EngineConfig, Request

FILE_VARIABLE: Final = "KVPLANE_BENCH_SCHEDULE"
"""Environment variable that names the recorder's file."""


@dataclass(frozen=True)
class Added:
    """A request that came before a step; requests are numbered in the order in which they came."""

    prompt_tokens: int
    output_tokens: int
    hashes: tuple[int, ...]
    """Of the full blocks of its prompt: equal numbers where prefixes are equal."""


@dataclass(frozen=True)
class Step:
    """One step of the scheduler."""

    added: tuple[Added, ...]
    aborted: tuple[int, ...]
    """Requests that were aborted before it."""
    scheduled: tuple[tuple[int, int, int], ...]
    """Request, its tokens with KV before the step, its new tokens."""
    preempted: tuple[int, ...]
    running: int
    waiting: int
    free: int
    """Blocks, after the decisions."""
    at: float = 0.0
    """When it began; seconds on the machine's monotonic clock."""
    seconds: float | None = None
    """How long it took, until the next one began if that was at once; None if unknown."""

    @property
    def prefill_tokens(self) -> int:
        return sum(new for _, _, new in self.scheduled if new > 1)

    @property
    def decodes(self) -> int:
        return sum(new == 1 for _, _, new in self.scheduled)

    @property
    def context_tokens(self) -> int:
        return sum(before for _, before, _ in self.scheduled)


@dataclass(frozen=True)
class Recording:
    """A part of a schedule that starts with an idle engine."""

    vllm: str
    config: EngineConfig
    steps: tuple[Step, ...]

    def write(self, path: Path, *, note: str) -> None:
        """As JSON with one line per step; times are left out."""
        head = {"note": note, "vllm": self.vllm, "config": asdict(self.config)}
        lines = [
            {
                "added": [[each.prompt_tokens, each.output_tokens, list(each.hashes)] for each in step.added],
                "aborted": step.aborted,
                "scheduled": step.scheduled,
                "preempted": step.preempted,
                "after": [step.running, step.waiting, step.free],
            }
            for step in self.steps
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = ",\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
        path.write_text(json.dumps(head)[:-1] + ', "steps": [\n' + text + "\n]}\n")

    @classmethod
    def read(cls, path: Path) -> "Recording":
        """What ``write`` wrote."""
        document = json.loads(path.read_text())
        steps = [
            Step(
                added=tuple(Added(prompt, output, tuple(hashes)) for prompt, output, hashes in line["added"]),
                aborted=tuple(line["aborted"]),
                scheduled=tuple((number, before, new) for number, before, new in line["scheduled"]),
                preempted=tuple(line["preempted"]),
                running=line["after"][0],
                waiting=line["after"][1],
                free=line["after"][2],
            )
            for line in document["steps"]
        ]
        return cls(vllm=document["vllm"], config=EngineConfig(**document["config"]), steps=tuple(steps))


def parse(lines: Iterable[str]) -> list[Step]:
    """The steps in a recorder's file; a last line that was cut off is left out."""
    numbers: dict[str, int] = {}
    found: list[Step] = []
    previous_left: int | None = None
    for text in lines:
        if not text.endswith("\n"):
            break
        line = json.loads(text)
        if "completed" in line:
            previous_left = line["left"]
            found[-1] = replace(found[-1], seconds=line["completed"] - found[-1].at)
            continue
        if found and previous_left:  # it went on at once: what lies between two steps belongs to the first
            found[-1] = replace(found[-1], seconds=line["at"] - found[-1].at)
        found.append(_step(line, numbers))
    return found


def _step(line: Mapping[str, Any], numbers: dict[str, int]) -> Step:
    for each in line["added"]:
        numbers[each["id"]] = len(numbers)
    return Step(
        added=tuple(Added(each["prompt"], each["max"], tuple(each["hashes"])) for each in line["added"]),
        aborted=tuple(numbers[each] for each in line["aborted"]),
        scheduled=tuple((numbers[each], before, new) for each, (before, new) in line["scheduled"].items()),
        preempted=tuple(numbers[each] for each in line["preempted"]),
        running=line["running"],
        waiting=line["waiting"],
        free=line["free"],
        at=line["at"],
    )


def renumbered(steps: Sequence[Step]) -> tuple[Step, ...]:
    """A part of a schedule that begins with an idle engine, its requests counted from 0.

    What earlier requests left in the prefix cache makes no difference as long as nobody finds it: it is evicted before
    anything of this part, as blank blocks are used first.
    """
    first = min(number for step in steps for number, _, _ in step.scheduled)
    return tuple(
        replace(
            step,
            aborted=tuple(number - first for number in step.aborted),
            scheduled=tuple((number - first, before, new) for number, before, new in step.scheduled),
            preempted=tuple(number - first for number in step.preempted),
        )
        for step in steps
    )


def differences(recording: Recording) -> list[str]:
    """Where the simulated engine decides otherwise than the real one did; empty if nowhere.

    Ends at the first step that differs, since all later ones follow from it.
    """
    engine = Engine(recording.config)
    requests: list[Request] = []
    for index, step in enumerate(recording.steps):
        for added in step.added:
            request = Request(
                name=len(requests),
                prompt_tokens=added.prompt_tokens,
                output_tokens=added.output_tokens,
                prefix_hashes=added.hashes,
            )
            requests.append(request)
            engine.add(request)
        for number in step.aborted:
            engine.abort(requests[number])
        batch = engine.schedule()
        if batch is None:
            if step.scheduled:
                return [f"step {index}: the real engine ran {len(step.scheduled)} requests, the simulated one is idle"]
            continue
        found = {
            "scheduled": [
                (request.name, request.computed - new, new)
                for request, new in zip(batch.requests, batch.new_tokens, strict=True)
            ],
            "preempted": sorted(_numbers(batch.preempted)),
            "running": len(engine.running),
            "waiting": len(engine.waiting),
            "free": engine.pool.free,
        }
        wanted = {
            "scheduled": list(step.scheduled),
            "preempted": sorted(step.preempted),
            "running": step.running,
            "waiting": step.waiting,
            "free": step.free,
        }
        if found != wanted:
            return [
                f"step {index}: {key} was {wanted[key]}, simulated {found[key]}"
                for key in wanted
                if found[key] != wanted[key]
            ]
        engine.complete(batch)
    return []


def _numbers(requests: Sequence[Request]) -> list[int]:
    return [request.name for request in requests if isinstance(request.name, int)]
