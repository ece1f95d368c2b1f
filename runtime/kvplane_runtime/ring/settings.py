"""What a rank is told from outside: the environment of a StatefulSet's pod, or the same words from ``kvplane-ring local``.

Identity comes from where the pod runs: the ordinal is the end of its host name, rank 0's address follows from the name
of the set and its headless Service (both bear the set's name). All else has a default, and every value is checked before
weights are read: a mistake should cost seconds. Values that change what a rank computes are part of the configuration hash, so
that ranks with different ones refuse each other; how the ring is shared is rank 0's alone to decide.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Final, Literal, TypeVar

from kvplane_api.capacity import RING_KV_PERCENT
from kvplane_api.names import PORT_ENGINE, PORT_RING_CONTROL, PORT_RING_STORE, STRATEGY_RING, rank_0_of, rank_of
from kvplane_runtime.ring.membership import Limits

T = TypeVar("T")

LIMITS: Final = {
    "heartbeat": ("KVPLANE_RING_HEARTBEAT_LIMIT_SECONDS", 0.4),
    "stop": ("KVPLANE_RING_STOP_SECONDS", 1.0),
    "form": ("KVPLANE_RING_FORM_SECONDS", 1.0),
    "gather": ("KVPLANE_RING_GATHER_SECONDS", 0.0),
}
"""The environment variable and the least value of each limit that can be set."""
_MAX_WORLD: Final = 1024
_MAX_HEAD_BYTES: Final = 100_000_000
"""Of a safetensors file: what the format allows."""
_BLOCK_BYTES: Final = 4096
_CGROUP_FILES: Final = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Limit and use of a container's memory, of cgroup v2 and of v1, where no limit is a number above every machine's memory."""
_LEAST_KV_TOKENS: Final = 256
_LEAST_CONTEXT_TOKENS: Final = 2
"""A token to begin with, and one to answer."""


class SettingsError(Exception):
    """A setting is missing or cannot be meant; the message names it, its bound, its value and the cure."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One rank's settings, with the environment variable of each."""

    world_size: int
    """``WORLD_SIZE``: N, the ranks of a whole ring. With one rank it is an ordinary engine."""
    ordinal: int
    """``KVPLANE_RING_ORDINAL``, else the number at the end of the host name. 0 decides and serves, the others follow."""
    leader: str
    """``KVPLANE_RING_LEADER``: rank 0's host. Default: pod 0 of this pod's set, in the set's headless Service."""
    address: str
    """``POD_IP``, else the host name: where other ranks reach this one."""
    model: Path
    """``KVPLANE_RING_MODEL``: a folder in the Hugging Face layout (config.json, safetensors, tokenizer)."""
    served_name: str
    """``KVPLANE_RING_SERVED_NAME``: what clients call the model. Default: the folder's name."""
    pod: str
    """``POD_UID``: tells two pods of one ordinal apart in messages. Default: the host name."""
    device: Literal["cpu", "cuda"] = "cpu"
    """``KVPLANE_RING_DEVICE``: where the model is and computes. cuda: the first GPU that the process sees, and NCCL between the
    ranks; cpu: gloo."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``KVPLANE_RING_DTYPE``: of weights and KV. Default auto: as the model was saved."""
    kv_tokens: int | None = None
    """``KVPLANE_RING_KV_TOKENS``: KV tokens this rank may hold. Default: what fits ``kv_percent`` of the memory."""
    kv_percent: int = RING_KV_PERCENT
    """``KVPLANE_RING_KV_PERCENT``: share of the memory left after the weights that KV may take. The rest is for
    activations and the blocks in flight, which a window of a second needs."""
    window_tokens: int = 1024
    """``KVPLANE_RING_WINDOW_TOKENS``: least new tokens per rank and prefill window while keys go round the ring, whatever they
    take: below, communication is no longer hidden (docs: sizing). Default for links of 100 Gb/s and CPUs; slower links want
    more."""
    slice_seconds: float = 1.0
    """``KVPLANE_RING_SLICE_SECONDS``: longest prefill window, but for the least length, and so the longest that a short prompt
    waits for a long one. Windows are planned to take nine tenths of it. Where any window takes half of it, however short, they
    are longer: prompts would hardly go on."""
    short_tokens: int = 1024
    """``KVPLANE_RING_SHORT_TOKENS``: prompts of fewer than 2N times this lie whole on one rank; 0 cuts every prompt. Default:
    below, a rank computes faster than it can exchange."""
    context_tokens: int | None = None
    """``KVPLANE_RING_CONTEXT_TOKENS``: longest prompt + output that is served. Default: what the model and the ring hold."""
    ttft_seconds: float = 2.0
    """``KVPLANE_RING_TTFT_SECONDS``: promised time to the first token, by which prefills are ordered. As in an LLMService."""
    config_file: Path | None = None
    """``KVPLANE_RING_CONFIG_FILE``: the sidecar's configuration file. Its promised time to the first token counts instead of
    ``ttft_seconds``, and is followed while the engine runs. Default: none."""
    max_sequences: int = 64
    """``KVPLANE_RING_MAX_SEQUENCES``: outputs at a time. More are refused with 429: each makes all others slower."""
    reserve: Literal["Off", "Survive"] = "Off"
    """``KVPLANE_RING_RESERVE``: Survive admits only what N-1 ranks can hold, so that a lost rank parks nobody. Default Off:
    all memory serves."""
    park_seconds: float = 600.0
    """``KVPLANE_RING_PARK_SECONDS``: how long a request that does not fit N-1 waits, its stream open, for the lost rank.
    Ten minutes: a pod on a new node pulls its image and loads weights."""
    drain_seconds: float = 600.0
    """``KVPLANE_RING_DRAIN_SECONDS``: longest time that a stop waits for requests in flight. The sidecar's default."""
    threads: int | None = None
    """``KVPLANE_RING_THREADS``: CPU threads of the model. Default: the cores this process may use."""
    host: str = "127.0.0.1"
    """``KVPLANE_RING_HOST``: where rank 0's API listens, and what a worker says of itself. Default: loopback; the sidecar serves
    it to others."""
    port: int = PORT_ENGINE
    """``KVPLANE_RING_PORT``: of rank 0's API."""
    worker_port: int = PORT_ENGINE
    """``KVPLANE_RING_WORKER_PORT``: where a worker answers ``/health`` and ``/metrics``. Where it is taken, nothing is asked of
    that worker, and it works all the same."""
    control_port: int = PORT_RING_CONTROL
    """``KVPLANE_RING_CONTROL_PORT``: where rank 0 hears its workers."""
    store_port: int = PORT_RING_STORE
    """``KVPLANE_RING_STORE_PORT``: of rank 0's rendezvous store."""
    parent: int | None = None
    """``KVPLANE_RING_PARENT``: end with this process. Set by ``kvplane-ring local`` for its ranks."""
    limits: Limits = field(default_factory=Limits)
    """How long to wait for what; the variables are in ``LIMITS``."""

    def deciding(self) -> tuple[str, ...]:
        """The values that must be equal on all ranks beside the model itself, as words."""
        return (f"dtype={self.dtype}", f"device={self.device}")


def from_environment(environment: Mapping[str, str], *, hostname: str) -> Settings:
    """Settings of this process; raises SettingsError with all that is wrong, a sentence each."""
    reader = _Reader(environment)
    strategy = environment.get("PROMPT_SPLIT_STRATEGY", STRATEGY_RING)
    if strategy.upper() != STRATEGY_RING:
        reader.faults.append(
            f"PROMPT_SPLIT_STRATEGY is {strategy!r}, this engine splits prompts over a ring only: set {STRATEGY_RING} or unset it."
        )
    world_size = reader.integer("WORLD_SIZE", None, 1, _MAX_WORLD, "the number of ranks")
    named = rank_of(hostname)
    ordinal = reader.integer(
        "KVPLANE_RING_ORDINAL",
        named[1] if named else (0 if world_size == 1 else None),
        0,
        _MAX_WORLD - 1,
        f"this rank, as the host name {hostname!r} does not end in a number",
    )
    if world_size is not None and ordinal is not None and ordinal >= world_size:
        reader.faults.append(
            f"This is rank {ordinal} (host {hostname}), and WORLD_SIZE={world_size} has ranks 0 to {world_size - 1}: "
            "make WORLD_SIZE the StatefulSet's replicas."
        )
    leader = environment.get("KVPLANE_RING_LEADER") or (rank_0_of(named[0]) if named else "127.0.0.1")
    model = reader.required("KVPLANE_RING_MODEL", "the folder of the model")
    defaults = Limits()
    limits = Limits(
        **{
            name: reader.seconds(variable, getattr(defaults, name), least=least)
            for name, (variable, least) in LIMITS.items()
        }
    )
    chosen = {
        "device": reader.choice("KVPLANE_RING_DEVICE", "cpu", ("cpu", "cuda")),
        "dtype": reader.choice("KVPLANE_RING_DTYPE", "auto", ("auto", "float32", "bfloat16")),
        "kv_tokens": reader.optional("KVPLANE_RING_KV_TOKENS", _LEAST_KV_TOKENS, 1 << 40),
        "kv_percent": reader.integer("KVPLANE_RING_KV_PERCENT", RING_KV_PERCENT, 1, 95),
        "window_tokens": reader.integer("KVPLANE_RING_WINDOW_TOKENS", 1024, 1, 1 << 24),
        "slice_seconds": reader.seconds("KVPLANE_RING_SLICE_SECONDS", 1.0, least=0.01),
        "short_tokens": reader.integer("KVPLANE_RING_SHORT_TOKENS", 1024, 0, 1 << 24),
        "context_tokens": reader.optional("KVPLANE_RING_CONTEXT_TOKENS", _LEAST_CONTEXT_TOKENS, 1 << 40),
        "ttft_seconds": reader.seconds("KVPLANE_RING_TTFT_SECONDS", 2.0, least=0.01),
        "config_file": reader.path("KVPLANE_RING_CONFIG_FILE"),
        "max_sequences": reader.integer("KVPLANE_RING_MAX_SEQUENCES", 64, 1, 1 << 16),
        "reserve": reader.choice("KVPLANE_RING_RESERVE", "Off", ("Off", "Survive")),
        "park_seconds": reader.seconds("KVPLANE_RING_PARK_SECONDS", 600.0, least=0.0),
        "drain_seconds": reader.seconds("KVPLANE_RING_DRAIN_SECONDS", 600.0, least=0.0),
        "threads": reader.optional("KVPLANE_RING_THREADS", 1, 4096),
        "host": environment.get("KVPLANE_RING_HOST") or "127.0.0.1",
        "port": reader.integer("KVPLANE_RING_PORT", PORT_ENGINE, 1, 65535),
        "worker_port": reader.integer("KVPLANE_RING_WORKER_PORT", PORT_ENGINE, 1, 65535),
        "control_port": reader.integer("KVPLANE_RING_CONTROL_PORT", PORT_RING_CONTROL, 1, 65535),
        "store_port": reader.integer("KVPLANE_RING_STORE_PORT", PORT_RING_STORE, 1, 65535),
        "parent": reader.optional("KVPLANE_RING_PARENT", 1, 1 << 31),
    }
    if reader.faults or world_size is None or ordinal is None or model is None:
        raise SettingsError(" ".join(reader.faults))
    folder = Path(model)
    return Settings(
        world_size=world_size,
        ordinal=ordinal,
        leader=leader,
        address=environment.get("POD_IP") or hostname,
        model=folder,
        served_name=environment.get("KVPLANE_RING_SERVED_NAME") or folder.name,
        pod=environment.get("POD_UID") or hostname,
        limits=limits,
        **chosen,  # type: ignore[arg-type]  # each value was checked by the reader of its field
    )


class _Reader:
    """Reads values and collects sentences about those that cannot be."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.faults: list[str] = []

    def required(self, name: str, meaning: str) -> str | None:
        value = self._environment.get(name)
        if not value:
            self.faults.append(f"{name} is not set; set it to {meaning}.")
            return None
        return value

    def integer(self, name: str, default: int | None, least: int, most: int, meaning: str = "a number") -> int | None:
        text = self._environment.get(name)
        if not text:
            if default is None:
                self.faults.append(f"{name} is not set; set it to {meaning}.")
            return default
        return self._number(name, text, int, least, most)

    def optional(self, name: str, least: int, most: int) -> int | None:
        text = self._environment.get(name)
        return self._number(name, text, int, least, most) if text else None

    def seconds(self, name: str, default: float, *, least: float) -> float:
        text = self._environment.get(name)
        value = self._number(name, text, float, least, 86400.0) if text else default
        return default if value is None else value

    def path(self, name: str) -> Path | None:
        text = self._environment.get(name)
        return Path(text) if text else None

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self._environment.get(name) or default
        if value not in allowed:
            self.faults.append(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")
        return value

    def _number(self, name: str, text: str, kind: Callable[[str], T], least: T, most: T) -> T | None:
        try:
            value = kind(text)
        except ValueError:
            self.faults.append(f"{name} is {text!r}, which is no number; set one from {least} to {most}.")
            return None
        if not least <= value <= most:  # type: ignore[operator]  # int or float, as least and most are
            self.faults.append(f"{name} is {text}; it must be from {least} to {most}.")
            return None
        return value


def config_hash(settings: Settings) -> str:
    """``VERSION/HASH`` of all that decides what a rank computes: ranks with different ones refuse each other.

    Of the weights it takes the names, the sizes and the heads of the files, which name every tensor with its type and shape, and
    the middle of each tensor. So it reads megabytes of terabytes, and tells models apart of which one was trained further: that
    changes a tensor nearly everywhere, or not at all. Other bytes may differ unseen. Raises SettingsError.
    """
    digest = hashlib.blake2b(digest_size=8)
    for word in (*settings.deciding(), *(f"{name}={metadata.version(name)}" for name in ("torch", "transformers"))):
        digest.update(word.encode() + b"\0")
    try:
        digest.update((settings.model / "config.json").read_bytes())
        for file in sorted(settings.model.glob("*.safetensors")):
            digest.update(f"{file.name} {file.stat().st_size}\0".encode())
            for read in _sampled(file):
                digest.update(read)
    except OSError as error:
        raise SettingsError(
            f"KVPLANE_RING_MODEL is {settings.model}, of which {error.filename} cannot be read ({error.strerror}); "
            "set it to the folder of a model with config.json and safetensors files."
        ) from error
    return f"{metadata.version('kvplane')}/{digest.hexdigest()}"


def _sampled(file: Path) -> Iterator[bytes]:
    """The head of a safetensors file, and a block from the middle of each tensor."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        head = stream.read(min(size, _MAX_HEAD_BYTES))
        yield head
        try:
            tensors = [entry["data_offsets"] for name, entry in json.loads(head).items() if name != "__metadata__"]
            spans = sorted((int(begin), int(end)) for begin, end in tensors)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SettingsError(
                f"KVPLANE_RING_MODEL has {file}, whose head is not that of a safetensors file ({error}); copy the model anew."
            ) from error
        for begin, end in spans:
            taken = min(_BLOCK_BYTES, end - begin)
            stream.seek(8 + size + begin + (end - begin - taken) // 2)
            yield stream.read(taken)


def capacity_tokens(settings: Settings, *, kv_bytes_per_token: int, free_bytes: int) -> int:
    """KV tokens that this rank may hold; raises SettingsError where that is too few to serve anything."""
    if settings.kv_tokens is not None:
        return settings.kv_tokens
    tokens = free_bytes * settings.kv_percent // 100 // kv_bytes_per_token
    if tokens < _LEAST_KV_TOKENS:
        raise SettingsError(
            f"{settings.kv_percent} % of the {free_bytes >> 20} MiB that are free hold {tokens} KV tokens of "
            f"{kv_bytes_per_token} bytes, fewer than {_LEAST_KV_TOKENS}; give the pod more memory."
        )
    return tokens


def free_bytes(*, cgroup: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that this process may still take: what its control group leaves, or else what the machine has."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    machine = int(fields["MemAvailable"].split()[0]) * 1024
    for most, taken in _CGROUP_FILES:
        try:
            limit = (cgroup / most).read_text().strip()
            used = int((cgroup / taken).read_text())
        except OSError:
            continue
        return machine if limit == "max" else max(0, min(machine, int(limit) - used))
    return machine
