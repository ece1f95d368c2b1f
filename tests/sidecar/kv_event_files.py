"""KV events as vLLM wrote them."""

from pathlib import Path

FOLDER = Path(__file__).parent / "kv_events"


def recorded(version: str) -> list[tuple[int, bytes]]:
    """Sequence number and payload of each batch."""
    lines = (FOLDER / f"vllm-{version}.recorded.txt").read_text().splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return [(int(sequence), bytes.fromhex(payload)) for sequence, payload in pairs]
