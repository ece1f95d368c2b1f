"""The image store's place, and its names for buildah."""

import json
from pathlib import Path

import pytest

from images import build
from images.storage import Storage, buildah_environment, cache_folder, default_storage
from images.tools import Commands, Tool


def test_the_store_is_below_the_cache(tmp_path: Path) -> None:
    store = default_storage({"KVPLANE_CACHE": str(tmp_path)})
    assert store == Storage(root=tmp_path / "containers/storage", runroot=tmp_path / "containers/run")
    assert not store.root.exists()


def test_the_cache_is_in_the_home_folder_by_default() -> None:
    assert cache_folder({}) == cache_folder({"KVPLANE_CACHE": ""}) == Path.home() / ".cache/kvplane"


def test_buildah_is_told_the_store_and_to_mount_nothing_permanent() -> None:
    command = Storage(Path("/store"), Path("/run/store")).buildah("images")
    assert command[:5] == ("buildah", "--root", "/store", "--runroot", "/run/store")
    assert "overlay.skip_mount_home=true" in command
    assert command[-1] == "images"


def test_buildah_needs_no_container_runtime() -> None:
    environment = buildah_environment({"PATH": "/bin"})
    assert environment == {"PATH": "/bin", "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "overlay"}


def test_images_are_read_from_the_stores_own_list(tmp_path: Path) -> None:
    store = default_storage({"KVPLANE_CACHE": str(tmp_path)})
    commands = Commands(tool=Tool.BUILDAH, storage=store, mount_certificates=False)
    assert commands.images() == {}
    store.images_file.parent.mkdir(parents=True)
    store.images_file.write_text(json.dumps([{"id": "1", "names": ["a:dev", "a:key"]}, {"id": "2"}]))
    assert commands.images() == {"a:dev": "1", "a:key": "1"}


def test_only_containers_that_are_ours_alone_are_removed(tmp_path: Path) -> None:
    store = default_storage({"KVPLANE_CACHE": str(tmp_path)})
    commands = Commands(tool=Tool.BUILDAH, storage=store, mount_certificates=False)
    assert commands.remove_containers() is None
    store.containers_file.parent.mkdir(parents=True)
    store.containers_file.write_text("[]")
    assert commands.remove_containers() is None
    store.containers_file.write_text(json.dumps([{"id": "1", "names": ["control-working-container"]}]))
    assert commands.remove_containers() == store.buildah("rm", "--all")
    assert Commands(tool=Tool.PODMAN, storage=store, mount_certificates=False).remove_containers() is None


def test_an_unknown_image_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build.main(["contol"])
    assert "unknown image contol; there are control, engine-cpu, demo-model" in capsys.readouterr().err


def test_a_failed_step_says_which_and_shows_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """buildah is replaced by a program that fails."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "buildah").write_text("#!/bin/sh\necho 'STEP 1: no space left on device' >&2\nexit 3\n")
    (programs / "buildah").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("KVPLANE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert build.main(["control", "--tool", "buildah", "--base", "debian:any"]) == 1
    error = capsys.readouterr().err
    assert "image control: build failed: buildah ended with status 3" in error
    assert error.rstrip().endswith("STEP 1: no space left on device")


def test_without_root_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVPLANE_CACHE", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert build.main(["control", "--tool", "buildah"]) == 1
    assert "needs root. Run this as root, or start Docker and use --tool docker." in capsys.readouterr().err
