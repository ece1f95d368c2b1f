"""How many ranks a ring needs: what the user says, or the smallest that holds the context."""

from kvplane_api import capacity
from kvplane_api.service import LLMServiceSpec, Ring
from kvplane_operator.plan.mode import accelerator_bytes, model_facts


def asked(spec: LLMServiceSpec) -> Ring:
    """spec.ring, with its defaults where it is not given."""
    return spec.ring or Ring()


def fit(spec: LLMServiceSpec) -> capacity.RingFit | None:
    """The smallest ring for context.maxTokens by model.facts; None where one of them is not given.

    With ``reserve: Survive`` the context still fits when a rank is lost, so one rank more is needed.
    """
    facts, wanted = model_facts(spec), spec.context.max_tokens
    if facts is None or wanted is None:
        return None
    return capacity.ring_fit(
        facts,
        context_tokens=wanted,
        rank_bytes=accelerator_bytes(spec),
        dtype=spec.engine.dtype,
        spare_ranks=1 if asked(spec).recovery.reserve == "Survive" else 0,
    )


def size(spec: LLMServiceSpec) -> int | None:
    """Ranks of each ring; None where the spec does not tell."""
    if (given := asked(spec).size) is not None:
        return given
    planned = fit(spec)
    return planned.size if planned else None
