"""How many tokens a prompt has, estimated from its bytes and learned from what the engine reports as used.

Bytes per token depend on language and tokenizer: about 4 for English prose, 2 to 3 for code and for CJK text in UTF-8. A
tenant tends to send one kind, so each tenant has its own average; what is not yet known of a tenant is taken from all.
"""

from collections import OrderedDict
from typing import Final

_FIRST_BYTES_PER_TOKEN: Final = 3.0
"""Before anything is learned: rather too many tokens than too few."""
_BOUNDS: Final = (0.25, 64.0)
"""Outside of these a report is not about this text (an image, a prefix that the engine adds, a hostile body)."""
_WEIGHT: Final = 0.1
"""Of the newest request in the moving averages."""
_TENANTS: Final = 1024
"""Tenants remembered; the one unheard of for longest is forgotten first."""


class PromptLengths:
    """Bytes per prompt token: an exponentially weighted moving average per tenant, and one over all."""

    def __init__(self) -> None:
        self._everyone: float | None = None
        self._tenants: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        """Tenants remembered."""
        return len(self._tenants)

    def bytes_per_token(self, tenant: str) -> float:
        """The tenant's average; that of all where the tenant is new; 3 where nothing is learned yet."""
        return self._tenants.get(tenant, self._everyone or _FIRST_BYTES_PER_TOKEN)

    def estimate(self, text_bytes: int, tenant: str) -> int:
        """Tokens of a prompt of ``text_bytes``; at least 1. Raises ValueError for a negative size."""
        if text_bytes < 0:
            raise ValueError(f"text_bytes must be at least 0; it is {text_bytes}.")
        return max(1, round(text_bytes / self.bytes_per_token(tenant)))

    def learn(self, text_bytes: int, prompt_tokens: int, tenant: str) -> None:
        """Takes in what the engine counted for a prompt of ``text_bytes``; implausible pairs are ignored."""
        if text_bytes <= 0 or prompt_tokens <= 0:
            return
        ratio = text_bytes / prompt_tokens
        if not _BOUNDS[0] <= ratio <= _BOUNDS[1]:
            return
        old = self.bytes_per_token(tenant)
        known = tenant in self._tenants
        self._tenants[tenant] = old + _WEIGHT * (ratio - old) if known else ratio
        self._tenants.move_to_end(tenant)
        if len(self._tenants) > _TENANTS:
            self._tenants.popitem(last=False)
        everyone = self._everyone
        self._everyone = ratio if everyone is None else everyone + _WEIGHT * (ratio - everyone)
