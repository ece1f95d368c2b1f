"""``python -m bench.ring.picture``: what a ring looks like from outside, as the picture in docs/ring.md.

Four ranks compute one long prompt and decode; sampled are each process's CPU time and the bytes that it has sent. A ring
that is well shows curves that lie on one another, and a plateau of traffic: what is sent is in proportion to the tokens that are
computed. Their pace is even while the dense layers are most of their work, so the model is wide; behind a past that is long for a
model attention slows them down, and traffic falls with them.
"""

import argparse
import asyncio
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from bench.ring import models
from bench.ring.drawing import Panel, moves, rates, svg
from bench.ring.ranks import processors, prompt
from bench.ring.served import Answer, Served, write
from e2e.cluster.progress import Progress

RANKS: Final = 4
SAMPLE_SECONDS: Final = 0.25
LOAD_EVERY: Final = 2.0
TRAFFIC_EVERY: Final = 4.0
"""From one end of a window to another. Counters move there, and are seen to move up to a sample later."""
SETTINGS: Final = {"KVPLANE_RING_WINDOW_TOKENS": "64", "KVPLANE_RING_SLICE_SECONDS": "0.25"}
"""Loopback hides the exchange of short windows. With the default the first two would take many seconds, unseen until they end;
and of windows of a second a rank that is seen a sample later would seem to send a fifth more or less."""
OUTPUT_TOKENS: Final = 100
FILE: Final = Path(__file__).resolve().parents[2] / "docs" / "images" / "ring-load.svg"


class Recording:
    """Samples by rank, from one start."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.cpu_seconds: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        self.sent_bytes: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)

    @property
    def now(self) -> float:
        return time.monotonic() - self._began

    async def sample(self, served: Served, session: aiohttp.ClientSession) -> None:
        """One of each counter."""
        for rank, pid in served.pids().items():
            self.cpu_seconds[f"rank {rank}"].append((self.now, _cpu_seconds(pid)))
        async with session.get(f"{served.url}/metrics") as answer:
            text = await answer.text()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "kvplane_ring_sent_bytes_total":
                    self.sent_bytes[f"rank {sample.labels['rank']}"].append((self.now, sample.value))


def _cpu_seconds(pid: int) -> float:
    """Of the process so far, user and system (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def record(tokens: int, progress: Progress) -> str:
    """The picture of one request."""
    with tempfile.TemporaryDirectory(prefix="kvplane-bench-ring-") as folder:
        model = write(models.PICTURE, Path(folder) / "model")
        logs = Path(folder) / "logs"
        logs.mkdir()
        async with (
            Served(model, ranks=RANKS, logs=logs, settings=SETTINGS) as served,
            aiohttp.ClientSession() as session,
        ):
            recording, answer = Recording(), Answer()
            ids = prompt(tokens, vocabulary=models.PICTURE.options["vocab_size"], seed=1)
            with progress.step(f"{tokens} tokens over {RANKS} ranks"):
                asking = asyncio.create_task(served.ask(ids, count=OUTPUT_TOKENS, into=answer))
                while not asking.done():
                    await recording.sample(served, session)
                    await asyncio.sleep(SAMPLE_SECONDS)
                await asking  # for what it may have met
            end = recording.now
    if answer.first_seconds is None or answer.error is not None:
        raise RuntimeError(f"The request failed: {answer.error}.")
    load = {name: rates(samples, every=LOAD_EVERY) for name, samples in recording.cpu_seconds.items()}
    sent = {
        name: [(at, rate / 1e6) for at, rate in rates(moves(samples), every=TRAFFIC_EVERY)]
        for name, samples in recording.sent_bytes.items()
    }
    most = max((rate for points in sent.values() for _, rate in points), default=0.0)
    if not most:
        raise RuntimeError(f"The request was over before its traffic could be seen; give more than {tokens} --tokens.")
    return svg(
        [
            Panel(f"processors used by each rank ({RANKS} ranks on {len(processors())})", load, top=1.0),
            Panel("sent by each rank, MB/s", sent, top=1.2 * most),
        ],
        seconds=end,
        marks={"first token": answer.first_seconds},
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ring.picture", description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000, help="of the prompt [%(default)s]")
    arguments = parser.parse_args()
    drawn = asyncio.run(record(arguments.tokens, Progress()))
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(drawn)
    print(FILE)


if __name__ == "__main__":
    main()
