"""Frames leave whole and in order through a narrow socket; scrubbed payload is not read."""

from __future__ import annotations

import socket

import pytest

from penstock.workers.transfer.frame_writer import FrameWriter, pass_views
from penstock.workers.transfer.frames import HEADER_BYTES, FrameSeal
from penstock.workers.transfer.messages import Abandon, Finish, Ping

A, B = b"a" * 16, b"b" * 16
BIG = 3 << 20


@pytest.fixture
def ends():
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    with left, right:
        yield left, right


def drain(writer: FrameWriter, reader: socket.socket) -> bytes:
    """Flush and read in turns until both are empty."""
    data = b""
    while True:
        try:
            writer.flush()
            done = True
        except BlockingIOError:
            done = False
        try:
            while True:
                data += reader.recv(1 << 20)
        except BlockingIOError:
            if done:
                return data


def parse(data: bytes, opening: bytes):
    """(message, payload) of every frame."""
    assert data.startswith(opening)
    data, seal, frames = data[len(opening) :], FrameSeal(b"k", 1 << 30), []
    while data:
        header = seal.open_header(data[:HEADER_BYTES])
        body, end = HEADER_BYTES + header.body_frame_bytes, HEADER_BYTES + header.body_frame_bytes
        message = seal.open_body(header, data[HEADER_BYTES:body])
        frames.append((message, data[end : end + header.payload_bytes]))
        data = data[end + header.payload_bytes :]
    return frames


def test_frames_wait_for_the_seal_and_leave_in_order(ends):
    writer = FrameWriter(ends[0], b"opening")
    payload = bytes(range(256)) * (BIG // 256)
    writer.queue(Ping(), ())
    writer.queue(Finish(A, 1, (5,)), [memoryview(payload)[: BIG // 2], memoryview(payload)[BIG // 2 :]])
    writer.queue(Abandon(B, 1, "b"), ())
    assert writer.backlog == len("opening") + BIG
    assert drain(writer, ends[1]) == b"opening"
    assert not writer.busy
    writer.seal = FrameSeal(b"k", 1 << 30)
    frames = parse(drain(writer, ends[1]), b"")
    assert [message for message, _ in frames] == [Ping(), Finish(A, 1, (5,)), Abandon(B, 1, "b")]
    assert frames[1][1] == payload
    assert writer.backlog == 0


@pytest.mark.parametrize("before", [0, 40, HEADER_BYTES, 200, 1 << 20])
def test_scrub_keeps_the_framing_and_reads_nothing_more(ends, before):
    """The frame being sent is completed with zeros from wherever it stood; queued ones of the session vanish."""
    writer = FrameWriter(ends[0], b"")
    writer.seal = FrameSeal(b"k", 1 << 30)
    payload = bytearray(b"\x01" * BIG)
    writer.queue(Finish(A, 1, (5,)), [memoryview(payload)])
    writer.queue(Finish(B, 1, (6,)), [memoryview(b"\x07" * 100)])
    writer.queue(Finish(A, 1, (7,)), [memoryview(payload)])
    writer._load()
    head = ends[0].send(b"".join(bytes(view) for view in writer._views)[:before])
    writer._advance(head)
    writer.scrub(A)
    payload[:] = b"\x02" * BIG  # the block is reused
    frames = parse(drain(writer, ends[1]), b"")
    assert [message for message, _ in frames] == [Finish(A, 1, (5,)), Finish(B, 1, (6,))]
    assert b"\x02" not in frames[0][1]
    assert len(frames[0][1]) == BIG
    assert frames[1][1] == b"\x07" * 100
    assert writer.backlog == 0


def test_scrub_of_another_session_changes_nothing(ends):
    writer = FrameWriter(ends[0], b"")
    writer.seal = FrameSeal(b"k", 1 << 30)
    writer.queue(Finish(A, 1, (5,)), [memoryview(b"\x01" * 100)])
    writer.scrub(B)
    assert parse(drain(writer, ends[1]), b"") == [(Finish(A, 1, (5,)), b"\x01" * 100)]


def test_clear(ends):
    writer = FrameWriter(ends[0], b"opening")
    writer.queue(Ping(), [memoryview(b"x")])
    writer.clear()
    assert not writer.busy
    assert writer.backlog == 0


def test_pass_views():
    views = [memoryview(b"abc"), memoryview(b""), memoryview(b"defg")]
    assert pass_views(views, 2) == 0
    assert [bytes(view) for view in views] == [b"c", b"", b"defg"]
    assert pass_views(views, 3) == 2
    assert [bytes(view) for view in views] == [b"fg"]
    assert pass_views(views, 2) == 1
    assert views == []
