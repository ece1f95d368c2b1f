import asyncio
from collections.abc import Callable

import uvloop


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the product runs on: its transports differ from asyncio's in detail."""
    return {"uvloop": uvloop.new_event_loop}
