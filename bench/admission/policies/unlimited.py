"""No admission: everything goes to the engine at once. This is vLLM's default."""

from collections.abc import Mapping, Sequence

from bench.admission.policy import Request, Ruling, Verdict, View


class Unlimited:
    """Lets everything pass."""

    name = "none"
    scrape_seconds = None
    progress_seconds = None

    def on_arrival(self, request: Request, view: View, now: float) -> Verdict:
        return Verdict.PASS

    def on_first_token(self, request: Request, view: View, now: float) -> None:
        pass

    def on_progress(self, generated: Mapping[int, int], view: View, now: float) -> None:
        pass

    def on_finish(self, request: Request, output_tokens: int, view: View, now: float) -> None:
        pass

    def on_scrape(self, view: View, now: float) -> None:
        pass

    def on_tick(self, view: View, now: float) -> Sequence[Ruling]:
        return ()

    def next_tick_at(self, now: float) -> float | None:
        return None
