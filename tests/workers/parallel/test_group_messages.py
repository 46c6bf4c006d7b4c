"""Every message of a group comes back equal; what is none, or has a field of another kind, is refused by name."""

import dataclasses

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import WireError
from penstock.workers.parallel import group_messages as m

SESSION = b"0123456789abcdef"
MESSAGES = [
    m.Hello(3, 77, "host", True, '{"a": 1}'),
    m.Accepted(5, "host", "name", True),
    m.Refused("no", "group.rank"),
    m.StoreOpen("127.0.0.1:1"),
    m.Joined("revision 1", 12, "127.0.0.1:2"),
    m.Ready(12),
    m.Beat(3, 2, 9, True, 4, 0.5),
    m.RankFailed("ModelError", "bad", ""),
    m.Stop(True, None, ""),
    m.Stop(False, 2, "rank 2 is gone"),
    m.SessionOver(SESSION, "Arrived", "", ""),
    m.ExpectSession(0, SESSION, 3, (1, 2), (5, 2**63), 2.5),
    m.ForgetSession(SESSION),
    m.StartSession(0, SESSION, "d", 2, ("h:1", "h:2"), "host", 1, (4,), (1,), 2.0, "same"),
    m.OfferBlocks(SESSION, (0, 1), (7, 8)),
    m.FinishSession(SESSION, (42,)),
    m.AbandonSession(SESSION, "over"),
    m.MeetAgain(4),
    m.PumpExperts(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_back(message: m.GroupMessage) -> None:
    assert m.decode_message(m.encode_message(message)) == message


def test_all_kinds_are_covered() -> None:
    assert {type(message) for message in MESSAGES} | {m.BlocksRenewed, m.PutUpdate} == set(m._KINDS)


def test_updates_of_adapters_come_back() -> None:
    a, b = np.arange(8, dtype=np.uint8), np.arange(12, dtype=np.uint8)
    read = m.decode_message(m.encode_message(m.PutUpdate(3, 41, "q_proj", 2, 0.5, a, b)))
    assert isinstance(read, m.PutUpdate)
    assert (read.place, read.layer, read.projection, read.rank, read.scale) == (3, 41, "q_proj", 2, 0.5)
    assert (read.a.tolist(), read.b.tolist()) == (a.tolist(), b.tolist())


def test_renewed_blocks_come_back() -> None:
    blocks, generations = np.array([1, 9], np.uint32), np.array([4, 2**64 - 1], np.uint64)
    read = m.decode_message(m.encode_message(m.BlocksRenewed(blocks, generations)))
    assert isinstance(read, m.BlocksRenewed)
    assert read.blocks.tolist() == [1, 9]
    assert read.generations.tolist() == [4, 2**64 - 1]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (m.Ready(-1), "num_blocks"),
        (m.Beat(1, 1, busy_s=float("nan")), "busy_s"),
        (m.ForgetSession(b"short"), "session_id"),
        (m.Refused("x" * (1 << 17), ""), "message"),
        (m.OfferBlocks(SESSION, (1,), (1, 2)), "blocks"),
        (m.ExpectSession(0, SESSION, 1, (1,), (), 1.0), "generations"),
    ],
)
def test_wrong_fields_are_named(message: m.GroupMessage, field: str) -> None:
    with pytest.raises(WireError, match=field):
        m.decode_message(m.encode_message(message))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64) | st.lists(st.integers(0, 40) | st.binary(max_size=20), max_size=12).map(msgpack.packb))
def test_anything_else_is_no_message(data: bytes) -> None:
    try:
        message = m.decode_message(data)
    except WireError:
        return
    assert dataclasses.is_dataclass(message)
