"""The processor's digests are hashlib's; where it has no instructions, there are none."""

from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.workers.native import digests
from penstock.workers.native.digests import chain_of

FEATURES = set(Path("/proc/cpuinfo").read_text().split())


def by_hashlib(root: bytes, raw: bytes, width: int) -> bytes:
    digest, found = root, b""
    for start in range(0, len(raw) // width * width, width):
        digest = sha256(digest + raw[start : start + width]).digest()
        found += digest
    return found


@pytest.mark.skipif(digests.load() is None or "sha_ni" not in FEATURES, reason="no compiler, or no SHA instructions")
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=700), st.sampled_from([4, 16, 20, 24, 28, 64, 128]))
def test_they_are_those_of_hashlib(root, raw, width):
    assert chain_of(root, raw, width) == (by_hashlib(root, raw, width) or None)


def test_what_it_cannot_do_is_left_to_others(monkeypatch):
    assert chain_of(b"short", bytes(64), 64) is None
    assert chain_of(bytes(32), bytes(1 << 13), 1 << 13) is None
    monkeypatch.setattr(digests, "load", lambda: None)
    assert chain_of(bytes(32), bytes(64), 64) is None
