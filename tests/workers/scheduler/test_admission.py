"""Requests that can never be served are refused at once, with the field at fault."""

import pytest
from fakes.scheduler_stand import make_request

from penstock.workers.kv.layout import KVLayout
from penstock.workers.protocol import FailureCode
from penstock.workers.scheduler.admission import MAX_STOP_IDS, growth_of, refusal, refusal_of_prefill
from penstock.workers.scheduler.events import Work

LAYOUT = KVLayout(1, 1, 1, 4, "float32")


@pytest.mark.parametrize(
    ("request_", "work", "code", "part"),
    [
        (make_request([], 4), Work.GENERATE, FailureCode.BAD_REQUEST, "prompt"),
        (make_request([1], 0), Work.GENERATE, FailureCode.BAD_REQUEST, "max_tokens"),
        (make_request([1], 2, emitted=(1, 2)), Work.RESERVE, FailureCode.BAD_REQUEST, "max_tokens"),
        (make_request([1], 2, stop=tuple(range(MAX_STOP_IDS + 1))), Work.GENERATE, FailureCode.BAD_REQUEST, "stop"),
        (make_request([1] * 60, 5), Work.GENERATE, FailureCode.TOO_LARGE, "model length"),
        (make_request([1] * 60, 5), Work.PREFILL, FailureCode.TOO_LARGE, "model length"),
        (make_request([1] * 40, 2), Work.GENERATE, FailureCode.TOO_LARGE, "blocks"),
        (make_request([1] * 20, 22), Work.RESERVE, FailureCode.TOO_LARGE, "blocks"),
    ],
)
def test_refusals(request_, work, code, part):
    reason = refusal(request_, work, 64, LAYOUT, 10)
    assert reason is not None
    assert reason[0] is code
    assert part in reason[1]


@pytest.mark.parametrize(
    ("request_", "work"),
    [
        (make_request([1] * 40, 1), Work.GENERATE),
        (make_request([1] * 20, 21), Work.RESERVE),
        (make_request([1] * 40, 24), Work.PREFILL),
        (make_request([1], 2, stop=tuple(range(MAX_STOP_IDS))), Work.GENERATE),
    ],
)
def test_what_just_fits(request_, work):
    assert refusal(request_, work, 64, LAYOUT, 10) is None


def test_prefill_only_refusals():
    request = make_request([1] * 8, 3)
    assert refusal_of_prefill(request, True, 2, LAYOUT) is None
    assert refusal_of_prefill(make_request([1], 1), False, 0, LAYOUT) is None
    for sends_kv, first in ((False, 0), (True, 3), (True, -1)):
        reason = refusal_of_prefill(request, sends_kv, first, LAYOUT)
        assert reason is not None
        assert reason[0] is FailureCode.BAD_REQUEST


def test_the_last_tokens_kv_is_never_computed():
    assert [growth_of(work, 5) for work in (Work.RESERVE, Work.GENERATE, Work.PREFILL)] == [4, 4, 0]
    assert growth_of(Work.GENERATE, 1) == 0
