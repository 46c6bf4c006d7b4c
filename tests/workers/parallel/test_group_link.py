"""Frames between two ranks: in order, of one incarnation, and authentic, or an error before anything is acted on."""

import threading
from collections.abc import Iterator

import pytest
from fakes.group_links import KEY, LinkPairs

from penstock.workers.errors import GroupError, IntegrityError, WireError
from penstock.workers.parallel.group_link import GroupLink


@pytest.fixture
def links() -> Iterator[LinkPairs]:
    pairs = LinkPairs()
    yield pairs
    pairs.close()


def test_frames_arrive_in_order_with_all_they_carry(links: LinkPairs) -> None:
    one, other = links.pair()
    one.send(1, b"first")
    one.send(2, b"", flags=1, place=2**60, digest=2**64 - 1)
    first, second = other.receive(), other.receive()
    assert (first.kind, bytes(first.body), first.sequence) == (1, b"first", 1)
    assert (second.flags, second.place, second.digest, second.sequence) == (1, 2**60, 2**64 - 1, 2)
    other.send(3, b"back")
    assert bytes(one.receive().body) == b"back"


def test_another_key_is_refused(links: LinkPairs) -> None:
    one, other = links.pair(keys=(KEY, "cd" * 32))
    one.send(1, b"x")
    with pytest.raises(WireError, match="not authentic"):
        other.receive()


def test_another_incarnation_is_refused(links: LinkPairs) -> None:
    one, other = links.pair(epochs=(1, 2))
    one.send(1, b"x")
    with pytest.raises(IntegrityError, match="incarnation 1; this is incarnation 2"):
        other.receive()


@pytest.mark.parametrize("sequence", [2, 0])
def test_gap_and_repetition_are_refused(sequence: int, links: LinkPairs) -> None:
    one, other = links.pair()
    one.send(1)
    other.receive()
    one._sent = sequence
    one.send(1)
    with pytest.raises(IntegrityError, match="follows frame 1"):
        other.receive()


@pytest.mark.parametrize("place", [3, 20, 50, 79])
def test_every_damaged_byte_is_noticed(place: int, links: LinkPairs) -> None:
    one, other = links.pair()
    written: list[bytes] = []
    one._write = written.append  # type: ignore[method-assign]
    one.send(1, b"body")
    frame = bytearray(written[0])
    frame[place] ^= 1
    one.socket.sendall(frame)
    one.close()  # a damaged length must not leave the reader waiting
    with pytest.raises((WireError, GroupError)):
        other.receive()


def test_large_bodies_are_refused_unread(links: LinkPairs) -> None:
    one, other = links.pair()
    other.max_body_bytes = 10
    one.send(1, b"x" * 11)
    with pytest.raises(WireError, match="11 bytes where 10 may come"):
        other.receive()


def test_end_of_the_connection_wakes_the_reader(links: LinkPairs) -> None:
    one, other = links.pair()
    threading.Timer(0.05, one.close).start()
    with pytest.raises(GroupError, match="closed"):
        other.receive()


def test_strangers_are_told_apart(links: LinkPairs) -> None:
    left, right = links.socketpair()
    left.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    with pytest.raises(WireError, match="does not speak"):
        GroupLink(right, KEY, 1, 1 << 16, opened=False)


def test_on_one_host_macs_are_left_out_once_established(links: LinkPairs) -> None:
    one, other = links.pair()
    one.send(1, b"x" * 100)
    other.receive()
    for end in (one, other):
        end.establish(1 << 20)

    def send() -> None:
        for number in range(50):  # several at a time in the reader's buffer, some beyond it
            one.send(2, bytes([number]) * (number * 3000), place=number)

    sending = threading.Thread(target=send)
    sending.start()
    for number in range(50):
        frame = other.receive()
        assert (frame.place, frame.sequence) == (number, number + 2)
        assert bytes(frame.body) == bytes([number]) * (number * 3000)
    sending.join(5)
    one._epoch = 2
    one.send(1)
    with pytest.raises(IntegrityError):
        other.receive()
