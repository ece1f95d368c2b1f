"""The models that are measured: Llamas with random weights, wide enough that the dense layers count, a slim and a wide one."""

from typing import Any, Final

from tests.ring.tiny import Tiny


def _llama(**options: Any) -> Tiny:
    return Tiny("llama", "llama", {"max_position_embeddings": 1 << 20, "head_dim": 64, **options})


_WIDE: Final = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "vocab_size": 1024}
PREFILL: Final = _llama(**_WIDE, num_hidden_layers=4, num_key_value_heads=2)
SLOW_LINK: Final = _llama(**_WIDE, num_hidden_layers=3, num_key_value_heads=2)
DECODE: Final = _llama(**_WIDE, num_hidden_layers=4, num_key_value_heads=4)
LONG: Final = _llama(
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_hidden_layers=2,
    vocab_size=512,
)
"""Small enough for 100,000 tokens on two processors in a minute: nearly all of it is attention."""
PICTURE: Final = _llama(
    hidden_size=1536,
    intermediate_size=6144,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    num_hidden_layers=2,
    vocab_size=512,
)
"""As in large models, nearly all of a token's work is in the dense layers, until tens of thousands are before it."""
