"""The reference pages name everything that is set and exported."""

import re
from pathlib import Path

from kvplane_runtime.ring import settings
from kvplane_runtime.ring.metrics import METRICS, WORKER_METRICS
from kvplane_runtime.ring.reference import architectures_page, metrics_page, settings_page
from tests.ring import proved


def test_every_variable_that_is_read_is_described() -> None:
    source = Path(settings.__file__).read_text()
    read = set(re.findall(r'"((?:KVPLANE_RING_[A-Z_]+)|WORLD_SIZE|POD_IP|POD_UID)"', source))
    told = set(re.findall(r"^\| `([A-Z_]+)` \|", settings_page(), re.MULTILINE))
    assert told == read


def test_a_default_that_is_fixed_is_told() -> None:
    page = settings_page()
    assert "| `KVPLANE_RING_SLICE_SECONDS` | `1.0` | Longest prefill window" in page
    assert "| `KVPLANE_RING_KV_TOKENS` |  | KV tokens this rank may hold. Default: what fits `kv_percent`" in page
    assert "| `KVPLANE_RING_HEARTBEAT_LIMIT_SECONDS` | `1` | Silence after which" in page


def test_every_architecture_that_is_proved_is_listed_once() -> None:
    served = proved.served()
    page = architectures_page(served=served, refused=proved.refused(), ranks=proved.RANKS, bound=proved.BOUND)
    told = re.findall(r"^\| `([a-z0-9_]+)` \|", page, re.MULTILINE)
    assert told == [*served, *proved.refused()]
    assert set(served) == {tiny.model_type for tiny in proved.SERVED}
    assert sum(map(len, served.values())) == len(proved.SERVED)
    assert "on rings of 2, 3 and 4 ranks\nin fp32" in page
    assert "within\n5e-05 of the largest logit" in page
    assert "| `llama` | as it comes; 5 query heads for each key head; llama3 frequencies |" in page
    assert "| `gemma2` | no softcap, sliding window |" in page
    assert "| `deepseek_v3` | Multi-head latent attention |" in page


def test_every_metric_is_described() -> None:
    page = metrics_page()
    assert all(metric.description in page for metric in (*METRICS, *WORKER_METRICS))
    assert "| `kvplane_ring_steps_total` | counter |  | Steps that all ranks have done. |" in page
