"""Shared memory for steps: what is read is what was written, room is given back, and a reader that stalls is named."""

import os
import threading

import pytest

from penstock.workers.errors import ConfigError, GroupError, IntegrityError
from penstock.workers.parallel.step_ring import MAX_READERS, RingReader, RingWriter


def test_bodies_of_all_sizes_go_around() -> None:
    writer = RingWriter(4096, 2)
    readers = [RingReader(os.dup(writer.descriptor), number) for number in range(2)]
    for size in [1, 4096, 3000, 2000, 4095, 7, 1500] * 5:
        body = os.urandom(size)
        place = writer.write(body, 1.0)
        assert place % 4096 + size <= 4096
        for reader in readers:
            assert reader.read(place, size) == body


def test_a_reader_that_stalls_is_named() -> None:
    writer = RingWriter(4096, 2)
    readers = [RingReader(os.dup(writer.descriptor), number) for number in range(2)]
    place = writer.write(b"x" * 3000, 1.0)
    readers[0].read(place, 3000)
    with pytest.raises(GroupError, match="reader 1"):
        writer.write(b"y" * 3000, 0.05)


def test_nobody_waits_for_a_reader_that_is_gone() -> None:
    writer = RingWriter(4096, 2)
    readers = [RingReader(os.dup(writer.descriptor), number) for number in range(2)]
    place = writer.write(b"x" * 3000, 1.0)
    readers[0].read(place, 3000)
    leaving = threading.Timer(0.1, writer.leave_out, (1,))
    leaving.start()
    place = writer.write(b"y" * 3000, 5.0)  # waits until then
    leaving.join()
    assert readers[0].read(place, 3000) == b"y" * 3000


def test_places_outside_are_refused() -> None:
    writer = RingWriter(4096, 1)
    reader = RingReader(os.dup(writer.descriptor), 0)
    place = writer.write(b"x" * 100, 1.0)
    reader.read(place, 100)
    for at, size in ((place, 100), (4000, 200)):
        with pytest.raises(IntegrityError):
            reader.read(at, size)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="ranks on one host"):
        RingWriter(4096, MAX_READERS + 1)
    with pytest.raises(IntegrityError, match="5000 bytes for a ring of 4096"):
        RingWriter(4096, 1).write(b"x" * 5000, 0.1)
    empty = os.memfd_create("empty")  # the reader takes it over
    with pytest.raises(GroupError, match="ring of 0 bytes"):
        RingReader(empty, 0)


def test_nothing_is_left_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    writer = RingWriter(1 << 16, 1)
    reader = RingReader(os.dup(writer.descriptor), 0)
    reader.close()
    writer.close()
    writer.close()
    assert len(os.listdir("/proc/self/fd")) == before
