"""The promised time to the first token is followed where the sidecar takes it from."""

import asyncio
from pathlib import Path

import pytest

from kvplane_runtime.ring import promise


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promise, "CHECK_SECONDS", 0)


def write(file: Path, milliseconds: int) -> None:
    file.write_text(f'{{"servedName": "chat", "slo": {{"ttftMilliseconds": {milliseconds}}}}}')


async def test_each_change_is_told_once(tmp_path: Path) -> None:
    file = tmp_path / "sidecar.json"
    told: asyncio.Queue[float] = asyncio.Queue()
    following = asyncio.create_task(promise.follow(file, tell=told.put_nowait))
    await turns()
    assert told.empty(), "there is no file"
    write(file, 2000)
    assert await told.get() == 2.0
    file.write_text("{")
    await turns()
    write(file, 2000)
    await turns()
    assert told.empty()
    write(file, 500)
    assert await told.get() == 0.5
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following


async def turns() -> None:
    """Several rounds of whoever waits for no time at all."""
    for _ in range(10):
        await asyncio.sleep(0)
