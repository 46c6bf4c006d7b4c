"""The ledger of a serving ingress joins what a reader got with what the router reports, and tells each difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from penstock.cluster.ledger.recorder import Ledger, followed
from penstock.router.emission import Delta
from penstock.router.journey import RequestReport
from penstock.router.trail import Trail
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import EndReason, FailureCode, GenerateRequest, SamplingParams

REQUEST = GenerateRequest("cmpl-1-0", (1, 2, 3), SamplingParams(max_tokens=4))
WHOLE = (Delta((5, 6), None, EndReason.NONE), Delta((7, 8), None, EndReason.LENGTH))


class Script:
    """A generation that gives these deltas, or raises, and a generator of it."""

    def __init__(self, said: Sequence[Delta | Exception]) -> None:
        self._said = list(said)
        self.cancelled = self.finished = False

    def submit(self, request: GenerateRequest) -> Script:
        return self

    def __aiter__(self) -> Script:
        return self

    async def __anext__(self) -> Delta:
        if not self._said:
            raise StopAsyncIteration
        said = self._said.pop(0)
        if isinstance(said, Exception):
            raise said
        return said

    def finish(self) -> None:
        self.finished = True

    def cancel(self) -> None:
        self.cancelled = True


class Stand:
    def __init__(self, share: float = 1.0) -> None:
        self.laws: list[str] = []
        self.now = 0.0
        self.ledger = Ledger(share, self.laws.append, lambda: self.now)

    def ask(self, *said: Delta | Exception, request: GenerateRequest = REQUEST):
        return followed(self.ledger, Script(said)).submit(request)

    def report(self, terminal: str = "completed", generated: int = 4, request_id: str = REQUEST.request_id) -> None:
        fields = {field.name: 0 for field in dataclasses.fields(RequestReport)}
        fields |= {"request_id": request_id, "terminal": terminal, "prompt_tokens": 3, "generated_tokens": generated}
        fields["trail"] = Trail()
        self.ledger.report(RequestReport(**fields))


async def read(generation) -> None:
    async for _ in generation:
        pass


@pytest.mark.parametrize("report_first", [True, False])
async def test_two_accounts_that_agree_are_no_violation(report_first: bool) -> None:
    stand = Stand()
    generation = stand.ask(*WHOLE)
    if report_first:
        stand.report()
    await read(generation)
    stand.report()
    assert stand.laws == []


async def test_a_reader_that_got_less_than_was_reported(caplog: pytest.LogCaptureFixture) -> None:
    stand = Stand()
    await read(stand.ask(WHOLE[1]))
    stand.report()
    assert set(stand.laws) == {"L2", "L6", "L7"}
    assert REQUEST.request_id in caplog.text
    assert "7, 8" not in caplog.text


async def test_an_error_is_reported_as_what_the_reader_saw() -> None:
    stand = Stand()
    with pytest.raises(RefusedError):
        await read(stand.ask(WHOLE[0], RefusedError(FailureCode.NO_WORKER, "nobody")))
    stand.report("no_worker", 2)
    assert stand.laws == []
    with pytest.raises(RefusedError):
        await read(stand.ask(RefusedError(FailureCode.NO_WORKER, "nobody")))
    stand.report()
    assert "L7" in stand.laws


async def test_a_reader_that_leaves_or_has_enough_is_lawful() -> None:
    stand = Stand()
    stand.ask().cancel()
    stand.report("cancelled", 1)
    generation = stand.ask(WHOLE[0])
    await anext(generation)
    generation.finish()
    generation.cancel()
    stand.report("completed", 3)
    assert stand.laws == []


async def test_one_that_is_taken_away_with_its_end_on_the_way_has_ended_once() -> None:
    """Cancelled by somebody else than its reader, who is told the end that was there already."""
    stand = Stand()
    generation = stand.ask(*WHOLE)
    await anext(generation)
    generation.cancel()
    await read(generation)
    assert (generation.entry.terminal, generation.entry.ends) == ("completed", 1)
    stand.report()
    assert stand.laws == []


async def test_one_account_alone_is_told_after_a_while() -> None:
    stand = Stand()
    await read(stand.ask(*WHOLE))
    kept = stand.ask(request=dataclasses.replace(REQUEST, request_id="cmpl-2-0"))
    stand.report(request_id="cmpl-2-0")
    stand.now = 61.0
    stand.report(request_id="cmpl-3-0")
    assert stand.laws == ["L7", "L1"]
    assert kept.entry.terminal == "pending"


async def test_who_is_not_sampled_is_not_followed() -> None:
    stand = Stand(share=1e-9)
    generation = stand.ask(*WHOLE)
    assert isinstance(generation, Script)
    stand.report()
    assert stand.laws == []
    script = Script(())
    assert followed(None, script) is script
