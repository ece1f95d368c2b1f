"""The sidecar's command line and environment."""

import pytest

from kvplane_api.names import ENV_CONFIG_FILE, ENV_POD_NAME, ENV_POOL
from kvplane_runtime.sidecar.__main__ import parse

POD = {ENV_CONFIG_FILE: "/etc/sidecar.json", ENV_POD_NAME: "chat-ring-0-1"}


@pytest.mark.parametrize(("told", "ring"), [({}, False), ({ENV_POOL: "paged"}, False), ({ENV_POOL: "ring"}, True)])
def test_the_pool_says_what_the_engine_is(told: dict[str, str], ring: bool) -> None:
    assert parse([], POD | told).ring is ring


def test_a_pool_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([], POD | {ENV_POOL: "rings"})
    assert "the pool is 'rings'; set KVPLANE_POOL or --pool to paged or ring." in capsys.readouterr().err
