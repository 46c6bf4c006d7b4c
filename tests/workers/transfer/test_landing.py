"""Blocks out of a peer's segment: attached only when it is what it says, copied only while it is what was offered."""

from __future__ import annotations

import os

import numpy as np
import pytest
from fakes.transfer_pair import BLOCK_BYTES, NUM_BLOCKS

from penstock.workers.errors import WireError
from penstock.workers.transfer.incoming import IncomingSession
from penstock.workers.transfer.landing import BlockLanding, attach_segment, copy_blocks
from penstock.workers.transfer.messages import OFFER_DTYPE, Hello, Offer
from penstock.workers.transfer.port import Incoming


def hello(pair, **changes) -> Hello:
    fields = {"worker_id": "p", "compatibility": "same", "host_id": "here", "segment": pair.source.path}
    return Hello(**{**fields, "num_blocks": NUM_BLOCKS, "block_bytes": BLOCK_BYTES, **changes})


def landing_of(pair, sources, targets) -> BlockLanding:
    entries = np.zeros(len(sources), OFFER_DTYPE)
    entries["source_block"] = sources
    entries["source_generation"] = pair.source.generations[list(sources)]
    session = IncomingSession(Incoming(b"s" * 16, 1, tuple(targets), (0,) * len(targets), 1.0), 0.0)
    landing = BlockLanding(
        pair.receiver._endpoint, memoryview(bytearray(BLOCK_BYTES)), Offer(b"s" * 16, 1, False, entries), session
    )
    landing.targets = list(targets)
    return landing


def test_attach(make_pair):
    pair = make_pair(transport="auto")
    segment = attach_segment(pair.receiver._endpoint, hello(pair))
    assert np.array_equal(segment.data, pair.source.data)
    with pytest.raises(ValueError, match="read-only"):
        segment.data[0] = 1
    segment.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"host_id": "elsewhere"},
        {"segment": ""},
        {"segment": "/etc/passwd"},
        {"segment": "/proc/self/fd/0"},
        {"segment": "/proc/1/fd/../../../etc/passwd"},
        {"segment": f"/proc/{os.getpid()}/fd/99999"},
    ],
)
def test_no_segment(make_pair, changes):
    pair = make_pair(transport="auto")
    assert attach_segment(pair.receiver._endpoint, hello(pair, **changes)) is None


def test_a_file_that_is_no_storage(make_pair, tmp_path):
    pair = make_pair(transport="auto")
    with open(tmp_path / "f", "wb") as file:
        file.write(b"x" * 4096)
        file.flush()
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        assert attach_segment(pair.receiver._endpoint, hello(pair, segment=path)) is None


def test_a_storage_of_another_size(make_pair):
    pair = make_pair(transport="auto")
    with pytest.raises(WireError, match="not what it says"):
        attach_segment(pair.receiver._endpoint, hello(pair, num_blocks=NUM_BLOCKS + 1))


def test_tcp_only_does_not_attach(make_pair):
    pair = make_pair(transport="tcp")
    assert attach_segment(pair.receiver._endpoint, hello(pair)) is None


def test_copy(make_pair):
    pair = make_pair()
    landing = landing_of(pair, (3, 4, 5), (9, None, 7))
    before = pair.target.data.copy()
    verified = []
    assert copy_blocks(
        landing, pair.source, pair.target, lambda entry, block: verified.append((entry[2], block)) or True
    )
    assert verified == [(3, 9), (5, 7)]
    assert np.array_equal(pair.target.data[[9, 7]], pair.source.data[[3, 5]])
    untouched = [block for block in range(NUM_BLOCKS) if block not in (9, 7)]
    assert np.array_equal(pair.target.data[untouched], before[untouched])


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_source_that_was_reused(make_pair, when):
    pair = make_pair()
    landing = landing_of(pair, (3, 4), (9, 7))

    def reuse(*_):
        pair.source.generations[3] += 1
        return True

    if when == "before":
        reuse()
    assert not copy_blocks(landing, pair.source, pair.target, reuse)


def test_views_of_unwanted_entries_are_scratch(make_pair):
    pair = make_pair()
    landing = landing_of(pair, (3, 4), (9, None))
    views = landing.views()
    views[0][:] = b"\x01" * BLOCK_BYTES
    views[1][:] = b"\x02" * BLOCK_BYTES
    assert (pair.target.data[9] == 1).all()
    assert not (pair.target.data == 2).all(axis=1).any()
