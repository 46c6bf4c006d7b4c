"""Blocks out of a peer's segment: attached only when it is what it says, copied only while it is what was offered."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from fakes.hostile_link import HostileChannel
from fakes.transfer_pair import BLOCK_BYTES, NUM_BLOCKS
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import WireError
from penstock.workers.transfer.head_slices import ALONE
from penstock.workers.transfer.incoming import IncomingSession
from penstock.workers.transfer.landing import BlockLanding, attach_segment, copy_blocks, copy_runs
from penstock.workers.transfer.messages import OFFER_DTYPE, Hello, Offer
from penstock.workers.transfer.port import Incoming


def hello(pair, **changes) -> Hello:
    fields = {"worker_id": "p", "compatibility": "same", "host_id": "here", "segment": pair.source.path}
    return Hello(**{**fields, "num_blocks": NUM_BLOCKS, "block_bytes": BLOCK_BYTES, **changes})


def landing_of(pair, sources, targets, checked=0) -> BlockLanding:
    entries = np.zeros(len(sources), OFFER_DTYPE)
    entries["source_block"], entries["checked"] = sources, checked
    entries["source_generation"] = pair.source.generations[list(sources)]
    session = IncomingSession(Incoming(b"s" * 16, 1, (0,) * len(targets), (0,) * len(targets), 1.0), 0.0)
    host = pair.target.land([target for target in targets if target is not None])
    offer = Offer(b"s" * 16, 1, False, entries)
    delivery = session.delivery(HostileChannel(), 1, ALONE.heads, 0.0)
    return BlockLanding(offer, delivery, list(targets), host, memoryview(bytearray(BLOCK_BYTES)))


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


@pytest.mark.parametrize("checked", [0, 1])
def test_copy(make_pair, checked):
    pair = make_pair()
    landing = landing_of(pair, (3, 4, 5), (9, None, 7), checked)
    before = pair.target.data.copy()
    verified = []
    assert copy_blocks(landing, pair.source, lambda entry, block: verified.append((entry[2], bytes(block))) or True)
    assert verified == [(number, pair.source.data[number].tobytes()) for number in (3, 5)]
    assert np.array_equal(pair.target.data[[9, 7]], pair.source.data[[3, 5]])
    untouched = [block for block in range(NUM_BLOCKS) if block not in (9, 7)]
    assert np.array_equal(pair.target.data[untouched], before[untouched])


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_source_that_was_reused(make_pair, when):
    pair = make_pair()
    landing = landing_of(pair, (3, 4), (9, 7), checked=1)

    def reuse(*_):
        pair.source.generations[3] += 1
        return True

    if when == "before":
        reuse()
    assert not copy_blocks(landing, pair.source, reuse)


def test_views_of_unwanted_entries_are_scratch(make_pair):
    pair = make_pair()
    landing = landing_of(pair, (3, 4), (9, None))
    views = landing.views()
    views[0][:] = b"\x01" * BLOCK_BYTES
    views[1][:] = b"\x02" * BLOCK_BYTES
    assert (pair.target.data[9] == 1).all()
    assert not (pair.target.data == 2).all(axis=1).any()


def test_views_of_neighbours_are_one(make_pair):
    pair = make_pair()
    landing = landing_of(pair, (3, 4, 5), (9, 10, 2))
    assert [len(view) for view in landing.views()] == [2 * BLOCK_BYTES, BLOCK_BYTES]


@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.integers(0, 5), max_size=8))
@settings(deadline=None, max_examples=200)
def test_runs_of_any_sizes_are_copied_in_order(sources, targets):
    size = min(sum(sources), sum(targets))
    content = np.arange(1, 200, dtype=np.uint8)
    source, target = memoryview(content[: sum(sources)]), memoryview(bytearray(sum(targets)))
    cut = _cut(source, sources)
    if sum(targets) < sum(sources):
        cut = _cut(source[:size], _prefix(sources, size))
    copy_runs(_cut(target, targets), cut)
    assert bytes(target[:size]) == content[:size].tobytes()
    assert not any(target[size:])


def _cut(whole, sizes):
    ends = np.cumsum([0, *sizes]).tolist()
    return [whole[start:end] for start, end in itertools.pairwise(ends)]


def _prefix(sizes, total):
    ends = [min(end, total) for end in np.cumsum([0, *sizes]).tolist()]
    return [end - start for start, end in itertools.pairwise(ends)]
