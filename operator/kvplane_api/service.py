"""The ``LLMService`` resource, v1alpha1: the source of the CRD, of the API reference and of the operator's parsing.

Only fields that code reads are here; the API server refuses the rest. Conventions: times end in ``Seconds``, sizes in
``Tokens``, ``Bytes`` or ``Percent`` and are integers; enums are CamelCase; every string, list and map is bounded; a
description begins with the field's name and says default, unit and what happens when it is unset. Rules that concern
one object are CEL here; what depends on other objects or on the installation becomes the condition ``Accepted``.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from kvplane_api import names
from kvplane_api.conditions import MESSAGE_LIMIT
from kvplane_api.schema import PERSISTED_DEFAULT

SERVICE_NAME_LIMIT = 43
"""Longest name of an LLMService: the children's names append up to 20 characters to it and stay below 64."""

OWNED_ENGINE_FLAGS = (
    "--model",
    "--served-model-name",
    "--host",
    "--port",
    "--uds",
    "--revision",
    "--tokenizer-revision",
    "--dtype",
    "--kv-cache-dtype",
    "--tensor-parallel-size",
    "-tp",
    "--gpu-memory-utilization",
    "--device-memory-utilization",
    "--max-model-len",
    "--block-size",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
    "--speculative-config",
    "-sc",
    "--spec-method",
    "--spec-model",
    "--spec-tokens",
    "--kv-transfer-config",
    "--kv-offloading-size",
    "--kv-offloading-backend",
    "--kv-events-config",
    "--shutdown-timeout",
    "--disable-log-stats",
    "--disable-uvicorn-access-log",
    "--headless",
    "--grpc",
    "--ssl-certfile",
    "--ssl-keyfile",
    "--config",
)
"""Engine flags that fields of the API set, or that would lead traffic round the sidecar or blind it. The engine's parser
also takes any unambiguous beginning of a flag for it, so those are refused too."""

_FREE_FLAGS_THAT_BEGIN_AN_OWNED_ONE = ("--tokenizer",)

RESERVED_ENV = ("HF_HOME", "HF_TOKEN", "VLLM_HOST_IP")

PAGED_ENGINE_FIELDS = (
    "image",
    "kvCacheDtype",
    "tensorParallelSize",
    "extraArgs",
    "blockSize",
    "gpuMemoryPercent",
    "maxBatchedTokens",
    "prefixCaching",
    "speculative",
    "kvOffload",
    "kvTransfer",
)
"""Fields of ``spec.engine`` that the ring engine does not have. A ring refuses them: a field is never ignored."""

PAGED_ADMISSION_FIELDS = ("reservation", "kvHardCapPercent", "kvPeakPercent")
"""Fields of ``spec.admission`` by which a sidecar holds KV memory back. A ring's own scheduler knows its memory, and refuses them
too."""

RING_ENV = ("WORLD_SIZE", "PROMPT_SPLIT_STRATEGY", "POD_IP", "POD_UID")
"""Environment that the operator sets in a ring's engines, beside KVPLANE_*."""

LARGEST_RING = 256
MOST_RING_GROUPS = 1000
"""Names of a group's StatefulSet, and of the revisions of it that Kubernetes puts into a label, hold three digits."""


def _cel(rule: str, message: str, **more: str) -> dict[str, str]:
    return {"rule": rule, "message": message, **more}


def _rules(*rules: dict[str, str]) -> dict[str, Any]:
    return {"x-kubernetes-validations": list(rules)}


_INT_OR_STRING: dict[str, Any] = {"x-kubernetes-int-or-string": True, "maxLength": 32}
_BY_NAME: dict[str, Any] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
_FREE_FORM: dict[str, Any] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}

Name = Annotated[
    str,
    Field(
        max_length=253,
        json_schema_extra=_rules(
            _cel(
                "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
                "It must be the name of an object in the service's namespace: lower-case letters, digits, '-' and '.', for "
                "example hub-token.",
            )
        ),
    ),
]
Bytes = Annotated[
    str,
    Field(
        max_length=24,
        json_schema_extra=_rules(
            _cel(
                "self.matches('^[1-9][0-9]*([.][0-9]+)?(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$')",
                "It must be a size in bytes above 0, written as a Kubernetes quantity, for example 40Gi.",
            )
        ),
    ),
]


def _cel_list(values: tuple[str, ...]) -> str:
    return "[" + ", ".join(f"'{value}'" for value in values) + "]"


class _Model(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )


class TokenSecretRef(_Model):
    """A key of a Secret in the service's namespace."""

    name: Name
    """name of the Secret."""
    key: Annotated[str, Field(max_length=253, min_length=1)] = "token"
    """key in the Secret whose value is the token. Default: token."""


class ModelCache(_Model):
    """Where hf:// models are downloaded to."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            _cel(
                "has(self.claimName) != has(self.sizeLimit)",
                "model.cache needs exactly one of claimName (a PersistentVolumeClaim that replicas share and that outlives "
                "them) and sizeLimit (an emptyDir of at most that size, per pod).",
            )
        )
    )

    claim_name: Name | None = None
    """claimName of an existing PersistentVolumeClaim in the service's namespace. With several replicas on several nodes it
    must be ReadWriteMany. Pods that start later find the model there and download nothing."""
    size_limit: Bytes | None = None
    """sizeLimit of the emptyDir that holds the model, as a quantity (40Gi). A pod that needs more is evicted by the
    kubelet."""


class ModelFacts(_Model):
    """What is known of the model beforehand; lets the operator check that a context fits before anything starts."""

    layers: Annotated[int, Field(ge=1, le=10_000)]
    """layers: number of transformer layers (num_hidden_layers)."""
    kv_heads: Annotated[int, Field(ge=1, le=10_000)]
    """kvHeads: number of key/value heads (num_key_value_heads)."""
    head_dim: Annotated[int, Field(ge=1, le=65_536)]
    """headDim: dimension of one head (head_dim)."""
    parameters: Annotated[int, Field(ge=1, le=10**14, json_schema_extra={"format": "int64"})]
    """parameters: number of weights. 8000000000 for an 8B model."""
    accelerator_memory: Bytes
    """acceleratorMemory of one accelerator, as a quantity (80Gi). Of engines on CPUs: of one pod."""


_SOURCE_RULES = _rules(
    _cel(
        "self.startsWith('hf://') || self.startsWith('pvc://') || self.startsWith('oci://') || self.startsWith('path://')",
        "model.source must begin with hf://, pvc://, oci:// or path://, for example hf://Qwen/Qwen3-8B.",
    ),
    _cel(
        "!self.startsWith('hf://') || self.matches('^hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*"
        "(@[A-Za-z0-9][A-Za-z0-9._/-]*)?$')",
        "model.source hf:// needs ORG/NAME, with @REVISION if a branch, tag or commit is meant, for example "
        "hf://Qwen/Qwen3-8B@main.",
    ),
    _cel(
        "!self.startsWith('pvc://') || self.matches('^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[A-Za-z0-9._-]+)*/?$')",
        "model.source pvc:// needs CLAIM[/PATH], for example pvc://models/qwen3-8b.",
    ),
    _cel(
        "!self.startsWith('oci://') || self.matches('^oci://[a-z0-9][A-Za-z0-9._:/@-]*$')",
        "model.source oci:// needs an image reference, for example oci://registry.example.com/models/qwen3-8b:1.",
    ),
    _cel(
        "!self.startsWith('path://') || self.matches('^path:///[A-Za-z0-9._/-]+$')",
        "model.source path:// needs an absolute directory of the node, for example path:///srv/models/qwen3-8b.",
    ),
    _cel(
        "!self.split('/').exists(part, part == '..')",
        "model.source must not contain '..' as a path element: the model is mounted from below the named claim or directory.",
    ),
)


class Model(_Model):
    """Which model is served, and where its weights come from."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            _cel(
                "!has(self.tokenSecretRef) || self.source.startsWith('hf://')",
                "model.tokenSecretRef is read for hf:// sources only; remove it, or use an hf:// source.",
            ),
            _cel(
                "!has(self.cache) || self.source.startsWith('hf://')",
                "model.cache holds downloads of hf:// sources only; remove it, or use an hf:// source.",
            ),
        )
    )

    source: Annotated[str, Field(min_length=6, max_length=512, json_schema_extra=_SOURCE_RULES)]
    """source of the weights: hf://ORG/NAME[@REVISION] (a model hub), pvc://CLAIM[/PATH] (a volume), oci://IMAGE (an image
    volume: Kubernetes 1.35, or 1.33 with the feature gate ImageVolume) or path:///DIRECTORY (hostPath; only where the
    installation and the namespace's pod security allow it). A change is a rollout."""
    served_name: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """servedName: the model name that clients send. Default: metadata.name."""
    token_secret_ref: TokenSecretRef | None = None
    """tokenSecretRef names the Secret with the hub's token for gated hf:// models. It becomes an environment variable of
    the engine; the operator never reads it. Unset: anonymous."""
    cache: ModelCache | None = None
    """cache: where hf:// models are kept. Unset: an emptyDir without limit, per pod; every new pod downloads again."""
    facts: ModelFacts | None = None
    """facts about the model. Unset: nothing is checked before the engine starts."""


class Context(_Model):
    """How long prompts may be."""

    max_tokens: Annotated[int, Field(ge=16, le=100_000_000)] | None = None
    """maxTokens: longest prompt + output, in tokens, that a user may send. Unset: the longest that the model and the KV
    cache of one replica allow, found by the engine when it starts."""
    ring_threshold_tokens: Annotated[int, Field(ge=16, le=100_000_000)] = 100_000
    """ringThresholdTokens: mode Auto chooses a ring when maxTokens is above it. Default: 100000 tokens."""


class EnvVar(_Model):
    """One environment variable of the engine."""

    name: Annotated[
        str,
        Field(
            max_length=253,
            json_schema_extra=_rules(
                _cel(
                    "self.matches('^[-._a-zA-Z][-._a-zA-Z0-9]*$')",
                    "It must be a name of letters, digits, '_', '-' and '.', not beginning with a digit, for example NCCL_DEBUG.",
                )
            ),
        ),
    ]
    """name of the variable."""
    value: Annotated[str, Field(max_length=8192)] | None = None
    """value of the variable. Unset: empty, unless valueFrom is given."""
    value_from: Annotated[dict[str, Any], Field(json_schema_extra=_FREE_FORM)] | None = None
    """valueFrom: a Kubernetes EnvVarSource (secretKeyRef, configMapKeyRef, fieldRef, resourceFieldRef)."""


class Speculative(_Model):
    """Speculative decoding."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            _cel(
                "self.method == 'Ngram' ? !has(self.model) : has(self.model)",
                "engine.speculative.model is needed for methods Draft and Eagle3 and refused for Ngram, which needs no model.",
            )
        )
    )

    method: Literal["Ngram", "Draft", "Eagle3"]
    """method: Ngram (looks the continuation up in the prompt), Draft (a smaller model) or Eagle3 (a trained head)."""
    tokens: Annotated[int, Field(ge=1, le=32)] = 4
    """tokens proposed per step. Default: 4."""
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """model of the methods Draft and Eagle3, as the engine takes it: ORG/NAME, or a path inside the pod."""


class KVOffload(_Model):
    """A second tier of KV cache in host memory."""

    cpu_memory: Bytes
    """cpuMemory for offloaded KV blocks, as a quantity (20Gi), over all accelerators of a replica. It counts towards the
    container's memory."""


ResourceList = Annotated[
    dict[str, Annotated[int | str, Field(json_schema_extra=_INT_OR_STRING)]],
    Field(
        max_length=32,
        json_schema_extra=_rules(
            _cel(
                "self.all(name, string(self[name]).matches('^[0-9]+([.][0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$'))",
                "engine.resources values must be Kubernetes quantities, for example 500m, 2 or 80Gi.",
            ),
            _cel(
                "self.all(name, !name.contains('/') || string(self[name]).matches('^[0-9]{1,9}$'))",
                "engine.resources values of extended resources such as nvidia.com/gpu must be whole numbers, for example 4.",
            ),
        ),
    ),
]


class ResourceRequirements(_Model):
    """Kubernetes resource requests and limits."""

    limits: ResourceList | None = None
    """limits by resource name. The installation's defaults.accelerator is added where it is not named; 0 of it asks for
    none."""
    requests: ResourceList | None = None
    """requests by resource name. Unset: as limits."""


_FLAG = "self.split('=')[0].split('.')[0].replace('_', '-')"
_ARG_RULES = _rules(
    _cel(
        f"!self.startsWith('-') || {_FLAG} in {_cel_list(_FREE_FLAGS_THAT_BEGIN_AN_OWNED_ONE)} || "
        f"!{_cel_list(OWNED_ENGINE_FLAGS)}.exists(flag, flag.startsWith({_FLAG}))",
        "engine.extraArgs must not set a flag that a field of the LLMService sets or that the operator owns (such as --model, "
        "--host, --port, --max-model-len, --block-size); use the field: see kubectl explain llmservice.spec.engine.",
    )
)
_ENV_RULES = _rules(
    _cel(
        f"self.all(e, !e.name.startsWith('KVPLANE_') && !(e.name in {_cel_list(RESERVED_ENV)}))",
        "engine.env must not set KVPLANE_*, HF_HOME, HF_TOKEN or VLLM_HOST_IP: the operator sets them (model.cache, "
        "model.tokenSecretRef).",
    ),
    _cel(
        "self.all(e, !(has(e.value) && has(e.valueFrom)))",
        "engine.env entries take value or valueFrom, not both.",
    ),
)


class Engine(_Model):
    """How the engine runs. Unset fields leave the engine's own defaults."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            _cel(
                "!has(self.tensorParallelSize) || !has(self.resources) || !has(self.resources.limits) || "
                "!('nvidia.com/gpu' in self.resources.limits) || "
                "!string(self.resources.limits['nvidia.com/gpu']).matches('^[0-9]{1,9}$') || "
                "int(string(self.resources.limits['nvidia.com/gpu'])) % self.tensorParallelSize == 0",
                "engine.tensorParallelSize must divide the accelerators in engine.resources.limits['nvidia.com/gpu']; ask for "
                "tensorParallelSize accelerators, or leave them out and the operator asks for that many.",
            )
        )
    )

    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """image of the engine. Default: the installation's defaults.engineImage."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """dtype of weights and activations. Default: auto (the model's own)."""
    kv_cache_dtype: Literal["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """kvCacheDtype: element type of the KV cache. Default: auto (as dtype). fp8 halves KV memory where the accelerator
    supports it."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = 1
    """tensorParallelSize: accelerators that share each layer of one replica. Default: 1."""
    resources: ResourceRequirements | None = None
    """resources of the engine container. Unset: the installation's defaults.accelerator x tensorParallelSize, and no
    cpu or memory bounds."""
    env: Annotated[list[EnvVar], Field(max_length=64, json_schema_extra={**_BY_NAME, **_ENV_RULES})] | None = None
    """env: further environment variables of the engine; one that the operator sets too (HOME, ...) takes this value."""
    extra_args: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=1024, json_schema_extra=_ARG_RULES)]],
            Field(max_length=64),
        ]
        | None
    ) = None
    """extraArgs: further command line arguments of the engine, passed as they are. Flags that fields set are refused."""
    block_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    """blockSize: tokens per KV block. Smaller wastes less at the end of each sequence, larger costs less to manage."""
    gpu_memory_percent: Annotated[int, Field(ge=10, le=99)] = 90
    """gpuMemoryPercent of the accelerator's memory (on CPU engines: of the node's) that the engine may take for weights,
    activations and KV cache. Default: 90."""
    startup_timeout_seconds: Annotated[int, Field(ge=10, le=86_400)] = 3600
    """startupTimeoutSeconds: longest time from the engine's start to its first healthy answer, download included; then
    the container is restarted. Default: 3600."""
    max_batched_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """maxBatchedTokens: tokens computed in one step, over all requests."""
    max_sequences: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """maxSequences: requests computed at the same time."""
    prefix_caching: Literal["Enabled", "Disabled"] = "Enabled"
    """prefixCaching: keep KV blocks of finished requests and share equal prefixes. Default: Enabled."""
    speculative: Speculative | None = None
    """speculative decoding. Unset: off."""
    kv_offload: KVOffload | None = None
    """kvOffload: KV blocks that leave the accelerator are kept in host memory. Unset: off."""
    kv_transfer: Annotated[dict[str, Any], Field(json_schema_extra=_FREE_FORM)] | None = None
    """kvTransfer: a KV connector's configuration, passed to the engine as JSON. Unset: none."""


class RingRecovery(_Model):
    """What happens when a ring loses a rank."""

    reform_grace_seconds: Annotated[int, Field(ge=0, le=86_400)] = 30
    """reformGraceSeconds that a rank stays on a node that is not ready or unreachable; then it is evicted, and deleted by
    force where the node cannot say that it ended. The ring goes on without it from the first second. Default: 30."""
    restart_budget: Annotated[int, Field(ge=0, le=1000)] = 5
    """restartBudget: exits of engines and sidecars of one group within budgetWindowSeconds that are borne. With more, a
    group that cannot form a ring is given up: its pods go, and status says why. Default: 5."""
    budget_window_seconds: Annotated[int, Field(ge=60, le=604_800)] = 3600
    """budgetWindowSeconds in which exits are counted, from the first one on. Default: 3600."""
    reserve: Literal["None", "Survive"] = "None"
    """reserve: Survive admits only what one rank less can hold, so that a lost rank makes no request wait; a planned size
    then has one rank more. None uses all memory. Default: None."""


class Ring(_Model):
    """Ring groups: each is one ring of pods that share the KV cache of every request."""

    size: Annotated[int, Field(ge=2, le=LARGEST_RING)] | None = None
    """size: ranks of one ring, each a pod. Unset: the smallest ring that holds context.maxTokens by model.facts."""
    window_tokens: Annotated[int, Field(ge=1, le=16_777_216)] | None = None
    """windowTokens: least new tokens per rank and prefill window. Slow networks need more to hide the exchange; short
    requests then wait longer. Unset: the engine's own (1024)."""
    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """image of the ring engine. Default: the installation's defaults.ringImage."""
    resources: ResourceRequirements | None = None
    """resources of the engine container of each rank. Unset: engine.resources, and one of the installation's
    defaults.accelerator."""
    spread: Literal["Preferred", "Required"] = "Preferred"
    """spread of a ring's ranks over nodes: Preferred puts two on one node only where there is no other; Required never
    does, so that the loss of a node is the loss of one rank. Default: Preferred."""
    recovery: RingRecovery = RingRecovery()
    """recovery: what happens when a ring loses a rank."""


class Slo(_Model):
    """What users are promised. Admission decides by it; changes reach running pods without a restart."""

    ttft_milliseconds: Annotated[int, Field(ge=1, le=3_600_000)] = 2000
    """ttftMilliseconds: longest time to the first token, waiting in the queue included. Default: 2000."""
    tpot_milliseconds: Annotated[int, Field(ge=1, le=600_000)] = 50
    """tpotMilliseconds: longest mean time between two output tokens of a request. Default: 50."""


class AdmissionQueue(_Model):
    """The queue in front of the engine."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            _cel(
                "!(has(self.maxRequests) && self.maxRequests == 0 && has(self.maxWaitSeconds))",
                "admission.queue.maxWaitSeconds bounds a wait that maxRequests: 0 does not allow; remove one of them.",
            )
        )
    )

    max_requests: Annotated[int, Field(ge=0, le=100_000)] = 256
    """maxRequests that may wait in front of one replica; further ones are answered 429. 0 refuses what cannot start at
    once. Default: 256."""
    max_wait_seconds: Annotated[int, Field(ge=1, le=86_400)] | None = None
    """maxWaitSeconds: longest wait; a request that would wait longer is refused when it comes. Unset:
    slo.ttftMilliseconds."""


class Fairness(_Model):
    """How tenants share a replica."""

    header: (
        Annotated[
            str,
            Field(
                max_length=64,
                json_schema_extra=_rules(
                    _cel(
                        "self.matches('^[-a-z0-9!#$%&*+.^_`|~]+$')",
                        "admission.fairness.header must be the name of an HTTP header in lower case, for example x-tenant.",
                    )
                ),
            ),
        ]
        | None
    ) = None
    """header of a request whose value is its tenant, in lower case. Tenants get equal shares of a replica that cannot
    serve all. Unset: all requests are one tenant's."""
    tokens_per_second: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """tokensPerSecond that each tenant may use at each replica on average, prompts and outputs together, with a
    minute's worth at once. Unset: no such bound."""


class Admission(_Model):
    """What the sidecar lets through to the engine. Changes reach running pods without a restart."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            _cel(
                "!has(self.reservation) || self.reservation != 'Worst' || !has(self.kvPeakPercent) || "
                "self.kvPeakPercent <= 100",
                "admission.kvPeakPercent above 100 admits more than fits, and reservation: Worst promises that nothing is "
                "computed twice; lower kvPeakPercent to at most 100, or set reservation: Expected.",
            )
        )
    )

    policy: Literal["Enforce", "Observe", "Off"] = "Enforce"
    """policy: Enforce lets requests wait, or refuses them with 429 and Retry-After, when the engine's KV memory or
    compute has no room. Observe decides and counts, and lets everything pass. Off does not decide. Default: Enforce."""
    reservation: Literal["Expected", "Worst"] = "Expected"
    """reservation of KV memory for a request: Expected is its prompt and the output that requests like it had. Worst is
    its prompt and all that it may generate (max_tokens; without it, all of the context), so that the engine has no cause
    to preempt, as far as prompts are token ids: those of text are estimated. Fewer run at the same time. Default: Expected.
    Refused for rings."""
    kv_hard_cap_percent: Annotated[int, Field(ge=50, le=99)] = 95
    """kvHardCapPercent of a replica's KV memory up to which requests are let in: what is in use then, and the new prompt.
    Never learned; outputs may grow beyond it later. A prompt above it is answered 400. Default: 95. Refused for rings."""
    kv_peak_percent: Annotated[int, Field(ge=85, le=200)] | None = None
    """kvPeakPercent: upper bound of the predicted KV peak of the requests let through, as a percentage of a replica's KV
    memory. The bound in use is learned, from 85 up to this. Unset: this is learned too, from what preemptions cost.
    Refused for rings."""
    queue: AdmissionQueue = AdmissionQueue()
    """queue: how many requests wait for room, and how long."""
    fairness: Fairness = Fairness()
    """fairness: how tenants share a replica."""
    priorities: (
        Annotated[
            list[
                Annotated[
                    str,
                    Field(
                        max_length=63,
                        json_schema_extra=_rules(
                            _cel(
                                "self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
                                "admission.priorities must be names of lower-case letters, digits and '-', for example "
                                "interactive.",
                            )
                        ),
                    ),
                ]
            ],
            Field(
                min_length=1,
                max_length=8,
                json_schema_extra=_rules(
                    _cel(
                        "self.all(name, self.exists_one(other, other == name))",
                        "admission.priorities must name each class once, the highest first.",
                    )
                ),
            ),
        ]
        | None
    ) = None
    """priorities: names of request classes, the highest first. A request names its class in the header
    x-kvplane-priority; without one, or with one that is not listed, it is in the first. Unset: one class."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=1024**3)] = 16 * 1024**2
    """maxBodyBytes: largest request body; a larger one is answered 413. Default: 16777216 (16 MiB)."""


class Autoscaling(_Model):
    """Who says how many replicas there are, and within which bounds."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            _cel(
                "self.policy != 'Native' || has(self.maxReplicas)",
                "autoscaling.policy Native needs autoscaling.maxReplicas: the most replicas that you are ready to pay for.",
            ),
            _cel(
                "!has(self.maxReplicas) || self.maxReplicas >= (has(self.minReplicas) ? self.minReplicas : 1)",
                "autoscaling.maxReplicas must be at least autoscaling.minReplicas (1 where that is unset); raise it, or lower "
                "minReplicas.",
            ),
            _cel(
                "!has(self.scaleToZeroAfterSeconds) || self.policy != 'External'",
                "autoscaling.scaleToZeroAfterSeconds is not read with policy External, whose scaler goes to zero by itself; "
                "remove it, or set policy: Native.",
            ),
        )
    )

    policy: Literal["Off", "Native", "External"]
    """policy: Native keeps as many replicas as demand needs, and spec.replicas only says with how many it begins. External
    leaves spec.replicas to a HorizontalPodAutoscaler or to KEDA, and exports what Native would do as
    kvplane_autoscaler_desired_replicas. Off leaves spec.replicas to you, and reads no other field of these. Required."""
    min_replicas: Annotated[int, Field(ge=1, le=10_000)] = 1
    """minReplicas: fewest replicas, in mode Ring groups, while the service is used. Default: 1."""
    max_replicas: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """maxReplicas: most replicas, in mode Ring groups. Needed with policy Native; unset with External: no bound."""
    scale_to_zero_after_seconds: Annotated[int, Field(ge=1, le=2_592_000)] | None = None
    """scaleToZeroAfterSeconds without a request, nothing runs; a new value of the annotation kvplane.dev/wake brings
    minReplicas back. Unset: never."""
    scale_down_window_seconds: Annotated[int, Field(ge=0, le=14_400)] = 300
    """scaleDownWindowSeconds: replicas go only when the highest demand of so long fits into 0.7 of those that stay; the
    window is never shorter than two start-ups. Default: 300."""
    cost_of_miss: Annotated[int, Field(ge=0, le=1000)] = 4
    """costOfMiss: how many replicas are worth keeping for a time to avoid being one short in it. Higher keeps more
    for bursts that are likely to come back, and more room so that the promises in slo are kept; 0 keeps none for bursts, and
    the least room that there was. Default: 4."""


class Rollout(_Model):
    """How a change of the pods is rolled out."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            _cel(
                "!(has(self.maxSurge) && self.maxSurge == 0 && (!has(self.maxUnavailable) || self.maxUnavailable == 0))",
                "rollout.maxSurge and rollout.maxUnavailable must not both be 0: no pod could ever be replaced. Where no "
                "accelerator is free for a surge pod, set maxSurge: 0 and maxUnavailable: 1.",
            )
        )
    )

    max_surge: Annotated[int, Field(ge=0, le=1000)] = 1
    """maxSurge: pods above replicas during a rollout. Default: 1, so that capacity never falls."""
    max_unavailable: Annotated[int, Field(ge=0, le=1000)] = 0
    """maxUnavailable: pods below replicas during a rollout. Default: 0."""


class Disruption(_Model):
    """What happens when a pod has to go."""

    pdb: Literal["Auto", "Off"] = "Auto"
    """pdb: Auto makes a PodDisruptionBudget that lets one pod go at a time, from two replicas on (with one it would block
    every node drain), and always for rings, which serve on with a rank less. Off makes none. Default: Auto."""
    drain_seconds: Annotated[int, Field(ge=0, le=86_400)] = 600
    """drainSeconds: longest time that requests in flight get to finish before their pod is ended. Default: 600."""


class TemplateMetadata(_Model):
    """Metadata added to the pods."""

    labels: (
        Annotated[
            dict[str, Annotated[str, Field(max_length=63)]],
            Field(
                max_length=64,
                json_schema_extra={
                    **_rules(
                        _cel(
                            "self.all(k, !k.startsWith('kvplane.dev/') && !k.startsWith('app.kubernetes.io/'))",
                            "podTemplate.metadata.labels must not set kvplane.dev/* or app.kubernetes.io/*: selectors use them.",
                        )
                    ),
                },
            ),
        ]
        | None
    ) = None
    """labels added to the pods."""
    annotations: (
        Annotated[
            dict[str, Annotated[str, Field(max_length=8192)]],
            Field(
                max_length=64,
                json_schema_extra={
                    **_rules(
                        _cel(
                            "self.all(k, !k.startsWith('kvplane.dev/'))",
                            "podTemplate.metadata.annotations must not set kvplane.dev/*: the operator writes them.",
                        )
                    ),
                },
            ),
        ]
        | None
    ) = None
    """annotations added to the pods."""


OWNED_CONTAINER_FIELDS = (
    "command",
    "args",
    "lifecycle",
    "startupProbe",
    "readinessProbe",
    "livenessProbe",
    "restartPolicy",
)
"""Fields of the engine's and the sidecar's container that an overlay must leave alone."""


def _without(fields: tuple[str, ...], *, of: str) -> str:
    return " && ".join(f"!has({of}.{field})" for field in fields)


_WORDS: dict[str, Any] = {"type": "array", "maxItems": 256, "items": {"type": "string", "maxLength": 16384}}
_CONTAINERS: dict[str, Any] = {
    "type": "array",
    "maxItems": 16,
    "items": {
        **_FREE_FORM,
        "required": ["name"],
        # CEL sees declared properties only; the others pass as they are.
        "properties": {
            "name": {"type": "string", "maxLength": 63},
            **dict.fromkeys(OWNED_CONTAINER_FIELDS, _FREE_FORM),
            "command": _WORDS,
            "args": _WORDS,
            "restartPolicy": {"type": "string", "maxLength": 32},
        },
    },
}


class PodTemplate(_Model):
    """An overlay on the pods that the operator makes."""

    metadata: TemplateMetadata | None = None
    """metadata: labels and annotations added to the pods."""
    spec: (
        Annotated[
            dict[str, Any],
            Field(
                json_schema_extra={
                    **_FREE_FORM,
                    **_rules(
                        _cel(
                            "!has(self.restartPolicy) && !has(self.terminationGracePeriodSeconds) && !has(self.hostNetwork) "
                            "&& !has(self.hostPID) && !has(self.shareProcessNamespace)",
                            "podTemplate.spec must not set restartPolicy, terminationGracePeriodSeconds, hostNetwork, hostPID "
                            "or shareProcessNamespace: the drain and the sidecar depend on them (disruption.drainSeconds "
                            "sets the grace period).",
                        ),
                        *(
                            _cel(
                                f"!has(self.{containers}) || self.{containers}.all(c, c.name != '{name}' || "
                                f"{_without(OWNED_CONTAINER_FIELDS, of='c')})",
                                f"podTemplate.spec.{containers} must not set {', '.join(OWNED_CONTAINER_FIELDS)} of {name}: the "
                                "engine stays behind the sidecar by them. Use the fields of spec.engine (image, extraArgs, "
                                "startupTimeoutSeconds, ...).",
                            )
                            for containers, name in (
                                ("containers", names.CONTAINER_ENGINE),
                                ("initContainers", names.CONTAINER_SIDECAR),
                            )
                        ),
                    ),
                    "properties": {
                        "restartPolicy": {"type": "string", "maxLength": 32},
                        "terminationGracePeriodSeconds": {"type": "integer"},
                        "hostNetwork": {"type": "boolean"},
                        "hostPID": {"type": "boolean"},
                        "shareProcessNamespace": {"type": "boolean"},
                        "containers": _CONTAINERS,
                        "initContainers": _CONTAINERS,
                    },
                }
            ),
        ]
        | None
    ) = None
    """spec: a partial Kubernetes PodSpec, merged over the operator's own (containers, volumes, env and mounts by name):
    nodeSelector, tolerations, affinity, priorityClassName, runtimeClassName, imagePullSecrets, further containers and
    volumes, securityContext, ... The API server checks the result before it is used; its error is shown in the
    condition Accepted."""


def _of_ring(rule: str) -> str:
    return f"self.mode != 'Ring' || {rule}"


_SPEC_RULES = _rules(
    _cel(
        "!has(self.ring) || self.mode != 'Paged'",
        "ring is read in modes Ring and Auto; remove it, or set mode: Ring.",
    ),
    _cel(
        _of_ring("!self.model.source.startsWith('hf://')"),
        "mode Ring reads the model from a folder: model.source must be pvc://, oci:// or path://, for example "
        "pvc://models/qwen3-8b.",
    ),
    _cel(
        _of_ring(
            "(has(self.ring) && has(self.ring.size)) || "
            "(has(self.model.facts) && has(self.context) && has(self.context.maxTokens))"
        ),
        "mode Ring needs ring.size, or model.facts and context.maxTokens, from which the smallest ring is planned.",
    ),
    _cel(
        _of_ring(f"!has(self.engine) || !({' || '.join(f'has(self.engine.{name})' for name in PAGED_ENGINE_FIELDS)})"),
        f"mode Ring has no engine.{', engine.'.join(PAGED_ENGINE_FIELDS)}: the ring engine does not know them. Remove them "
        "(ring.image is its image), or set mode: Paged.",
    ),
    _cel(
        _of_ring("!has(self.engine) || !has(self.engine.dtype) || self.engine.dtype != 'float16'"),
        "mode Ring computes in auto, bfloat16 or float32; engine.dtype must be one of these.",
    ),
    _cel(
        _of_ring(
            f"!has(self.engine) || !has(self.engine.env) || self.engine.env.all(e, !(e.name in {_cel_list(RING_ENV)}))"
        ),
        f"mode Ring sets {', '.join(RING_ENV)} itself; remove them from engine.env.",
    ),
    _cel(
        _of_ring(
            f"!has(self.admission) || !({' || '.join(f'has(self.admission.{name})' for name in PAGED_ADMISSION_FIELDS)})"
        ),
        f"mode Ring has no admission.{', admission.'.join(PAGED_ADMISSION_FIELDS)}: a ring knows what each of its ranks holds, "
        "and admits by that. Remove them, or set mode: Paged.",
    ),
    _cel(
        _of_ring("!has(self.rollout)"),
        "rollout is of replicas; rings are renewed one group after the other, drained before. Remove it.",
    ),
    _cel(
        _of_ring(f"self.replicas <= {MOST_RING_GROUPS}"),
        f"replicas of mode Ring are groups, at most {MOST_RING_GROUPS}.",
    ),
    _cel(
        _of_ring(
            "!has(self.autoscaling) || !has(self.autoscaling.maxReplicas) || "
            f"self.autoscaling.maxReplicas <= {MOST_RING_GROUPS}"
        ),
        f"autoscaling.maxReplicas of mode Ring are groups, at most {MOST_RING_GROUPS}.",
    ),
)


class LLMServiceSpec(_Model):
    """What the user asks for."""

    model_config = ConfigDict(json_schema_extra=_SPEC_RULES)

    model: Model
    """model that is served. Required."""
    context: Context = Context()
    """context: how long prompts may be."""
    mode: Annotated[Literal["Auto", "Paged", "Ring"], Field(json_schema_extra={PERSISTED_DEFAULT: True})] = "Auto"
    """mode: Paged serves from replicas that each hold the whole KV cache of their requests. Ring serves from groups of
    pods that share the KV cache of each request, for contexts that fit no replica. Auto chooses from this spec alone:
    Paged, unless context.maxTokens exceeds context.ringThresholdTokens or, by model.facts, one replica's KV memory.
    Default: Auto."""
    replicas: Annotated[int, Field(ge=0, le=10_000, json_schema_extra={PERSISTED_DEFAULT: True})] = 1
    """replicas of the engine, in mode Ring groups; what kubectl scale and a HorizontalPodAutoscaler write. With
    autoscaling.policy Native only how many there are at first. Default: 1."""
    engine: Engine = Engine()
    """engine: how the engine runs."""
    ring: Ring | None = None
    """ring: what the groups of mode Ring are like. Unset: all of its defaults."""
    slo: Slo = Slo()
    """slo: what users are promised."""
    admission: Admission = Admission()
    """admission: what the sidecar lets through to the engine."""
    autoscaling: Autoscaling | None = None
    """autoscaling: who says how many replicas there are. Unset: spec.replicas does."""
    rollout: Rollout = Rollout()
    """rollout: how a change of the pods is rolled out."""
    disruption: Disruption = Disruption()
    """disruption: what happens when a pod has to go."""
    pod_template: PodTemplate | None = None
    """podTemplate: an overlay on the pods, for what has no field of its own."""

    @classmethod
    def parse(cls, spec: dict[str, Any]) -> Self:
        """The spec of an object as the API server holds it; raises pydantic's ValidationError."""
        return cls.model_validate(spec)

    def served_name(self, service_name: str) -> str:
        """The model name that clients send."""
        return self.model.served_name or service_name


class ConditionStatus(_Model):
    """One condition, as ``metav1.Condition``."""

    type: Annotated[str, Field(max_length=316)]
    """type of the condition: Accepted, Available, Progressing, Degraded, SignalsFresh, ScalingActive or Ready."""
    status: Literal["True", "False", "Unknown"]
    """status of the condition."""
    reason: Annotated[str, Field(max_length=1024)]
    """reason: one CamelCase word for why; see docs/reference/conditions.md."""
    message: Annotated[str, Field(max_length=32768)]
    """message: a sentence for people."""
    observed_generation: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})]
    """observedGeneration: the generation of the spec this was said of."""
    last_transition_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    """lastTransitionTime: when status changed last."""


class PodExits(_Model):
    """How often the containers of one pod have exited."""

    uid: Annotated[str, Field(max_length=63)]
    """uid of the pod."""
    count: Annotated[int, Field(ge=0)]
    """count of exits that were taken into account."""


class GroupRestarts(_Model):
    """What a ring group has used of its restart budget."""

    group: Annotated[int, Field(ge=0)]
    """group: its number."""
    count: Annotated[int, Field(ge=0)]
    """count of exits of its engines and sidecars since windowStart, those of pods that are gone included."""
    window_start: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    """windowStart: when the first of them was seen."""
    reason: Annotated[str, Field(max_length=1024)]
    """reason of the first of them, as a condition would give it."""
    message: Annotated[str, Field(max_length=MESSAGE_LIMIT)]
    """message of the first of them, with the last log lines."""
    pods: Annotated[list[PodExits], Field(max_length=2 * LARGEST_RING)]
    """pods that are there and have exits."""


_Groups = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MOST_RING_GROUPS)]


class PoolStatus(_Model):
    """One set of equal replicas."""

    name: Annotated[str, Field(max_length=63)]
    """name of the pool: the service's, of rings with -ring behind it."""
    kind: Literal["Paged", "Ring"]
    """kind of the pool."""
    replicas: Annotated[int, Field(ge=0)]
    """replicas: pods, or ring groups, that exist."""
    ready: Annotated[int, Field(ge=0)]
    """ready: pods, or rings, that serve."""
    size: Annotated[int, Field(ge=2)] | None = None
    """size: ranks of one ring."""
    degraded_groups: _Groups | None = None
    """degradedGroups: numbers of the ring groups that serve with fewer ranks than size."""
    failed_groups: _Groups | None = None
    """failedGroups: numbers of the ring groups that used up recovery.restartBudget without a ring, and were given up.
    A change of the spec, or a new value of the annotation kvplane.dev/retry, starts them again."""
    restarts: Annotated[list[GroupRestarts], Field(max_length=MOST_RING_GROUPS)] | None = None
    """restarts of ring groups, of those that had any."""
    retry: Annotated[str, Field(max_length=63)] | None = None
    """retry: value of the annotation kvplane.dev/retry that was acted upon last."""
    spec_hash: Annotated[str, Field(max_length=63)] | None = None
    """specHash of the spec, replicas aside, that restarts and failedGroups are of; another one begins them anew."""
    kv_tokens_per_replica: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] | None = None
    """kvTokensPerReplica: tokens whose KV one replica, or ring, holds, the smallest where they differ. Absent: not
    known."""
    max_context_tokens: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] | None = None
    """maxContextTokens: longest prompt + output that a replica serves, the smaller of the engine's limit and, with
    admission.policy Enforce, kvHardCapPercent of its KV memory. Absent: not known."""


class CapacityStatus(_Model):
    """KV memory of the replicas that serve, as they say themselves. What is not known of every one of them is absent."""

    kv_tokens: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] | None = None
    """kvTokens: tokens whose KV all replicas hold together."""
    kv_used_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """kvUsedPercent of kvTokens that running requests hold, in steps of 5."""
    headroom_tokens: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] | None = None
    """headroomTokens below admission.kvHardCapPercent that are neither held by requests nor expected to be, in steps of
    5 % of kvTokens, rounded down."""
    startup_seconds_p90: Annotated[int, Field(ge=0)] | None = None
    """startupSecondsP90: time from the start of a pod's sidecar to its engine's first healthy answer, the 90th
    percentile over the pods that serve."""


class LLMServiceStatus(_Model):
    """What is there."""

    observed_generation: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] | None = None
    """observedGeneration: the generation of the spec that was last acted upon."""
    mode: Literal["Paged", "Ring"] | None = None
    """mode in use."""
    endpoint: Annotated[str, Field(max_length=512)] | None = None
    """endpoint: the base URL of the OpenAI-compatible API inside the cluster."""
    replicas: Annotated[int, Field(ge=0)] | None = None
    """replicas: pods, or ring groups, that exist."""
    ready_replicas: Annotated[int, Field(ge=0)] | None = None
    """readyReplicas: pods, or ring groups, that serve."""
    desired_replicas: Annotated[int, Field(ge=0)] | None = None
    """desiredReplicas: pods, or ring groups, that are asked for."""
    selector: Annotated[str, Field(max_length=512)] | None = None
    """selector: label selector of the pods, as the scale subresource gives it to a HorizontalPodAutoscaler."""
    pools: (
        Annotated[
            list[PoolStatus],
            Field(
                max_length=8,
                json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
            ),
        ]
        | None
    ) = None
    """pools of the service."""
    capacity: CapacityStatus | None = None
    """capacity: KV memory of the replicas that serve; changes are written at most once a minute. Absent: not known."""
    conditions: (
        Annotated[
            list[ConditionStatus],
            Field(
                max_length=32,
                json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
            ),
        ]
        | None
    ) = None
    """conditions of the service."""


class LLMService(_Model):
    """LLMService serves one language model behind an OpenAI-compatible endpoint and manages it by the resource that
    runs out first, KV-cache memory."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            _cel(
                f"self.metadata.name.size() <= {SERVICE_NAME_LIMIT}",
                f"metadata.name must be at most {SERVICE_NAME_LIMIT} characters: names of Services and pods are made from it.",
            ),
            _cel(
                "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "metadata.name must begin with a letter and have only lower-case letters, digits and '-': a Service gets it.",
            ),
        )
    )

    spec: LLMServiceSpec
    """spec: what is asked for."""
    status: LLMServiceStatus | None = None
    """status: what is there. Written by the operator."""
