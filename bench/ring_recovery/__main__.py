"""``python -m bench.ring_recovery``: ours and LeaderWorkerSet, one after the other on a cluster of their own (root)."""

import argparse
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from bench import lws, report
from bench.cluster import with_kvplane
from bench.ring_recovery import ours, theirs
from bench.ring_recovery.figures import Results
from e2e.cluster.progress import Progress
from e2e.rings.drill import Work
from e2e.stack import prepare_images, prepare_machine
from e2e.tests.fleet import unpacked_model
from tests.ring.tiny import wrong

RANKS: Final = 4
VICTIM: Final = 2
"""Opposite of rank 0: not the neighbour that notices a closed connection first."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int = 5
    """Kills of each kind."""
    prompt_tokens: int = 3000
    output_tokens: int = 400


def run(size: Size, folder: Path, progress: Progress) -> Results:
    """Both contestants on a fresh cluster, which is gone afterwards."""
    prepare_machine(progress)
    lws.program(progress)
    images = prepare_images(progress)
    model: Any = AutoModelForCausalLM.from_pretrained(
        unpacked_model(images, folder), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    work = Work(size.prompt_tokens, size.output_tokens)
    same: dict[str, Any] = {"ranks": RANKS, "victim": VICTIM, "work": work, "rounds": size.rounds}

    def mistakes(prompt: list[int], tokens: list[int]) -> list[int]:
        return wrong(model, prompt, tokens)

    values = {"replicas": "1", "rbac.nodes": "true"}
    with with_kvplane("ringbench", nodes=RANKS, images=images, values=values, progress=progress) as (cluster, stack):
        faults, leaders = ours.measure(stack, cluster, images, mistakes, progress=progress, **same)
        peers = theirs.measure(stack, cluster, images, mistakes, folder=folder, progress=progress, **same)
    return Results(ranks=RANKS, peer=lws.NAME, ours=faults, rank_0=leaders, theirs=peers)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ring_recovery", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one kill of each kind, to see that it works")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster goes
    size = Size(rounds=1) if arguments.quick else Size()
    started, machine, progress = report.now(), report.machine(), Progress()
    with tempfile.TemporaryDirectory(prefix="kvplane-bench-") as folder:
        results = run(size, Path(folder), progress)
    written = report.Report(
        bench="ring-recovery",
        machine=machine,
        started=started,
        settings=asdict(size),
        header=results.header(),
        rows=results.rows(),
        last_line=results.last_line(),
        samples=asdict(results),
    )
    progress.say(f"written: {written.write()}")
    if arguments.quick:
        print("A quick run shows that the benchmark works: no claim is made from its figures.")
    print(written.text())


if __name__ == "__main__":
    main()
