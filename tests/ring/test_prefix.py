"""The longest computed prefix is found, exactly, whatever comes and goes."""

from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.ring.prefix import Prefixes

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=40)


def common(one: list[int], other: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(st.dictionaries(st.integers(0, 9), st.tuples(TOKENS, st.integers(0, 40), st.integers(0, 40))), TOKENS)
def test_the_longest_known_prefix_is_found(known: dict[int, tuple[list[int], int, int]], prompt: list[int]) -> None:
    prefixes = Prefixes(block=4)
    bounds = {}
    for sequence, (tokens, first, then) in known.items():
        prefixes.add(sequence, tokens, known=min(first, len(tokens)))
        bounds[sequence] = min(then, len(tokens))
        prefixes.add(sequence, tokens, known=bounds[sequence])
    lengths = {
        sequence: min(common(tokens, prompt), bounds[sequence], len(prompt) - 1)
        for sequence, (tokens, _, _) in known.items()
    }
    best = max(lengths.values(), default=0)
    found = prefixes.find(prompt)
    if best < 4:
        assert found == []
        return
    assert found[0] == (min(s for s, length in lengths.items() if length == best), best)
    assert all(lengths[sequence] == length for sequence, length in found)


def test_what_was_removed_is_not_found() -> None:
    prefixes = Prefixes(block=4)
    prefixes.add(1, [1] * 20, known=20)
    prefixes.add(2, [1] * 12, known=12)
    assert prefixes.find([1] * 30) == [(1, 20)]
    prefixes.remove(1)
    assert prefixes.find([1] * 30) == [(2, 12)]
    prefixes.remove(2)
    assert prefixes.find([1] * 30) == []


def test_what_was_of_use_last_is_dropped_last() -> None:
    prefixes = Prefixes(block=4)
    for sequence in (1, 2, 3):
        prefixes.add(sequence, [sequence] * 8, known=8)
        prefixes.keep(sequence)
    prefixes.keep(1)
    assert list(prefixes.kept()) == [2, 3, 1]
    prefixes.take(3)
    assert not prefixes.is_kept(3)
    assert prefixes.find([3] * 9) == [(3, 8)]


def test_alike_is_who_begins_with_the_same_block() -> None:
    prefixes = Prefixes(block=4)
    prefixes.add(1, [1] * 20, known=20)
    prefixes.add(2, [1] * 5 + [2], known=6)
    prefixes.add(3, [1] * 8, known=3)
    prefixes.add(4, [2] * 8, known=8)
    assert prefixes.alike([1] * 4) == [1, 2]
    assert prefixes.alike([1] * 3) == []
