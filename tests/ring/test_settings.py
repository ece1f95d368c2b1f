"""Settings: what a StatefulSet's pod is told, and the sentences about what cannot be meant."""

import json
from pathlib import Path

import pytest

from kvplane_runtime.ring.membership import Limits
from kvplane_runtime.ring.settings import (
    Settings,
    SettingsError,
    capacity_tokens,
    config_hash,
    free_bytes,
    from_environment,
)

POD = {"WORLD_SIZE": "4", "KVPLANE_RING_MODEL": "/models/llama", "POD_IP": "10.0.0.7", "POD_UID": "u-2"}


def settings(hostname: str = "demo-ring-0-2", **changed: str) -> Settings:
    return from_environment(POD | changed, hostname=hostname)


def test_a_pod_of_a_stateful_set_knows_who_it_is_and_where_rank_0_is() -> None:
    found = settings()
    assert (found.ordinal, found.world_size) == (2, 4)
    assert found.leader == "demo-ring-0-0.demo-ring-0"
    assert (found.address, found.pod, found.served_name) == ("10.0.0.7", "u-2", "llama")
    assert (found.port, found.worker_port, found.control_port, found.store_port) == (8100, 8100, 29501, 29500)
    assert (found.context_tokens, found.config_file) == (None, None)
    assert found.limits == Limits()


def test_every_setting_can_be_given() -> None:
    given = {
        "KVPLANE_RING_ORDINAL": "1",
        "KVPLANE_RING_LEADER": "head",
        "KVPLANE_RING_SERVED_NAME": "name",
        "KVPLANE_RING_DEVICE": "cuda",
        "KVPLANE_RING_DTYPE": "bfloat16",
        "KVPLANE_RING_KV_TOKENS": "5000",
        "KVPLANE_RING_KV_PERCENT": "50",
        "KVPLANE_RING_WINDOW_TOKENS": "512",
        "KVPLANE_RING_SLICE_SECONDS": "0.5",
        "KVPLANE_RING_SHORT_TOKENS": "0",
        "KVPLANE_RING_CONTEXT_TOKENS": "90000",
        "KVPLANE_RING_TTFT_SECONDS": "4",
        "KVPLANE_RING_CONFIG_FILE": "/etc/sidecar.json",
        "KVPLANE_RING_MAX_SEQUENCES": "8",
        "KVPLANE_RING_RESERVE": "Survive",
        "KVPLANE_RING_PARK_SECONDS": "60",
        "KVPLANE_RING_DRAIN_SECONDS": "30",
        "KVPLANE_RING_THREADS": "3",
        "KVPLANE_RING_HOST": "0.0.0.0",  # noqa: S104  (only read, nothing listens)
        "KVPLANE_RING_PORT": "1",
        "KVPLANE_RING_WORKER_PORT": "4",
        "KVPLANE_RING_CONTROL_PORT": "2",
        "KVPLANE_RING_STORE_PORT": "3",
        "KVPLANE_RING_PARENT": "77",
        "KVPLANE_RING_HEARTBEAT_LIMIT_SECONDS": "2",
        "KVPLANE_RING_STOP_SECONDS": "3",
        "KVPLANE_RING_FORM_SECONDS": "4",
        "KVPLANE_RING_GATHER_SECONDS": "0",
        "PROMPT_SPLIT_STRATEGY": "RING",
    }
    assert settings(**given) == Settings(
        world_size=4,
        ordinal=1,
        leader="head",
        address="10.0.0.7",
        model=Path("/models/llama"),
        served_name="name",
        pod="u-2",
        device="cuda",
        dtype="bfloat16",
        kv_tokens=5000,
        kv_percent=50,
        window_tokens=512,
        slice_seconds=0.5,
        short_tokens=0,
        context_tokens=90_000,
        ttft_seconds=4.0,
        config_file=Path("/etc/sidecar.json"),
        max_sequences=8,
        reserve="Survive",
        park_seconds=60.0,
        drain_seconds=30.0,
        threads=3,
        host="0.0.0.0",  # noqa: S104  (only read, nothing listens)
        port=1,
        worker_port=4,
        control_port=2,
        store_port=3,
        parent=77,
        limits=Limits(heartbeat=2.0, stop=3.0, form=4.0, gather=0.0),
    )


@pytest.mark.parametrize(
    ("hostname", "changed", "sentence"),
    [
        ("demo-ring-0-2", {"WORLD_SIZE": ""}, "WORLD_SIZE is not set; set it to the number of ranks."),
        ("demo-ring-0-2", {"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many', which is no number; set one from 1 to 1024."),
        ("demo-ring-0-2", {"WORLD_SIZE": "0"}, "WORLD_SIZE is 0; it must be from 1 to 1024."),
        (
            "demo-ring-0-4",
            {},
            "This is rank 4 (host demo-ring-0-4), and WORLD_SIZE=4 has ranks 0 to 3: "
            "make WORLD_SIZE the StatefulSet's replicas.",
        ),
        (
            "laptop",
            {},
            "KVPLANE_RING_ORDINAL is not set; set it to this rank, as the host name 'laptop' does not end in a number.",
        ),
        (
            "demo-ring-0-2",
            {"KVPLANE_RING_MODEL": ""},
            "KVPLANE_RING_MODEL is not set; set it to the folder of the model.",
        ),
        (
            "demo-ring-0-2",
            {"PROMPT_SPLIT_STRATEGY": "NONE"},
            "PROMPT_SPLIT_STRATEGY is 'NONE', this engine splits prompts over a ring only: set RING or unset it.",
        ),
        (
            "demo-ring-0-2",
            {"KVPLANE_RING_CONTEXT_TOKENS": "1"},
            "KVPLANE_RING_CONTEXT_TOKENS is 1; it must be from 2 to 1099511627776.",
        ),
        (
            "demo-ring-0-2",
            {"KVPLANE_RING_DTYPE": "int4"},
            "KVPLANE_RING_DTYPE is 'int4'; it must be one of auto, float32, bfloat16.",
        ),
        (
            "demo-ring-0-2",
            {"KVPLANE_RING_HEARTBEAT_LIMIT_SECONDS": "0.1"},
            "KVPLANE_RING_HEARTBEAT_LIMIT_SECONDS is 0.1; it must be from 0.4 to 86400.0.",
        ),
    ],
)
def test_what_cannot_be_meant_is_said_in_a_sentence(hostname: str, changed: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError) as raised:
        settings(hostname, **changed)
    assert str(raised.value) == sentence


def test_all_faults_are_said_at_once() -> None:
    with pytest.raises(SettingsError, match=r"WORLD_SIZE is not set.*KVPLANE_RING_MODEL is not set"):
        from_environment({}, hostname="demo-0")


def test_a_ring_of_one_needs_no_number_in_its_host_name() -> None:
    assert settings("laptop", WORLD_SIZE="1").ordinal == 0


def test_the_configuration_hash_tells_models_and_types_apart(tmp_path: Path) -> None:
    def hashed(**changed: str) -> str:
        return config_hash(settings(KVPLANE_RING_MODEL=str(tmp_path), **changed))

    def weights(*tensors: bytes) -> None:
        head: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for number, tensor in enumerate(tensors):
            head[f"t{number}"] = {"dtype": "U8", "shape": [len(tensor)], "data_offsets": [begin, begin + len(tensor)]}
            begin += len(tensor)
        packed = json.dumps(head).encode()
        (tmp_path / "model.safetensors").write_bytes(len(packed).to_bytes(8, "little") + packed + b"".join(tensors))

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    small, large = bytes(10), bytes(1_000_000)
    weights(small, large)
    first = hashed()
    assert first.split("/")[0] == "0.1.0"
    assert hashed() == first
    assert hashed(KVPLANE_RING_PARK_SECONDS="1") == first, "rank 0's alone to decide"
    assert hashed(KVPLANE_RING_DTYPE="float32") != first
    assert hashed(KVPLANE_RING_DEVICE="cuda") != first, "a ring of both would have no network"
    weights(bytes([*small[:-1], 1]), large)
    assert hashed() != first, "another first tensor"
    weights(small, b"\1" * len(large))
    assert hashed() != first, "another second tensor, of the same name, type and shape"
    weights(small, large[:-1] + b"\1")
    assert hashed() == first, "of a large tensor only the middle is read"
    weights(small, large + b"\0")
    second = hashed()
    assert second != first
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert hashed() not in {first, second}


@pytest.mark.parametrize("written", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\2\0\0\0\0\0\0\0[]"])
def test_a_file_of_weights_that_is_none_is_said_to_be_none(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(written)
    with pytest.raises(SettingsError, match=r"model.safetensors, whose head is not that of a safetensors file \("):
        config_hash(settings(KVPLANE_RING_MODEL=str(tmp_path)))


def test_a_folder_that_is_no_model_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"of which .*config.json cannot be read \(No such file or directory\)"):
        config_hash(settings(KVPLANE_RING_MODEL=str(tmp_path)))


def test_kv_takes_its_share_of_the_memory_that_is_free(tmp_path: Path) -> None:
    assert capacity_tokens(settings(KVPLANE_RING_KV_TOKENS="512"), kv_bytes_per_token=1, free_bytes=0) == 512
    assert capacity_tokens(settings(KVPLANE_RING_KV_PERCENT="50"), kv_bytes_per_token=1000, free_bytes=10**6) == 500
    with pytest.raises(
        SettingsError, match="hold 60 KV tokens of 10000 bytes, fewer than 256; give the pod more memory"
    ):
        capacity_tokens(settings(), kv_bytes_per_token=10_000, free_bytes=1_000_000)


def test_free_memory_is_what_the_control_group_or_the_machine_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  2000 kB\nMemAvailable:  1000 kB\n")
    assert free_bytes(cgroup=tmp_path, meminfo=meminfo) == 1_024_000
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cgroup=tmp_path, meminfo=meminfo) == 1_024_000
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_bytes(cgroup=tmp_path, meminfo=meminfo) == 700


def test_the_memory_limit_of_the_first_version_of_control_groups_counts_too(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable:  1000 kB\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("300\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert free_bytes(cgroup=tmp_path, meminfo=meminfo) == 1_024_000
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1000\n")
    assert free_bytes(cgroup=tmp_path, meminfo=meminfo) == 700
