"""Is the spec valid and feasible? An ordered list of small checks; the first that objects gives the condition Accepted.

The API server has already refused what one object can tell (schema, CEL). What is left depends on the installation, on
other objects, or on arithmetic that CEL should not do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvplane_api import capacity
from kvplane_api.conditions import Condition, Reason, Type
from kvplane_api.service import LLMServiceSpec
from kvplane_operator.plan import quantities, sources
from kvplane_operator.plan.snapshot import Obstacle, Snapshot
from kvplane_operator.settings import OperatorSettings


@dataclass(frozen=True)
class Objection:
    """Why a spec is not accepted."""

    reason: Reason
    message: str


Check = Callable[[Snapshot, LLMServiceSpec, OperatorSettings], Objection | None]


def path_allowed(_: Snapshot, spec: LLMServiceSpec, settings: OperatorSettings) -> Objection | None:
    """path:// sources need the installation's consent: a hostPath reads any directory of a node."""
    if sources.scheme(spec.model.source) != "path" or settings.allow_path_sources:
        return None
    return Objection(
        Reason.PATH_NOT_ALLOWED,
        f"model.source is {spec.model.source}, a directory of the node, and this installation does not allow those. Use "
        "pvc:// or oci://, or install the chart with security.allowPathSources=true.",
    )


def ring_not_needed(_: Snapshot, spec: LLMServiceSpec, __: OperatorSettings) -> Objection | None:
    """Mode Auto above the ring threshold asks for a ring, which this version cannot run."""
    wanted, threshold = spec.context.max_tokens, spec.context.ring_threshold_tokens
    if spec.mode != "Auto" or wanted is None or wanted <= threshold:
        return None
    return Objection(
        Reason.RING_NOT_AVAILABLE,
        f"context.maxTokens is {wanted}, above context.ringThresholdTokens ({threshold}), so mode Auto asks for a ring, which "
        "this version does not have. Lower maxTokens, raise ringThresholdTokens, or set mode: Paged if one replica's KV "
        "memory holds that context.",
    )


def context_fits(_: Snapshot, spec: LLMServiceSpec, __: OperatorSettings) -> Objection | None:
    """Where model.facts are given, context.maxTokens must fit the KV memory of one replica."""
    facts, wanted, engine = spec.model.facts, spec.context.max_tokens, spec.engine
    if facts is None or wanted is None:
        return None
    fit = capacity.fit(
        capacity.ModelFacts(
            layers=facts.layers, kv_heads=facts.kv_heads, head_dim=facts.head_dim, parameters=facts.parameters
        ),
        context_tokens=wanted,
        accelerator_bytes=int(quantities.parse(facts.accelerator_memory)),
        accelerators=engine.tensor_parallel_size,
        memory_percent=engine.gpu_memory_percent,
        dtype=engine.dtype,
        kv_cache_dtype=engine.dtype if engine.kv_cache_dtype == "auto" else engine.kv_cache_dtype,
        block_size=engine.block_size or 16,
    )
    if fit.fits:
        return None
    auto = spec.mode == "Auto"
    return Objection(
        Reason.RING_NOT_AVAILABLE if auto else Reason.CONTEXT_EXCEEDS_CAPACITY,
        f"context.maxTokens is {wanted}, and by model.facts one replica holds {fit.capacity_tokens} tokens of KV cache "
        f"({fit.kv_bytes_per_token} bytes per token, {fit.kv_bytes // 2**20} MiB for KV beside {fit.weight_bytes // 2**20} MiB of "
        "weights). "
        + ("Mode Auto asks for a ring, which this version does not have. " if auto else "")
        + "Lower maxTokens, raise engine.tensorParallelSize, set engine.kvCacheDtype: fp8 or use accelerators with more memory.",
    )


def children_writable(snapshot: Snapshot, _: LLMServiceSpec, __: OperatorSettings) -> Objection | None:
    """What the API server or another owner said at the last attempt to write the children."""
    for blocked in snapshot.blocked:
        if blocked.obstacle is Obstacle.CONFLICT:
            return Objection(Reason.CHILD_CONFLICT, blocked.message)
        if blocked.obstacle is Obstacle.REJECTED:
            return Objection(Reason.CHILD_REJECTED, blocked.message)
    return None


BEFORE_WRITING: Final[tuple[Check, ...]] = (path_allowed, ring_not_needed, context_fits)
"""An objection of these keeps the plan from touching the children: what runs goes on as it is."""

AFTER_WRITING: Final[tuple[Check, ...]] = (children_writable,)


def first_objection(
    checks: tuple[Check, ...], snapshot: Snapshot, spec: LLMServiceSpec, settings: OperatorSettings
) -> Objection | None:
    """The first objection of ``checks``, None if they all agree."""
    for check in checks:
        if objection := check(snapshot, spec, settings):
            return objection
    return None


def accepted(objection: Objection | None) -> Condition:
    """The condition Accepted."""
    if objection is None:
        return Condition(Type.ACCEPTED, "True", Reason.VALID, "The spec is valid.")
    return Condition(Type.ACCEPTED, "False", objection.reason, objection.message)
