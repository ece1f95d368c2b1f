"""One GPU: its kernels against the definition, and models on it against the same models on the CPU. `make test-gpu` only."""

import random

import pytest
import torch
from torch import Tensor

from kvplane_runtime.ring.communicator import Ring
from kvplane_runtime.ring.kernel import NOTHING, block, mask, products
from kvplane_runtime.ring.messages import Decode, Fork, Step, Truncate, Window
from kvplane_runtime.ring.model import RingModel
from tests.ring.tiny import SERVED, VOCABULARY, Tiny, build

pytestmark = pytest.mark.gpu
ERROR = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
BOUND = 1e-4
"""Of the largest logit, or of 1: two devices, whose matrix products round in another order."""


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    assert torch.cuda.is_available(), (
        "torch sees no GPU here. make test-gpu wants a machine with one, and PYTHON=… with torch for CUDA: that of .venv has "
        "no GPU half."
    )
    return torch.device("cuda", 0)


def drawn(
    gpu: torch.device, rows: int, keys: int, heads: tuple[int, int], *, size: int, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * keys + size)
    return [
        torch.randn(1, count, length, size, generator=generator).to(gpu, dtype)
        for count, length in ((heads[0], rows), (heads[1], keys), (heads[1], keys))
    ]


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (6, 1)])
@pytest.mark.parametrize("size", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", [(70, 70, True), (70, 300, False), (1, 77, False), (5, 3000, False)], ids=str)
def test_a_block_is_what_the_definition_says(
    gpu: torch.device, shape: tuple[int, int, bool], dtype: torch.dtype, size: int, heads: tuple[int, int]
) -> None:
    rows, keys, causal = shape
    query, key, value = drawn(gpu, rows, keys, heads, size=size, dtype=dtype)
    out, lse = block(query, key, value, scale=size**-0.5, causal=causal)
    expected, expected_lse = products(query.double(), key.double(), value.double(), scale=size**-0.5, causal=causal)
    assert (out - expected).abs().max() < ERROR[dtype]
    assert (lse - expected_lse).abs().max() < ERROR[dtype]
    assert (out.dtype, out.shape) == (dtype, query.shape)
    assert (lse.dtype, lse.shape) == (torch.float32, query.shape[:3])


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(6, 9), (256, 301), (33, 33)])
def test_a_mask_of_any_width_and_queries_that_see_nothing(
    gpu: torch.device, rows: int, keys: int, dtype: torch.dtype
) -> None:
    query, key, value = drawn(gpu, rows, keys, (8, 2), size=64, dtype=dtype)
    visible = torch.ones(rows, keys, dtype=torch.bool, device=gpu).tril(keys - rows)
    visible[[0, 4]] = False
    seen = mask(visible, dtype)
    out, lse = block(query, key, value, scale=0.125, bias=seen)
    expected, expected_lse = products(
        query.double(), key.double(), value.double(), scale=0.125, bias=mask(visible, torch.float64).bias
    )
    assert (lse[:, :, [0, 4]] == NOTHING).all()
    assert not out.isnan().any()
    rest = [row for row in range(rows) if row not in (0, 4)]
    assert (out - expected)[:, :, rest].abs().max() < ERROR[dtype]
    assert (lse - expected_lse)[:, :, rest].abs().max() < ERROR[dtype]


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_keys_may_be_a_part_of_a_shard(gpu: torch.device, dtype: torch.dtype) -> None:
    """As the cache hands them out: some slots of many, head-major."""
    query, key, value = drawn(gpu, 40, 60, (8, 2), size=64, dtype=dtype)
    shard = torch.zeros(2, 2, 512, 64, dtype=dtype, device=gpu)
    shard[0, :, 100:160], shard[1, :, 100:160] = key[0], value[0]
    apart = query.transpose(1, 2).contiguous().transpose(1, 2)
    found = block(apart, shard[0:1, :, 100:160], shard[1:2, :, 100:160], scale=0.125)
    for one, other in zip(found, block(query, key, value, scale=0.125), strict=True):
        assert torch.equal(one, other)


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found.cpu() - wanted).abs().max()) < BOUND * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("tiny", SERVED, ids=lambda tiny: tiny.name)
def test_a_model_says_on_the_gpu_what_it_says_on_the_cpu(gpu: torch.device, tiny: Tiny) -> None:
    draw = random.Random(tiny.name)  # noqa: S311  (tokens, no secrets)
    tokens = [draw.randrange(3, VOCABULARY) for _ in range(140)]
    with torch.inference_mode():
        expected = build(tiny)(torch.tensor([tokens])).logits[0].float()
    model = RingModel.of(build(tiny).to(gpu))
    model.bind(Ring.alone(device=gpu))
    number = iter(range(1000))

    def run(**what: object) -> Tensor:
        logits = model.run(Step(epoch=0, number=next(number), **what)).logits  # type: ignore[arg-type]
        assert logits is not None
        return logits[0]

    assert close(run(window=Window(1, 0, tokens[:80], "zigzag", True)), expected[79])
    assert close(run(window=Window(1, 80, tokens[80:110], "zigzag", True)), expected[109])
    for at in range(110, 120):
        assert close(run(decode=[Decode(1, at, tokens[at])]), expected[at])
    assert close(
        run(truncate=[Truncate(1, 115)], fork=[Fork(1, 2, 115)], decode=[Decode(2, 115, tokens[115])]), expected[115]
    )
    assert model.held_tokens() == 115 + 116
