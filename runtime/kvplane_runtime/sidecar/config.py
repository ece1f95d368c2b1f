"""The sidecar's configuration file: read at start, read again when it changes.

The operator writes it into a ConfigMap volume, where the kubelet changes it by swapping a symbolic link, so the file is
watched by what it *is* (device, inode, size, modification time behind all links), once a second. A broken new file never
takes the place of a good one: it is logged once, counted, and the old one stays in force.
"""

import logging
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from kvplane_api.names import ENV_CONFIG_FILE
from kvplane_api.wire import SidecarConfig

log = logging.getLogger(__name__)

CHECK_SECONDS: Final = 1.0
_Signature = tuple[int, int, int, int]


class ConfigError(Exception):
    """The file cannot be read, or is not a SidecarConfig; the message says which, where and what to do."""


def read(path: Path) -> SidecarConfig:
    """The configuration in ``path``; raises ConfigError."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read ({error.strerror}); point {ENV_CONFIG_FILE} at one."
        ) from error
    try:
        return SidecarConfig.model_validate_json(text)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"
            for fault in error.errors(include_url=False, include_context=False)
        )
        raise ConfigError(f"The configuration file {path} is not valid: {faults}.") from error


class WatchedConfig:
    """The configuration in force."""

    def __init__(self, path: Path) -> None:
        """Reads the file; raises ConfigError if it is not there or not valid."""
        self._path = path
        self._signature = _signature(path)
        self.current = read(path)
        self.reloads = {"applied": 0, "refused": 0}
        """Changes of the file since the start, by what became of them."""

    def check(self) -> None:
        """Takes a changed file into force, or refuses it; does nothing while the file is as it was."""
        signature = _signature(self._path)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self.current = read(self._path)
        except ConfigError as error:
            self.reloads["refused"] += 1
            log.error("%s The previous configuration stays in force.", error)  # noqa: TRY400  (the sentence says all)
        else:
            self.reloads["applied"] += 1
            log.info("The configuration was read again: %s.", self.current.model_dump_json(by_alias=True))


def _signature(path: Path) -> _Signature | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
