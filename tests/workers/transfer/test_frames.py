"""A frame is read only if it is whole, authentic, next in line and meant for this direction of this connection."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import WireError
from penstock.workers.transfer.frames import (
    HEADER_BYTES,
    PREFACE,
    FrameSeal,
    connection_keys,
    preface,
    read_preface,
)
from penstock.workers.transfer.messages import Finish, Ping

FINISH = Finish(b"s" * 16, 3, (1, 2, 3))
LIMIT = 1 << 20


def read(seal: FrameSeal, frame: bytes):
    header = seal.open_header(frame[:HEADER_BYTES])
    return header, seal.open_body(header, frame[HEADER_BYTES : HEADER_BYTES + header.body_frame_bytes])


def ends(key: bytes = b"k" * 32) -> tuple[FrameSeal, FrameSeal]:
    return FrameSeal(key, LIMIT), FrameSeal(key, LIMIT)


def test_frames_in_order():
    out, back = ends()
    for message, payload_bytes in ((FINISH, 0), (Ping(), 0), (FINISH, 4096)):
        frame = out.seal(message, payload_bytes)
        header, got = read(back, frame)
        assert got == message
        assert header.payload_bytes == payload_bytes
        assert len(frame) == HEADER_BYTES + header.body_frame_bytes


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_changed_bit_is_noticed(data):
    out, back = ends()
    frame = bytearray(out.seal(FINISH, 4096))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(WireError):
        read(back, bytes(frame))


def test_a_repeated_skipped_or_reordered_frame_is_refused():
    out, back = ends()
    first, second, third = (out.seal(Ping()) for _ in range(3))
    read(back, first)
    for frame in (first, third):
        with pytest.raises(WireError, match="out of place"):
            read(back, frame)
    read(back, second)


def test_directions_connections_and_clusters_have_their_own_keys():
    nonces = b"a" * 16, b"b" * 16
    keys = {
        *connection_keys(b"cluster", *nonces),
        *connection_keys(b"cluster", nonces[0], b"c" * 16),
        *connection_keys(b"cluster", b"c" * 16, nonces[1]),
        *connection_keys(b"other", *nonces),
    }
    assert len(keys) == 8


def test_a_frame_over_the_limit_is_refused_before_its_payload():
    out, back = FrameSeal(b"k", 1 << 30), FrameSeal(b"k", LIMIT)
    with pytest.raises(WireError, match="over the limit"):
        back.open_header(out.seal(Ping(), LIMIT + 1))


def test_preface():
    assert read_preface(preface(b"n" * 16)) == b"n" * 16
    with pytest.raises(WireError, match="does not speak"):
        read_preface(b"HTTP" + preface(b"n" * 16)[4:])
    with pytest.raises(WireError, match="transfer version 9"):
        read_preface(PREFACE.pack(b"PNSK", 9, 0, b"n" * 16))
