"""What goes round the ring for a window of a prompt, keys with their values or queries, decided by bytes.

The attention of a layer asks which way it goes (:mod:`attention`), and rank 0 how long a window has to be (:mod:`windows`).
Keys that go round are hidden behind the queries of a window, of which there must be enough. Queries that go round are hidden
behind the keys that each rank holds: however few queries there are, both their bytes and their work are in proportion to them.
"""

from typing import Literal


def keys_per_query(*, query_heads: int, key_heads: int, head_dim: int, element_bytes: int) -> float:
    """Bytes of a query that goes round and whose partial result comes home, over those of a key with its value.

    A partial result is Hq (D + 1) fp32 numbers. Always above 1.
    """
    query_bytes = query_heads * (head_dim * element_bytes + (head_dim + 1) * 4)
    return query_bytes / (2 * key_heads * head_dim * element_bytes)


def choose(*, new: float, past: float, keys_per_query: float) -> Literal["keys", "queries"]:
    """What goes round for a window of ``new`` tokens after ``past`` ones: what is fewer bytes.

    Meta's rule (arXiv 2411.01783, section 3.4: queries if new / (new + past) < 2 Hk / Hq), with what comes home counted too.
    """
    return "queries" if new * keys_per_query < new + past else "keys"
