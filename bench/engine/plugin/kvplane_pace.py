"""A plugin for vLLM that gives its steps the time of a steady accelerator, whatever processor computes them.

A shared processor computes at changing speed, by a factor of two within minutes, and a benchmark of admission judges
requests by seconds: the same traffic on the same engine met its goals to 68 or to 100 %. So a small model is computed for
real, and each step then lasts until the time is over that ``KVPLANE_PACE`` gives it. Scheduling, KV blocks, preemption,
sampling and HTTP are vLLM's, and so is their time. It also leaves the processor to the rest of the machine for as long as
a GPU would.

A step that is not done in its time is not hurried: it is reported on standard error, for the benchmark to count.
"""

import json
import os
import sys
import time
from typing import Any

VARIABLE = "KVPLANE_PACE"
"""A JSON object: seconds ``base`` of a step, ``per_prefill_token`` and ``per_decode``."""
_TOLERANCE_SECONDS = 0.001


def register() -> None:
    """Called by vLLM in each of its processes, in some of them twice."""
    from vllm.v1.worker.gpu_worker import Worker  # noqa: PLC0415  (torch; only where vLLM runs)

    if hasattr(Worker, "kvplane_due"):
        return
    pace = json.loads(os.environ[VARIABLE])
    compute, sample = Worker.execute_model, Worker.sample_tokens

    def execute_model(worker: Any, scheduled: Any) -> Any:
        begin = time.perf_counter()
        worker.kvplane_due = begin, begin + seconds(pace, list(scheduled.num_scheduled_tokens.values()))
        return compute(worker, scheduled)

    def sample_tokens(worker: Any, grammar: Any) -> Any:
        output = sample(worker, grammar)
        begin, due = worker.kvplane_due
        now = time.perf_counter()
        if now < due:
            time.sleep(due - now)
        elif now > due + _TOLERANCE_SECONDS:
            print(overrun(due - begin, now - begin), file=sys.stderr, flush=True)
        return output

    Worker.kvplane_due = None
    Worker.execute_model, Worker.sample_tokens = execute_model, sample_tokens


def overrun(given: float, taken: float) -> str:
    """The line for a step that took longer than it was given, both in seconds; ``bench.admission.counters`` reads it."""
    return f"kvplane_pace: a step of {1000 * given:.1f} ms took {1000 * taken:.1f} ms"


def seconds(pace: dict[str, float], scheduled: list[int]) -> float:
    """Time of a step with so many tokens of each request: one is a decode's, more are a prompt's; 0 for an empty step."""
    if not scheduled:
        return 0.0
    decodes = sum(tokens == 1 for tokens in scheduled)
    return pace["base"] + pace["per_decode"] * decodes + pace["per_prefill_token"] * (sum(scheduled) - decodes)
