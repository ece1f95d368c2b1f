"""Writes down every decision of a real vLLM's scheduler: ``--scheduler-cls bench.engine.recorder.RecordingScheduler``.

Runs inside vLLM, with the repository on PYTHONPATH; the environment variable KVPLANE_BENCH_SCHEDULE names its file. One
JSON line per step: when it began, which requests came since the last step, what was scheduled, who was preempted, and
what was free afterwards. From the lines come the fit of the step times (``fit``) and the recorded schedules that the
simulator must repeat (tests/bench/schedules).
"""

import json
import os
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from bench.engine.schedule import FILE_VARIABLE


class RecordingScheduler(Scheduler):  # type: ignore[misc]  # vLLM is not installed where mypy runs
    """vLLM's scheduler; it decides nothing of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = open(os.environ[FILE_VARIABLE], "w", buffering=1)  # noqa: PTH123, SIM115 open until the engine ends
        self._added: list[dict[str, Any]] = []
        self._aborted: list[str] = []
        self._names: dict[bytes, int] = {}

    def add_request(self, request: Any) -> None:
        super().add_request(request)
        self._added.append(
            {
                "id": request.request_id,
                "prompt": request.num_prompt_tokens,
                "max": request.max_tokens,
                # Small numbers for the hashes of its prompt's full blocks: equal where a prefix is shared.
                "hashes": [self._names.setdefault(h, len(self._names)) for h in request.block_hashes],
            }
        )

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        aborted = super().finish_requests(request_ids, finished_status)
        self._aborted += [request.request_id for request in aborted]
        return aborted

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        at = time.monotonic()
        preempted_before = {r.request_id: r.num_preemptions for r in self.running}
        output = super().schedule(*args, **kwargs)
        scheduled = {}
        for request_id, new in output.num_scheduled_tokens.items():
            # schedule() has added the new tokens already.
            scheduled[request_id] = [self.requests[request_id].num_computed_tokens - new, new]
        line = {
            "at": at,
            "decided": time.monotonic(),
            "added": self._added,
            "aborted": self._aborted,
            "scheduled": scheduled,
            "preempted": [
                request_id
                for request_id, before in preempted_before.items()
                if request_id in self.requests and self.requests[request_id].num_preemptions > before
            ],
            "running": len(self.running),
            "waiting": len(self.waiting),
            "free": self.kv_cache_manager.block_pool.get_num_free_blocks(),
        }
        self._added, self._aborted = [], []
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        output = super().update_from_output(*args, **kwargs)
        left = len(self.running) + len(self.waiting)
        self._file.write(f'{{"completed":{time.monotonic()},"left":{left}}}\n')
        return output

    def shutdown(self) -> None:
        self._file.close()
        super().shutdown()
