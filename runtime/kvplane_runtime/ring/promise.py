"""Follows the promised time to the first token in the sidecar's configuration file, which changes while pods run.

The sidecar takes the promise from there, and rank 0 orders its prefills by it, so a change of slo.ttftMilliseconds reaches
both without a restart. A file that is missing or broken changes nothing here; the sidecar says what is wrong with it.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from kvplane_api.wire import SidecarConfig

CHECK_SECONDS: Final = 1.0


def read(file: Path) -> float | None:
    """The promised seconds; None where the file cannot be read, or is no configuration."""
    try:
        return SidecarConfig.model_validate_json(file.read_bytes()).slo.ttft_milliseconds / 1000
    except (OSError, ValidationError):
        return None


async def follow(file: Path, *, tell: Callable[[float], None]) -> None:
    """Tells the promise, and each change of it, until cancelled."""
    told: float | None = None
    while True:
        promised = read(file)
        if promised is not None and promised != told:
            told = promised
            tell(promised)
        await asyncio.sleep(CHECK_SECONDS)
