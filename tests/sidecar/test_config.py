"""The configuration file: valid or refused, and hot."""

import json
from pathlib import Path

import pytest

from kvplane_runtime.sidecar.__main__ import parse
from kvplane_runtime.sidecar.app import Settings
from kvplane_runtime.sidecar.config import ConfigError, WatchedConfig, read


def document(**fields: object) -> str:
    return json.dumps({"schemaVersion": 1, "servedName": "chat"} | fields)


class Volume:
    """A ConfigMap volume as the kubelet makes it: a new directory, and one link swapped to it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        self.file = directory / "sidecar.json"
        self.file.symlink_to("..data/sidecar.json")

    def write(self, text: str) -> None:
        self._count += 1
        version = self._directory / f"..{self._count}"
        version.mkdir()
        (version / "sidecar.json").write_text(text)
        link = self._directory / "..data_tmp"
        link.symlink_to(version.name)
        link.rename(self._directory / "..data")


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    volume = Volume(tmp_path)
    volume.write(document(maxBodyBytes=2048))
    return volume


def test_a_swapped_link_is_seen(volume: Volume) -> None:
    config = WatchedConfig(volume.file)
    assert config.current.max_body_bytes == 2048
    config.check()
    assert config.reloads == {"applied": 0, "refused": 0}
    volume.write(document(maxBodyBytes=4096))
    config.check()
    config.check()
    assert config.current.max_body_bytes == 4096
    assert config.reloads == {"applied": 1, "refused": 0}


@pytest.mark.parametrize("broken", ["", "{", "[]", document(maxBodyBytes=-1), document(schemaVersion=2), "{}"])
def test_a_broken_file_never_replaces_a_good_one(volume: Volume, broken: str, caplog: pytest.LogCaptureFixture) -> None:
    config = WatchedConfig(volume.file)
    volume.write(broken)
    for _ in range(3):
        config.check()
    assert config.current.max_body_bytes == 2048
    assert config.reloads == {"applied": 0, "refused": 1}
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("The previous configuration stays in force.")
    volume.write(document(maxBodyBytes=8192))
    config.check()
    assert config.current.max_body_bytes == 8192


def test_a_file_that_is_gone_changes_nothing(volume: Volume) -> None:
    config = WatchedConfig(volume.file)
    volume.file.unlink()
    config.check()
    assert config.current.max_body_bytes == 2048
    assert config.reloads == {"applied": 0, "refused": 1}


def test_unknown_fields_of_a_newer_operator_are_ignored(volume: Volume) -> None:
    volume.write(document(admission={"policy": "Enforce"}))
    assert read(volume.file).served_name == "chat"


def test_errors_say_where_and_what(volume: Volume) -> None:
    volume.write(document(drainSeconds=-1))
    with pytest.raises(ConfigError, match=r"sidecar\.json is not valid: drainSeconds: .*greater than or equal to 0\.$"):
        WatchedConfig(volume.file)
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\); point KVPLANE_CONFIG_FILE"):
        read(volume.file.with_name("other"))


def test_settings_come_from_the_environment_or_from_flags() -> None:
    environment = {"KVPLANE_CONFIG_FILE": "/etc/x.json", "KVPLANE_POD_NAME": "chat-0"}
    assert parse([], environment) == Settings(config_file=Path("/etc/x.json"), pod="chat-0")
    assert parse(["--config", "y", "--pod", "p", "--port", "1"], environment) == Settings(
        config_file=Path("y"), pod="p", port=1
    )


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "no configuration file is given; set KVPLANE_CONFIG_FILE or --config."),
        ({"KVPLANE_CONFIG_FILE": "x"}, "no pod name is given; set KVPLANE_POD_NAME (from metadata.name) or --pod."),
    ],
)
def test_missing_settings_end_the_start(
    environment: dict[str, str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([], environment)
    assert sentence in capsys.readouterr().err
