"""Is the spec valid and feasible? An ordered list of small checks; the first that objects gives the condition Accepted.

The API server has already refused what one object can tell (schema, CEL). What is left depends on the installation, on
other objects, or on arithmetic that CEL should not do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pydantic.alias_generators import to_camel

from kvplane_api.conditions import Condition, Reason, Type
from kvplane_api.service import (
    LARGEST_RING,
    MOST_RING_GROUPS,
    PAGED_ADMISSION_FIELDS,
    PAGED_ENGINE_FIELDS,
    RING_ENV,
    LLMServiceSpec,
)
from kvplane_operator.plan import sources
from kvplane_operator.plan.mode import Choice, choose, replica_fit
from kvplane_operator.plan.ring import size as ring_size
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


def ring_available(_: Snapshot, spec: LLMServiceSpec, settings: OperatorSettings) -> Objection | None:
    """A ring needs an image of the ring engine, from the spec or from the installation."""
    choice = choose(spec)
    if choice.mode == "Paged" or settings.ring_image or ring_size.asked(spec).image:
        return None
    return Objection(
        Reason.RING_NOT_AVAILABLE,
        f"{choice.why or 'mode is Ring.'} This installation has no image of the ring engine: set ring.image, install the "
        "chart with defaults.ringImage, or set mode: Paged.",
    )


def ring_supports(_: Snapshot, spec: LLMServiceSpec, __: OperatorSettings) -> Objection | None:
    """Fields that the ring engine does not have are not ignored: what CEL refuses in mode Ring, where Auto chose it, and
    in both cases the bounds on KV memory that only the sidecar of a paged engine keeps."""
    choice = choose(spec)
    if choice.mode == "Paged":
        return None
    given = {to_camel(name) for name in spec.engine.model_fields_set}
    foreign = [f"engine.{name}" for name in PAGED_ENGINE_FIELDS if name in given]
    if sources.scheme(spec.model.source) == "hf":
        foreign.append("an hf:// model.source (use pvc://, oci:// or path://)")
    if spec.engine.dtype == "float16":
        foreign.append("engine.dtype: float16")
    bounds = {to_camel(name) for name in spec.admission.model_fields_set}
    foreign += [f"admission.{name}" for name in PAGED_ADMISSION_FIELDS if name in bounds]
    foreign += [f"engine.env {env.name}" for env in spec.engine.env or () if env.name in RING_ENV]
    if "rollout" in spec.model_fields_set:
        foreign.append("rollout")
    if spec.replicas > MOST_RING_GROUPS:
        foreign.append(f"replicas above {MOST_RING_GROUPS}")
    if spec.autoscaling is not None and (spec.autoscaling.max_replicas or 0) > MOST_RING_GROUPS:
        foreign.append(f"autoscaling.maxReplicas above {MOST_RING_GROUPS}")
    if not foreign:
        return None
    return Objection(
        Reason.UNSUPPORTED_BY_RING,
        f"{choice.why or 'mode is Ring.'} The ring engine does not take {', '.join(foreign)}: remove that, or set mode: Paged.",
    )


def ring_size_known(_: Snapshot, spec: LLMServiceSpec, __: OperatorSettings) -> Objection | None:
    """The size of a ring is asked for, or can be planned."""
    choice = choose(spec)
    if choice.mode == "Paged" or ring_size.asked(spec).size is not None or ring_size.fit(spec) is not None:
        return None
    return Objection(
        Reason.RING_SIZE_UNKNOWN,
        f"{choice.why or 'mode is Ring.'} Nothing says how many ranks a ring needs: set ring.size, or give model.facts.",
    )


def context_fits(_: Snapshot, spec: LLMServiceSpec, __: OperatorSettings) -> Objection | None:
    """Where model.facts are given, context.maxTokens must fit the KV memory of one replica, or of one ring."""
    choice = choose(spec)
    return _replica_holds(spec) if choice.mode == "Paged" else _ring_holds(spec, choice)


def _replica_holds(spec: LLMServiceSpec) -> Objection | None:
    fit = replica_fit(spec)
    if fit is None or fit.fits:
        return None
    return Objection(
        Reason.CONTEXT_EXCEEDS_CAPACITY,
        f"context.maxTokens is {fit.needed_tokens}, and by model.facts one replica holds {fit.capacity_tokens} tokens of KV "
        f"cache ({fit.kv_bytes_per_token} bytes per token, {fit.kv_bytes // 2**20} MiB for KV beside "
        f"{fit.weight_bytes // 2**20} MiB of weights). Lower maxTokens, raise engine.tensorParallelSize, set "
        "engine.kvCacheDtype: fp8, use accelerators with more memory, or use mode Ring.",
    )


def _ring_holds(spec: LLMServiceSpec, choice: Choice) -> Objection | None:
    fit, size = ring_size.fit(spec), ring_size.asked(spec).size
    if fit is None:
        return None
    numbers = (
        f"{choice.why or 'mode is Ring.'} By model.facts a rank holds {fit.rank_tokens} tokens of KV cache "
        f"({fit.kv_bytes_per_token} bytes per token, {fit.kv_bytes // 2**20} MiB for KV beside {fit.weight_bytes // 2**20} MiB "
        "of weights)"
    )
    if fit.size is None:
        return Objection(
            Reason.CONTEXT_EXCEEDS_CAPACITY,
            f"{numbers}, so a ring of any size holds none: use accelerators with more memory, or a smaller model.",
        )
    if fit.size > LARGEST_RING and size is None:
        return Objection(
            Reason.CONTEXT_EXCEEDS_CAPACITY,
            f"{numbers}, so context.maxTokens {spec.context.max_tokens} needs {fit.size} ranks, more than a ring may have "
            f"({LARGEST_RING}). Lower maxTokens, or use accelerators with more memory.",
        )
    if size is not None and size < fit.size:
        return Objection(
            Reason.CONTEXT_EXCEEDS_CAPACITY,
            f"{numbers}, so context.maxTokens {spec.context.max_tokens} needs {fit.size} ranks, and ring.size is {size}. "
            f"Set ring.size to {fit.size} or leave it out, or lower maxTokens.",
        )
    return None


def children_writable(snapshot: Snapshot, _: LLMServiceSpec, __: OperatorSettings) -> Objection | None:
    """What the API server or another owner said at the last attempt to write the children."""
    for blocked in snapshot.blocked:
        if blocked.obstacle is Obstacle.CONFLICT:
            return Objection(Reason.CHILD_CONFLICT, blocked.message)
        if blocked.obstacle is Obstacle.REJECTED:
            return Objection(Reason.CHILD_REJECTED, blocked.message)
    return None


BEFORE_WRITING: Final[tuple[Check, ...]] = (path_allowed, ring_available, ring_supports, ring_size_known, context_fits)
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


def accepted(objection: Objection | None, *, notes: str = "") -> Condition:
    """The condition Accepted; ``notes`` is what else there is to know of a valid spec."""
    if objection is None:
        return Condition(Type.ACCEPTED, "True", Reason.VALID, f"The spec is valid. {notes}".rstrip())
    return Condition(Type.ACCEPTED, "False", objection.reason, objection.message)
