"""The ring benchmark's peers have the same processors as the ring."""

from bench.ring import peers
from bench.ring.ranks import processors
from e2e.cluster.progress import Progress


def test_vllm_computes_on_all_processors() -> None:
    engine = peers.vllm(tokens=8000, positions=16_000, progress=Progress(quiet=True))
    assert engine._extra_environment["OMP_NUM_THREADS"] == str(len(processors()))
    assert engine.max_model_len >= 8000 + 1
