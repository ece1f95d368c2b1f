"""What a run will need, known before it begins: for the clairvoyant law, to which every regret is counted. Pure.

A request holds its prompt and half of its output from its arrival until its end, with each token as late as the goal allows;
its prompt is computed within the goal of the first token. What all hold over what a replica may hold, or the time of all
prompts over the time there is: the larger is what is needed. No law can know this; a lower bound it is not, as requests do
not share a replica as evenly as a sum does.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from bench.admission.workload import Arrival
from bench.autoscaling.replica import Engine, Goals


def needs(arrivals: Sequence[Arrival], engine: Engine, goals: Goals, *, share: float) -> Callable[[float, float], int]:
    """Most replicas needed at any second from one time to another; ``share`` of each is planned with."""
    changes = [0.0] * (int(_end(arrivals, engine, goals)) + 3)
    computing = [0.0] * len(changes)
    for each in arrivals:
        held = each.prompt_tokens + each.output_tokens / 2
        changes[int(each.at)] += held
        changes[int(_done(each, engine, goals)) + 1] -= held
        computing[int(each.at)] += each.prompt_tokens * engine.step_time.per_prefill_token
    window = max(1, round(goals.ttft_seconds))
    counts = [
        max(1, math.ceil(max(held / (share * engine.kv_tokens), sum(computing[at : at + window]) / (share * window))))
        for at, held in enumerate(accumulate(changes))
    ]

    def needed(begin: float, end: float) -> int:
        return max(counts[max(0, int(begin)) : int(end) + 1], default=1)

    return needed


def _done(arrival: Arrival, engine: Engine, goals: Goals) -> float:
    prompt = arrival.prompt_tokens * engine.step_time.per_prefill_token
    return arrival.at + prompt + arrival.output_tokens * goals.tpot_seconds


def _end(arrivals: Sequence[Arrival], engine: Engine, goals: Goals) -> float:
    return max(_done(each, engine, goals) for each in arrivals)
