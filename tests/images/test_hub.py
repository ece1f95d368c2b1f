"""The test hub speaks the hub's API: proved with huggingface_hub itself, as vLLM uses it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from e2e.hub import Hub, Model, Served, commit_id, first_byte, serve

MEBIBYTE = 1 << 20
WEIGHTS_BYTES = 24 * MEBIBYTE
BREAK_AFTER = 16 * MEBIBYTE
GRANTED = "hf_right"
STEP_BYTES = 10 * MEBIBYTE
"""huggingface_hub writes, and so resumes, in steps of this size."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one large and two small files."""
    root = tmp_path_factory.mktemp("model")
    (root / "config.json").write_text('{"model_type": "llama"}')
    (root / "nested").mkdir()
    (root / "nested" / "notes.txt").write_text("below")
    (root / "model.safetensors").write_bytes(os.urandom(WEIGHTS_BYTES))
    return root


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """An older state of the same model."""
    root = tmp_path / "older"
    root.mkdir()
    (root / "config.json").write_text('{"model_type": "llama", "old": true}')
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(folder: Path, older: Path) -> Hub:
    public = Model("acme/tiny", folder, revisions={"v0": older})
    gated = Model("acme/gated", folder, token=GRANTED)
    return Hub([public, gated], break_after=None)


@pytest.fixture
def endpoint(hub: Hub) -> Iterator[str]:
    with serve(hub) as address:
        yield address


def same_files(copy: Path, original: Path) -> bool:
    names = {p.relative_to(original) for p in original.rglob("*") if p.is_file()}
    copied = {p.relative_to(copy) for p in copy.rglob("*") if p.is_file()}
    return names == copied and all((copy / n).read_bytes() == (original / n).read_bytes() for n in names)


def downloads(hub: Hub, count: int) -> tuple[Served, ...]:
    """Waits for so many: one is noted when it has been sent, which may be after the client has it."""
    end = time.monotonic() + 30
    while len(hub.downloads()) < count and time.monotonic() < end:
        time.sleep(0.01)
    return hub.downloads()


def test_a_snapshot_is_the_folder(endpoint: str, folder: Path, cache: Path) -> None:
    copy = Path(snapshot_download("acme/tiny", endpoint=endpoint, cache_dir=cache, token=False))
    assert same_files(copy, folder)
    assert copy.name == commit_id(folder)


def test_a_second_reader_of_the_cache_downloads_nothing(hub: Hub, endpoint: str, cache: Path) -> None:
    first = snapshot_download("acme/tiny", endpoint=endpoint, cache_dir=cache, token=False)
    assert len(downloads(hub, 3)) == 3
    assert snapshot_download("acme/tiny", endpoint=endpoint, cache_dir=cache, token=False) == first
    assert len(hub.downloads()) == 3


def test_a_revision_is_pinned_by_name_or_commit(endpoint: str, older: Path, cache: Path) -> None:
    for revision in ("v0", commit_id(older)):
        copy = Path(snapshot_download("acme/tiny", revision=revision, endpoint=endpoint, cache_dir=cache, token=False))
        assert same_files(copy, older)
        assert copy.name == commit_id(older)


def test_an_unknown_revision_repository_or_file_is_said_to_be_that(endpoint: str, cache: Path) -> None:
    api = HfApi(endpoint=endpoint, token=False)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("acme/tiny", revision="v9")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("acme/none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("acme/tiny", "no.json", endpoint=endpoint, cache_dir=cache, token=False)


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_wrong", 403)])
def test_a_gated_model_wants_its_token(endpoint: str, cache: Path, token: str | bool, status: int) -> None:
    with pytest.raises(GatedRepoError) as refused:
        HfApi(endpoint=endpoint, token=token).model_info("acme/gated")
    assert refused.value.response.status_code == status
    with pytest.raises((GatedRepoError, LocalEntryNotFoundError)):
        snapshot_download("acme/gated", endpoint=endpoint, cache_dir=cache, token=token)
    assert not list(cache.rglob("*.safetensors"))


def test_a_gated_model_comes_with_its_token(endpoint: str, folder: Path, cache: Path) -> None:
    copy = snapshot_download("acme/gated", endpoint=endpoint, cache_dir=cache, token=GRANTED)
    assert same_files(Path(copy), folder)


def test_a_broken_download_is_resumed_where_it_broke(folder: Path, cache: Path) -> None:
    hub = Hub([Model("acme/tiny", folder)], break_after=BREAK_AFTER)
    with serve(hub) as endpoint:
        copy = Path(snapshot_download("acme/tiny", endpoint=endpoint, cache_dir=cache, token=False))
    assert same_files(copy, folder)
    weights = [d for d in downloads(hub, 4) if d.path.endswith("model.safetensors")]
    assert [(d.status, d.first_byte, d.sent_bytes, d.broken) for d in weights] == [
        (200, 0, BREAK_AFTER, True),
        (206, STEP_BYTES, WEIGHTS_BYTES - STEP_BYTES, False),
    ]


def test_the_listings_that_vllm_asks_for(endpoint: str) -> None:
    api = HfApi(endpoint=endpoint, token=False)
    names = {"config.json", "model.safetensors", "nested/notes.txt"}
    assert set(api.list_repo_files("acme/tiny")) == names
    assert {entry.path for entry in api.list_repo_tree("acme/tiny", recursive=True)} == names
    assert [entry.path for entry in api.get_paths_info("acme/tiny", ["config.json", "none"])] == ["config.json"]
    assert {ref.name for ref in api.list_repo_refs("acme/tiny").branches} == {"main", "v0"}


@pytest.mark.parametrize(("header", "byte"), [(None, 0), ("bytes=7-", 7), ("bytes=-7", 0), ("lines=1-", 0)])
def test_only_an_open_byte_range_resumes(header: str | None, byte: int) -> None:
    assert first_byte(header) == byte
