"""Trace headers are read strictly, and ids of spans below are derived alike by everyone."""

from __future__ import annotations

import pytest

from penstock.workers.trace_context import TraceContext, is_trace_header, sampled_parent

GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_round_trip() -> None:
    parent = sampled_parent(GOOD)
    assert parent == TraceContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)
    assert parent is not None
    assert parent.header() == GOOD


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        GOOD[:-2] + "00",
        GOOD[:-2] + "02",
        GOOD.upper(),
        GOOD + "-x",
        GOOD + "\n",
        "ff" + GOOD[2:],
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        "٠٠-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ],
)
def test_what_is_no_sampled_parent(header: str) -> None:
    assert sampled_parent(header) is None


def test_an_unsampled_header_is_still_one() -> None:
    assert is_trace_header(GOOD[:-2] + "00")
    assert not is_trace_header("00-" + "0" * 32 + "-b7ad6b7169203331-01")


def test_children_differ_by_label_and_parent() -> None:
    parent, other = TraceContext(5, 6), TraceContext(5, 7)
    assert parent.child("a") == parent.child("a")
    ids = {parent.child("a").span_id, parent.child("b").span_id, other.child("a").span_id, parent.span_id}
    assert len(ids) == 4
    assert parent.child("a").trace_id == 5
