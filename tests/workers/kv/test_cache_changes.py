"""Changes cancel each other out by digest, however they were grouped."""

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.kv.cache_changes import CacheChanges


def digests(letters: bytes) -> bytes:
    return b"".join(bytes([letter]) * 32 for letter in letters)


def short(letters: bytes) -> bytes:
    return b"".join(bytes([letter]) * 8 for letter in letters)


def test_what_is_taken_back_is_not_told():
    changes = CacheChanges()
    changes.note(digests(b"abc"), stored=True)
    changes.note(digests(b"b"), stored=False)
    changes.note(digests(b"xy"), stored=False)
    changes.note(digests(b"yz"), stored=True)
    assert changes.take() == (short(b"acz"), short(b"x"))
    assert changes.take() == (b"", b"")
    changes.note(digests(b"a"), stored=False)
    assert changes.take() == (b"", short(b"a"))


def test_much_is_said_to_be_much_and_stays_bounded():
    changes = CacheChanges()
    for _ in range(100_000):
        changes.note(digests(b"ab"), stored=True)
        changes.note(digests(b"ab"), stored=False)
    assert changes.many
    assert len(changes._parts) < 70_000
    changes.note(digests(b"b"), stored=True)
    assert changes.take() == (short(b"b"), b"")
    assert not changes.many


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 5), unique=True, max_size=4), max_size=40))
def test_listeners_know_the_set_whatever_happened(changed):
    """Digests that share their first two bytes, and digests that do not."""
    names = [bytes([0, 0, number % 3, number]) + bytes(28) for number in range(3)]
    names += [bytes([number, 1]) + bytes(30) for number in range(3)]
    changes, held, heard = CacheChanges(), set(), set()
    for group in changed:
        for number in group:
            name = names[number]
            changes.note(name, stored=name not in held)
            held ^= {name}
        if len(group) == 4:
            stored, evicted = ({part[i : i + 8] for i in range(0, len(part), 8)} for part in changes.take())
            assert not stored & (heard | evicted)
            assert evicted <= heard
            heard = (heard | stored) - evicted
            assert heard == {name[:8] for name in held}
