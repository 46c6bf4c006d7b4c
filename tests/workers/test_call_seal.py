"""Who does not know the cluster key opens no call, and nothing that was recorded opens or enters one again."""

from __future__ import annotations

import os

import pytest

from penstock.workers import call_seal
from penstock.workers.call_seal import NONCE_BYTES, CallGate, WorkerName, open_seals, prove
from penstock.workers.errors import WireError

KEY, NAME, METHOD = b"cluster key", WorkerName("decode-0", 3), "/penstock.Worker/Attach"


def answered(gate: CallGate, key: bytes = KEY) -> tuple[WorkerName, bytes]:
    nonce = os.urandom(NONCE_BYTES)
    name, shown, _ = prove(key, METHOD, nonce, gate.challenge(nonce))
    return name, shown


def test_both_ends_prove_themselves_and_agree_on_seals() -> None:
    gate, nonce = CallGate(KEY, NAME), os.urandom(NONCE_BYTES)
    name, shown, ours = prove(KEY, METHOD, nonce, gate.challenge(nonce))
    assert name == NAME
    theirs = gate.admit(METHOD, shown)
    assert theirs is not None
    for text in (b"", b"a", b"a" * 5000):
        assert theirs.to_worker.open(ours.to_worker.seal(text)) == text
        assert ours.to_router.open(theirs.to_router.seal(text)) == text


def test_credentials_open_one_call_of_one_method() -> None:
    gate = CallGate(KEY, NAME)
    _, shown = answered(gate)
    assert gate.admit("/penstock.Worker/Status", shown) is None
    assert gate.admit(METHOD, shown) is not None
    assert gate.admit(METHOD, shown) is None


@pytest.mark.parametrize("cut", [0, 1, 16, 47, 63])
def test_cut_and_damaged_credentials(cut: int) -> None:
    gate = CallGate(KEY, NAME)
    _, shown = answered(gate)
    assert gate.admit(METHOD, shown[:cut]) is None
    assert gate.admit(METHOD, shown[:cut] + bytes([shown[cut] ^ 1]) + shown[cut + 1 :]) is None
    assert gate.admit(METHOD, shown + b"x") is None
    assert gate.admit(METHOD, shown) is not None


def test_credentials_of_another_worker_or_life() -> None:
    _, shown = answered(CallGate(KEY, NAME))
    assert CallGate(KEY, NAME).admit(METHOD, shown) is None


def test_a_stranger_is_not_taken_for_a_worker() -> None:
    nonce = os.urandom(NONCE_BYTES)
    recorded = CallGate(KEY, NAME).challenge(nonce)
    for answer in (CallGate(b"guess", NAME).challenge(nonce), recorded[:-1] + b"1", b"", b"x" * 55):
        with pytest.raises(WireError):
            prove(KEY, METHOD, nonce, answer)
    with pytest.raises(WireError, match="wrong cluster key"):
        prove(KEY, METHOD, os.urandom(NONCE_BYTES), recorded)


def test_messages_keep_their_place_their_direction_and_their_stream() -> None:
    first, second = os.urandom(NONCE_BYTES), os.urandom(NONCE_BYTES)
    ours = open_seals(KEY, first, second)
    sealed = [ours.to_worker.seal(b"message %d" % number) for number in range(3)]
    for order in ([1], [0, 0], [0, 2], [0, 1, 1]):
        theirs = open_seals(KEY, first, second).to_worker
        for place in order[:-1]:
            theirs.open(sealed[place])
        with pytest.raises(WireError, match="out of its place"):
            theirs.open(sealed[order[-1]])
    for stranger in (open_seals(KEY, first, second).to_router, open_seals(KEY, second, first).to_worker):
        with pytest.raises(WireError):
            stranger.open(sealed[0])
    for damaged in (sealed[0][:-1], sealed[0][:31], b"", sealed[0][1:], sealed[0] + b"x"):
        with pytest.raises(WireError):
            open_seals(KEY, first, second).to_worker.open(damaged)


def test_unanswered_challenges_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_seal, "MAX_CHALLENGES", 100)
    gate = CallGate(KEY, NAME)
    _, oldest = answered(gate)
    for _ in range(100_000):
        gate.challenge(b"n" * NONCE_BYTES)
    assert len(gate._open) == 100
    assert gate.admit(METHOD, oldest) is None
    _, shown = answered(gate)
    assert gate.admit(METHOD, shown) is not None
