"""What a rank's model does with steps besides attention: tables, forks, re-forms, files, and steps that break half way."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvplane_runtime.ring.architectures import UnsupportedArchitectureError, examine, examine_device
from kvplane_runtime.ring.communicator import Ring, RingBrokenError
from kvplane_runtime.ring.exchange import choose, keys_per_query
from kvplane_runtime.ring.layout import Layout
from kvplane_runtime.ring.messages import Decode, Fork, Step, Truncate, Window
from kvplane_runtime.ring.model import RingModel
from tests.ring.tiny import VOCABULARY, Tiny, build, configure
from tests.ring.world import Rings, World, on_ranks

LLAMA = Tiny("llama", "llama")
SLIDING = Tiny("mistral", "mistral", {"sliding_window": 40})
DRAW = random.Random(5)  # noqa: S311  (tokens, no secrets)
TOKENS = [DRAW.randrange(3, VOCABULARY) for _ in range(300)]


@pytest.fixture(scope="module")
def rings() -> Rings:
    return Rings()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build(LLAMA)


def unsharded(tiny: Tiny, tokens: list[int]) -> torch.Tensor:
    """The logits behind each token, by a model of its own: one that a ring runs computes nothing without it."""
    with torch.inference_mode():
        logits: torch.Tensor = build(tiny)(torch.tensor([tokens])).logits[0]
        return logits


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return unsharded(LLAMA, TOKENS)


@pytest.fixture
def world(rings: Rings, model: torch.nn.Module) -> Iterator[World]:
    world = World(rings, model, 3)
    yield world
    world.close()


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).abs().max()) < 5e-5 * max(1.0, float(wanted.abs().max()))


def test_a_fork_goes_its_own_way(world: World, expected: torch.Tensor) -> None:
    world.prompt(1, TOKENS[:100], 0, (100,))
    child = [*TOKENS[:70], *reversed(TOKENS[70:90])]
    logits = world.logits(
        fork=[Fork(1, 2, 70)], window=Window(sequence=2, start=70, tokens=child[70:], placement="zigzag", logits=True)
    )
    assert close(logits[0], unsharded(LLAMA, child)[-1])
    assert close(world.decode((1, 100, TOKENS[100]))[0], expected[100])


def test_what_is_cut_off_can_be_written_again(world: World, expected: torch.Tensor) -> None:
    world.prompt(1, [*TOKENS[:80], *TOKENS[:40]], 0, (70, 50))
    for at in range(120, 130):
        world.decode((1, at, 7))
    world.step(truncate=[Truncate(1, 80)])
    assert world.layout(1).length == 80
    assert close(world.prompt(1, TOKENS[80:150], 80, (70,)), expected[149])


def test_what_is_cut_off_may_lie_in_the_middle(world: World, expected: torch.Tensor) -> None:
    """After a refill slots are not in the order of positions."""
    world.prompt(1, [*TOKENS[:100], *TOKENS[:40]], 0, (140,))
    world.reform([0, 2, 1], lost=[1])
    world.refill(1, [*TOKENS[:100], *TOKENS[:40]], most=50)
    world.step(truncate=[Truncate(1, 100)])
    assert close(world.prompt(1, TOKENS[100:150], 100, (50,)), expected[149])
    assert close(world.decode((1, 150, TOKENS[150]))[0], expected[150])


def test_a_refill_takes_generated_tokens_too(world: World, expected: torch.Tensor) -> None:
    world.prompt(1, TOKENS[:50], 0, (50,))
    for at in range(50, 80):
        world.decode((1, at, TOKENS[at]))
    lost = world.layout(1).tokens(1)
    world.reform([0, 2])
    assert world.refill(1, TOKENS, most=20) == lost
    assert close(world.decode((1, 80, TOKENS[80]))[0], expected[80])


def test_windows_with_and_without_logits(world: World, expected: torch.Tensor) -> None:
    window = Window(sequence=1, start=0, tokens=TOKENS[:90], placement="zigzag", logits=False)
    assert world.step(window=window).logits is None
    rows = world.logits(
        decode=[Decode(1, 90, TOKENS[90])],
        window=Window(sequence=2, start=0, tokens=TOKENS[:20], placement=2, logits=True),
    )
    assert rows.shape == (2, VOCABULARY)
    assert close(rows[0], expected[90])
    assert close(rows[1], expected[19])
    assert world.step(release=[1, 2]).held_tokens == 0
    assert world.models[0].layouts() == {}


def test_a_step_that_breaks_half_way_changes_nothing(world: World, expected: torch.Tensor) -> None:
    """One rank is gone in the midst of a window; the others go on from what they held before it."""
    world.prompt(1, TOKENS[:120], 0, (120,))
    before = world.layout(1).copy()
    window = Window(sequence=1, start=120, tokens=TOKENS[120:200], placement="zigzag", logits=True)
    step = Step(epoch=world.rings[0].epoch, number=9, window=window)

    def work(rank: int) -> None:
        if rank == 1:
            for ring in world.rings:
                ring.abort("rank 1 sent no heartbeat for 1 s")
        else:
            world.models[rank].run(step)

    with pytest.raises(RingBrokenError, match="no heartbeat"):
        on_ranks(3, work)
    assert all(model.layouts()[1] == before for model in world.models)
    world.reform([0, 2])
    world.refill(1, TOKENS, most=60)
    assert close(world.prompt(1, TOKENS[120:200], 120, (80,)), expected[199])


def test_a_window_that_lies_on_one_rank_ends_with_its_ring(world: World) -> None:
    """It exchanges nothing in which it could hear of it."""
    window = Window(sequence=1, start=0, tokens=TOKENS[:20], placement=2, logits=False)
    world.rings[2].abort("rank 1 sent no heartbeat for 1 s")
    with pytest.raises(RingBrokenError, match="no heartbeat"):
        world.models[2].run(Step(epoch=world.rings[2].epoch, number=0, window=window))
    assert world.models[2].layouts() == {}


def test_a_rank_keeps_what_it_is_given_and_drops_the_rest(world: World, expected: torch.Tensor) -> None:
    """Another rank has computed a part of this one's anew meanwhile: it is to keep the rest, from between its slots."""
    world.prompt(1, TOKENS[:120], 0, (120,))
    world.prompt(2, TOKENS[:20], 0, (20,))
    given = world.layout(1).copy()
    runs = [list(given.runs(rank)) for rank in range(3)]
    first = runs[1].pop(0)
    fewer = Layout(3, held=runs, length=120)
    assert not fewer.complete()
    world.close()
    world.rings = world._make.form(3)
    for one, ring in zip(world.models, world.rings, strict=True):
        one.bind(ring, {1: fewer})
    assert set(world.models[0].layouts()) == {1}
    assert world.models[1].held() == {1: fewer.runs(1)}
    assert world.refill(1, TOKENS, most=50) == first.count
    assert close(world.decode((1, 120, TOKENS[120]))[0], expected[120])


def test_a_rank_cannot_keep_what_it_does_not_hold(world: World) -> None:
    world.prompt(1, TOKENS[:60], 0, (60,))
    layout = world.layout(1)
    stranger = Layout(3, held=[layout.runs(1), layout.runs(0), layout.runs(2)])
    with pytest.raises(ValueError, match="Sequence 1: this rank is to keep KV of positions that it does not hold"):
        world.models[0].bind(world.rings[0], {1: stranger})
    turned = Layout(3, held=[tuple(reversed(layout.runs(0)))])
    with pytest.raises(ValueError, match="Sequence 1: this rank is to keep its KV in another order"):
        world.models[0].bind(world.rings[0], {1: turned})


def test_what_a_caller_may_get_wrong(world: World) -> None:
    world.prompt(1, TOKENS[:60], 0, (60,))
    model, epoch = world.models[0], world.rings[0].epoch
    with pytest.raises(ValueError, match=f"Step 0 is of epoch {epoch - 1} and the ring of epoch {epoch}"):
        model.run(Step(epoch=epoch - 1, number=0))
    with pytest.raises(ValueError, match="The next token's position is 60; it is given as 61"):
        model.run(Step(epoch=epoch, number=1, decode=[Decode(1, 61, 5)]))
    window = Window(sequence=1, start=60, tokens=[5], placement=0, logits=True)
    with pytest.raises(ValueError, match="is to lie whole on rank 0, and other ranks hold some of its KV"):
        model.run(Step(epoch=epoch, number=1, window=window))
    with pytest.raises(
        ValueError, match=r"The layouts are of rank 0 of 3 and the ring has this process as rank 0 of 1"
    ):
        model.bind(Ring.alone())
    fresh = RingModel(world.models[0]._model, model.architecture)
    with pytest.raises(ValueError, match="bound to no ring"):
        fresh.run(Step(epoch=0, number=0))


def test_what_communication_cost_is_counted(world: World) -> None:
    window = Window(sequence=1, start=0, tokens=TOKENS[:60], placement="zigzag", logits=True)
    result = world.step(window=window)
    # Two blocks of 20 tokens go on to the next rank in each of 3 layers: keys and values of 2 heads of 16 in fp32.
    assert result.sent_bytes == 3 * 2 * 20 * 2 * 2 * 16 * 4
    assert 0 < result.waited_seconds < result.seconds
    assert result.held_tokens == 20
    assert world.models[0].kv_bytes_per_token == 3 * 2 * 2 * 16 * 4
    assert world.models[0].keys_per_query == 8 * (16 + 17) * 4 / (2 * 2 * 16 * 4)


@pytest.mark.parametrize(("new", "past", "chosen"), [(1000, 0, "keys"), (20, 0, "keys"), (20, 5000, "queries")])
def test_what_goes_round_is_what_is_less(new: int, past: int, chosen: str) -> None:
    ratio = keys_per_query(query_heads=32, key_heads=8, head_dim=128, element_bytes=2)
    assert choose(new=new, past=past, keys_per_query=ratio) == chosen


def test_a_sliding_layer_gets_just_the_tokens_before_its_pieces(rings: Rings) -> None:
    world = World(rings, build(SLIDING), 3)
    result = world.step(window=Window(sequence=1, start=0, tokens=TOKENS[:294], placement="zigzag", logits=True))
    assert result.logits is not None
    assert close(result.logits[0], unsharded(SLIDING, TOKENS)[293])
    # Rank 0 has the first and the last of 6 pieces; 39 tokens before the second piece are all it has to send.
    assert result.sent_bytes == 3 * 39 * 2 * 2 * 16 * 4
    world.close()


def test_a_model_is_loaded_from_a_folder_with_its_progress(tmp_path: Path, model: torch.nn.Module) -> None:
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    seen: list[tuple[int, int]] = []
    loaded = RingModel.load(tmp_path, dtype=torch.bfloat16, progress=lambda done, total: seen.append((done, total)))
    total = (tmp_path / "model.safetensors").stat().st_size
    assert seen[-1] == (total, total)
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert loaded.kv_bytes_per_token == 3 * 2 * 2 * 16 * 2
    loaded.bind(Ring.alone())
    window = Window(sequence=1, start=0, tokens=TOKENS[:50], placement="zigzag", logits=True)
    assert loaded.run(Step(epoch=0, number=0, window=window)).logits is not None


class Mixing(torch.nn.Module):
    """A layer that looks at the token before."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(states)
        return found + found.roll(1, dims=1)


def test_a_model_whose_tokens_meet_outside_of_attention_is_refused() -> None:
    model = build(LLAMA)
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    with pytest.raises(UnsupportedArchitectureError, match="its logits depend on more than each token's position"):
        RingModel.of(model)


def test_a_model_that_hides_its_window_in_a_mask_is_refused() -> None:
    model = build(Tiny("qwen2", "qwen2"))
    model.config.layer_types[1] = "sliding_attention"
    model.config.sliding_window = 8
    model.model.has_sliding_layers = True  # which makes its own mask
    with pytest.raises(
        UnsupportedArchitectureError, match="layer 1 is of type sliding_attention and tells its attention"
    ):
        RingModel.of(model)


@pytest.mark.parametrize(
    ("options", "context"),
    [
        ({}, 4096),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 4096),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 512,
                }
            },
            512,
        ),
    ],
)
def test_a_model_is_served_as_far_as_it_is_exact(options: dict[str, object], context: int) -> None:
    assert examine(configure(Tiny("llama", "llama", options))).context_tokens == context


def test_a_head_that_no_kernel_of_a_gpu_takes_is_refused_there() -> None:
    architecture = examine(configure(Tiny("llama", "llama", {"head_dim": 20})))
    examine_device(architecture, "cpu")
    with pytest.raises(
        UnsupportedArchitectureError, match="on GPUs where a head has 20 numbers: their kernels take multiples of 8"
    ):
        examine_device(architecture, "cuda")


def test_a_model_with_chunks_is_served_within_the_first() -> None:
    tiny = Tiny("llama4_text", "llama4_text", {"attention_chunk_size": 512, "num_local_experts": 2})
    assert examine(configure(tiny)).context_tokens == 512


def test_a_model_that_counts_positions_in_its_cache_is_served_to_where_it_makes_use_of_them() -> None:
    tiny = Tiny("llama4_text", "llama4_text", {"floor_scale": 512, "num_local_experts": 2})
    assert examine(configure(tiny)).context_tokens == 511
