"""Every message comes back equal from its bytes; anything else is a WireError."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import WireError
from penstock.workers.transfer import messages
from penstock.workers.transfer.messages import (
    CODES,
    MAX_OFFER_ENTRIES,
    OFFER_DTYPE,
    Abandon,
    Ack,
    Finish,
    Goodbye,
    Hello,
    Missing,
    Offer,
    Open,
    Ping,
    Pong,
    Reject,
    Welcome,
    decode_body,
    encode_body,
    session_of,
)

SESSIONS = st.binary(min_size=16, max_size=16)
EPOCHS = st.integers(0, 2**64 - 1)
TEXTS = st.text(max_size=200)
NUMBERS = st.lists(st.integers(0, 2**31 - 1), max_size=50).map(tuple)
COUNTS = st.integers(0, 2**63 - 1)
MESSAGES = st.one_of(
    st.builds(Hello, TEXTS, TEXTS, TEXTS, TEXTS, COUNTS, COUNTS),
    st.builds(Welcome, st.booleans()),
    st.builds(Goodbye, TEXTS),
    st.builds(Open, SESSIONS, EPOCHS),
    st.builds(Finish, SESSIONS, EPOCHS, NUMBERS),
    st.builds(Abandon, SESSIONS, EPOCHS, TEXTS),
    st.just(Ping()),
    st.just(Pong()),
    st.builds(Ack, SESSIONS, EPOCHS),
    st.builds(Missing, SESSIONS, EPOCHS, NUMBERS),
    st.builds(Reject, SESSIONS, EPOCHS, TEXTS),
)


def again(message):
    return decode_body(CODES[type(message)], *session_of(message), encode_body(message))


@settings(deadline=None, max_examples=200)
@given(MESSAGES)
def test_round_trip(message):
    assert again(message) == message


@settings(deadline=None, max_examples=50)
@given(SESSIONS, EPOCHS, st.booleans(), st.binary(min_size=36, max_size=36 * 20))
def test_offer_round_trip(session_id, epoch, inline, raw):
    entries = np.frombuffer(raw[: len(raw) // 36 * 36], OFFER_DTYPE)
    back = again(Offer(session_id, epoch, inline, entries))
    assert (back.session_id, back.epoch, back.inline) == (session_id, epoch, inline)
    assert np.array_equal(back.entries, entries)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 255), st.binary(max_size=200))
def test_garbage_is_a_wire_error_or_a_message(code, body):
    try:
        message = decode_body(code, b"s" * 16, 1, body)
    except WireError:
        return
    assert CODES[type(message)] == code


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        (2, [1]),
        (2, [True, True]),
        (2, []),
        (1, ["a", "b", "c", "d", -1, 2]),
        (1, ["a", "b", "c", 4, 1, 2]),
        (6, [b"123"]),
        (5, [True, b""]),
        (5, [True, b"x" * 35]),
        (5, [True, bytes(36 * (MAX_OFFER_ENTRIES + 1))]),
        (3, ["x" * 5000]),
        (3, [{"a": 1}]),
        (13, []),
    ],
)
def test_wrong_fields(code, fields):
    with pytest.raises(WireError, match=f"{code}"):
        decode_body(code, b"s" * 16, 1, msgpack.packb(fields))


def test_long_reasons_are_cut_to_what_a_reader_takes():
    back = again(Reject(b"s" * 16, 1, "ü" * 100_000))
    assert 0 < len(back.reason.encode()) <= messages.MAX_TEXT


def test_every_message_has_its_own_code():
    assert len(set(CODES.values())) == len(CODES) == len(messages.Message.__args__)
