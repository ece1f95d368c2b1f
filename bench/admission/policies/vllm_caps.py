"""vLLM's own caps: ``--max-num-queued-reqs`` and ``--max-num-queued-tokens``, answered 503 without Retry-After.

Source: vllm-project/vllm, ``vllm/v1/engine/async_llm.py`` (``AsyncLLM.check_admission``) and
``vllm/v1/engine/output_processor.py`` (``get_num_queued_tokens``), release 0.32.0. Examples in our tests: its
``tests/v1/engine/test_admission_control.py`` at eb4d64a379a9c6e294d7f1c00e99053879b4061a.

The first cap counts requests that run and wait alike, so with it alone this is an in-flight cap. The second counts the
whole prompt of every request without a first token. In front of the real engine the flags themselves are used; this
class stands for them in the replay, and in the choice of the best in-flight cap with hindsight, where an engine start
for each value would cost more than the runs.
"""

from collections.abc import Mapping, Sequence

from bench.admission.policy import Request, Ruling, Verdict, View


class QueueCaps:
    """Both caps; ``None`` is no cap."""

    scrape_seconds = None
    progress_seconds = None

    def __init__(self, *, max_num_queued_reqs: int | None = None, max_num_queued_tokens: int | None = None) -> None:
        self._max_reqs = max_num_queued_reqs
        self._max_tokens = max_num_queued_tokens
        self._unfinished = 0
        self._prefilling: dict[int, int] = {}
        """Prompt tokens of requests without a first token, by id."""

    @property
    def name(self) -> str:
        caps = (("queue-cap", self._max_reqs), ("queued-tokens-cap", self._max_tokens))
        return ", ".join(f"{word} {cap}" for word, cap in caps if cap is not None) or "no cap"

    def on_arrival(self, request: Request, view: View, now: float) -> Verdict:
        if self._max_reqs is not None and self._unfinished + 1 > self._max_reqs:
            return Verdict.REFUSE
        if self._max_tokens is not None and sum(self._prefilling.values()) >= self._max_tokens:
            return Verdict.REFUSE
        self._unfinished += 1
        self._prefilling[request.id] = request.prompt_tokens
        return Verdict.PASS

    def on_first_token(self, request: Request, view: View, now: float) -> None:
        self._prefilling.pop(request.id, None)

    def on_progress(self, generated: Mapping[int, int], view: View, now: float) -> None:
        pass

    def on_finish(self, request: Request, output_tokens: int, view: View, now: float) -> None:
        self._unfinished -= 1
        self._prefilling.pop(request.id, None)

    def on_scrape(self, view: View, now: float) -> None:
        pass

    def on_tick(self, view: View, now: float) -> Sequence[Ruling]:
        return ()

    def next_tick_at(self, now: float) -> float | None:
        return None
