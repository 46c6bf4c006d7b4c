"""Frames are as large as settings and pool allow, and hold what the session offered, in its order."""

from __future__ import annotations

import dataclasses

import pytest
from fakes.opaque_pool import OpaquePool, staged
from fakes.transfer_pair import BLOCK_BYTES, NUM_BLOCKS, make_session

from penstock.workers.transfer import offering
from penstock.workers.transfer.offering import OfferMaker
from penstock.workers.transfer.outgoing import OutgoingSession


@pytest.fixture
def session(make_pair):
    pair = make_pair()
    _, grant = make_session(pair.target, tuple(range(8)), "127.0.0.1:1")
    session = OutgoingSession(grant)
    session.offer([(place, 20 - place) for place in range(8)])
    return pair.sender._endpoint, session


def test_frames_are_bounded(session, monkeypatch):
    endpoint, _ = session
    assert OfferMaker(endpoint, endpoint.storage).blocks_per_frame == {True: 1024, False: 1024}  # entries of an offer
    monkeypatch.setattr(offering, "DIGESTED_FRAME_BYTES", 3 * BLOCK_BYTES)
    monkeypatch.setattr(offering, "FRAME_BYTES", 5 * BLOCK_BYTES)
    auto = dataclasses.replace(endpoint, settings=dataclasses.replace(endpoint.settings, digest="auto"))
    assert OfferMaker(auto, auto.storage).blocks_per_frame == {True: 3, False: 5}
    narrow = dataclasses.replace(endpoint, storage=staged(OpaquePool(NUM_BLOCKS, BLOCK_BYTES), blocks=2))
    assert OfferMaker(narrow, narrow.storage).blocks_per_frame == {True: 2, False: 2}


def test_a_pool_without_room_puts_the_blocks_back(session):
    endpoint, outgoing = session
    storage = staged(OpaquePool(NUM_BLOCKS, BLOCK_BYTES), outgoing=2, blocks=2)
    offers = OfferMaker(dataclasses.replace(endpoint, storage=storage), storage)
    first = offers.next_reading(outgoing, inline=True)
    assert first.batch == [(0, 20), (1, 19)]
    assert outgoing.reading.batch == [(2, 18), (3, 17)]  # begun ahead, in the second buffer
    second = offers.next_reading(outgoing, inline=True)
    assert second.batch == [(2, 18), (3, 17)]
    assert offers.next_reading(outgoing, inline=True) is None
    first.release()
    assert offers.next_reading(outgoing, inline=True).batch == [(4, 16), (5, 15)]


def test_nothing_is_read_that_nobody_needs(session):
    endpoint, outgoing = session
    silent = dataclasses.replace(endpoint, settings=dataclasses.replace(endpoint.settings, digest="off"))
    offers = OfferMaker(silent, silent.storage)
    reading = offers.next_reading(outgoing, inline=False)
    assert reading.host is None
    assert not offers.offer(outgoing, reading, inline=False).entries["checked"].any()
