"""The load that tests/sidecar/kv_events was recorded under: small, but with hits, evictions, preemptions and chunks."""

import random

from bench.thrash.loads import Load, OneShots, Questions, Together
from bench.thrash.model import Engine

SECONDS = 8.0


def engine(kind: type[Engine] = Engine) -> Engine:
    return kind(blocks=40, max_batched_tokens=128, max_running=8)


def load() -> Load:
    random_ = random.Random(7)  # noqa: S311  (a load, not a secret)
    return Together(
        OneShots(
            clients=lambda now: 6, prompt_tokens=(20, 100), output_tokens=(20, 80), think_seconds=0.2, random_=random_
        ),
        Questions(per_second=lambda now: 2.0, documents=6, document_tokens=64, zipf=0.8, random_=random_),
    )
