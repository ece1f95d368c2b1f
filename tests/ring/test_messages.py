"""Messages survive the wire, and nothing else does."""

import sys

import pytest

from kvplane_runtime.ring import messages

MEMBER = messages.Member(ordinal=1, pod_uid="u", process="p", address="127.0.0.1:1")
TABLE = messages.Table.of(1, [1, 2, 3], [[messages.Positions(0, 2)], [messages.Positions(2, 1, 4)]])
MESSAGES: list[messages.AnyMessage] = [
    messages.Join(MEMBER, world_size=4, config_hash="c", capacity_tokens=10, epoch=3, tables=[TABLE]),
    messages.Loading(ordinal=1, loaded_bytes=5, total_bytes=10),
    messages.Refused(reason="No."),
    messages.Form(epoch=4, rank=0, members=[MEMBER], store="127.0.0.1:2", tables=[TABLE]),
    messages.Formed(epoch=4, rank=0),
    messages.Heartbeat(epoch=4, formed=True),
    messages.Step(
        epoch=4,
        number=7,
        decode=[messages.Decode(1, 3, 5)],
        window=messages.Window(sequence=2, start=0, tokens=[1, 2], placement="zigzag", logits=True),
        release=[9],
        truncate=[messages.Truncate(1, 3)],
        fork=[messages.Fork(1, 2, 3)],
    ),
    messages.Done(epoch=4, rank=1, number=7, traffic=messages.Traffic(0.1, 0.05, 0.01, 100)),
    messages.Fault(epoch=4, rank=1, number=7, reason="It is silent.", suspect=2),
    messages.Leave(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: messages.AnyMessage) -> None:
    assert messages.decode(messages.encode(message)) == message


def test_forms_of_one_ring_arrive_each_as_it_is() -> None:
    forms = {link: messages.Form(4, rank, [MEMBER, MEMBER], "s:2", [TABLE]) for rank, link in enumerate((0, 7))}
    heads, rest = messages.encode_forms(forms)
    assert {link: messages.decode(head + rest) for link, head in heads.items()} == forms
    assert TABLE.packed in rest
    assert not [head for head in heads.values() if TABLE.packed in head], "tokens are there once"


def test_a_million_tokens_are_taken_over_without_a_look_at_each() -> None:
    """That would take longer than a rank may be silent, and no heartbeat is sent meanwhile."""
    form = messages.Form(4, 0, [MEMBER], "s:2", [messages.Table.of(1, range(1_000_000), [])])
    data = messages.encode(form)
    blocks = sys.getallocatedblocks()
    found = messages.decode(data)
    assert sys.getallocatedblocks() - blocks < 1000
    assert isinstance(found, messages.Form)
    assert len(found.tables[0].tokens) == 1_000_000
    assert list(found.tables[0].tokens[70_000:70_003]) == [70_000, 70_001, 70_002]


def test_a_part_of_a_token_is_none() -> None:
    data = messages.encode(messages.Form(4, 0, [MEMBER], "s:2", [TABLE]))
    cut = data.replace(b"\xc4\x0c" + TABLE.packed, b"\xc4\x0b" + TABLE.packed[:-1])
    assert cut != data
    with pytest.raises(messages.MalformedMessageError, match="The 11 bytes of a sequence's tokens are no whole number"):
        messages.decode(cut)


def test_a_window_may_lie_whole_on_a_rank() -> None:
    step = messages.Step(0, 0, window=messages.Window(1, 0, [1], placement=3, logits=False))
    assert messages.decode(messages.encode(step)) == step


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1", b"\x81\xa4type\xa4Nope"])
def test_what_is_no_message_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(messages.MalformedMessageError, match="run one version on all ranks"):
        messages.decode(data)
