"""The step loop with a real scheduler, the oracle and a transfer that moves only when told: texts, failures, leases."""

import dataclasses
import threading
from typing import Any

import pytest
from fakes.engine_bench import VOCAB, Bench, answer, request
from fakes.loopback_transfer import LoopbackFabric

from penstock.router.logprobs import PromptScores
from penstock.workers import inbox as inbox_module
from penstock.workers.engine import Engine, EngineParts
from penstock.workers.errors import BanksLostError, DeviceError, ExpertsGoneError
from penstock.workers.inbox import Attached, Detached, Drain
from penstock.workers.kv_feed import KVEventFeed
from penstock.workers.oracle import expected_embedding
from penstock.workers.protocol import (
    Cancel,
    Embedding,
    EndReason,
    Failed,
    FailureCode,
    Generate,
    GenerateRequest,
    Granted,
    KeepAlive,
    KVEvents,
    KVSnapshot,
    Prefill,
    PromptLogprobs,
    Queued,
    RequestSnapshot,
    Reserve,
    SamplingParams,
    Started,
    TokenFrame,
)
from penstock.workers.scheduler.plan import StepPlan, StepResult


@pytest.fixture
def fabric() -> LoopbackFabric:
    return LoopbackFabric()


def test_generate_gives_the_oracles_text(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric, max_num_batched_tokens=16)
    asked = {slot: request(5 + 7 * slot, salt=slot) for slot in range(6)}
    for slot, each in asked.items():
        bench.post(Generate(slot, 1, each))
    bench.until_idle()
    for slot, each in asked.items():
        assert bench.told.text(slot) == (answer(each), EndReason.LENGTH)
    assert len(bench.told.of(Started)) == 6
    assert bench.all_free()


def test_a_text_goes_on_from_emitted_tokens_and_stops_at_stop_tokens(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    whole = answer(request(max_tokens=12))
    resumed = request(max_tokens=12)
    resumed = GenerateRequest("q", resumed.prompt, resumed.sampling, emitted=tuple(whole[:5]))
    bench.post(Generate(1, 2, resumed))
    bench.post(Generate(2, 1, request(max_tokens=12, stop_token_ids=(whole[3],))))
    bench.until_idle()
    text, end = bench.told.text(1, attempt=2)
    assert (text[5:], end) == (whole[5:], EndReason.LENGTH)
    assert bench.told.text(2) == (whole[:4], EndReason.STOP)


def test_logprobs_travel_with_the_rows_that_asked(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    bench.post(Generate(1, 1, request(salt=1, logprobs=2)))
    bench.post(Generate(2, 1, request(salt=2)))
    bench.until_idle()
    frame = next(frame for frame in bench.told.of(TokenFrame) if len(frame.slots) == 2)
    assert frame.top_counts.tolist() == [2, 0]
    assert frame.top_ids[0] == frame.tokens[0]
    assert (frame.logprobs[0] <= 0, bool(frame.logprobs[1] == frame.logprobs[1])) == (True, False)


def split(fabric: LoopbackFabric, asked: GenerateRequest, slot: int = 7) -> tuple[Bench, Bench]:
    """A prefill and a decode worker with the request granted and handed to prefill."""
    prefill, decode = Bench(fabric, "p", max_num_batched_tokens=8), Bench(fabric, "d")
    decode.post(Reserve(slot, 1, asked))
    decode.step()
    (granted,) = decode.told.of(Granted)
    prefill.post(Prefill(slot, 1, asked, granted.grant))
    return prefill, decode


def test_split_request_over_two_engines(fabric: LoopbackFabric) -> None:
    asked = request(21)
    prefill, decode = split(fabric, asked)
    prefill.until_idle()
    whole = answer(asked)
    assert prefill.told.text(7) == (whole[:1], EndReason.NONE)
    assert not prefill.all_free()  # a peer still reads its blocks
    decode.step()
    assert decode.told.text(7)[0] == []
    fabric.pump()
    prefill.step()
    decode.until_idle()
    text, end = decode.told.text(7)
    assert (text[1:], end) == (whole[1:], EndReason.LENGTH)
    assert prefill.all_free()
    assert decode.all_free()
    assert decode.engine.load().transfers == prefill.engine.load().transfers == 0


def test_a_foreign_block_changes_the_text(fabric: LoopbackFabric) -> None:
    """The test of the tests: the oracle does read the blocks."""
    asked = request(21)
    prefill, decode = split(fabric, asked)
    prefill.until_idle()
    fabric.pump()
    decode.step()
    (granted,) = decode.told.of(Granted)
    decode.storage.data[granted.grant.blocks[2], 0] ^= 1
    decode.until_idle()
    assert decode.told.text(7)[0][2:] != answer(asked)[2:]


def test_a_cached_prefix_on_decode_is_not_sent_again(fabric: LoopbackFabric) -> None:
    first, second = request(21), request(21)
    prefill, decode = split(fabric, first)
    prefill.until_idle()
    fabric.pump()
    decode.until_idle()
    decode.post(Reserve(8, 1, second))
    decode.step()
    grant = decode.told.of(Granted)[1].grant
    assert grant.first_block == 5
    assert len(grant.blocks) == 1
    prefill.post(Prefill(8, 1, second, grant))
    prefill.until_idle()
    fabric.pump()
    decode.until_idle()
    assert decode.told.text(8)[0][1:] == answer(second)[1:]


def test_a_request_that_ends_at_its_first_token_sends_nothing(fabric: LoopbackFabric) -> None:
    stop = answer(request(21))[0]
    asked = request(21, stop_token_ids=(stop,))
    prefill, decode = split(fabric, asked)
    prefill.until_idle()
    assert prefill.told.text(7) == ([stop], EndReason.STOP)
    prefill.step()
    decode.step()
    assert decode.told.of(Failed)[0].code is FailureCode.TRANSFER_FAILED
    assert prefill.all_free()
    assert decode.all_free()


def test_a_lost_transfer_fails_the_reservation_typed(fabric: LoopbackFabric) -> None:
    prefill, decode = split(fabric, request(21))
    prefill.until_idle()
    (session_id,) = decode.transfer.incoming
    decode.transfer.lose(session_id)
    decode.step()
    assert [failed.code for failed in decode.told.of(Failed)] == [FailureCode.TRANSFER_FAILED]
    assert decode.all_free()
    fabric.pump()  # the sender finds out
    prefill.step()
    assert prefill.all_free()
    assert not prefill.told.of(Failed)  # its part was done and reported


@pytest.mark.parametrize("steps_before", [0, 1, 2, 10])
def test_cancel_on_both_sides_frees_everything(fabric: LoopbackFabric, steps_before: int) -> None:
    prefill, decode = split(fabric, request(21))
    prefill.step(steps_before)
    prefill.post(Cancel(7, 1))
    decode.post(Cancel(7, 1))
    for _ in range(3):
        prefill.step()
        decode.step()
        fabric.pump()
    assert prefill.all_free()
    assert decode.all_free()
    assert not prefill.told.of(Failed)
    assert not decode.told.of(Failed)


def test_cancelled_reservation_is_quarantined_until_nobody_writes(fabric: LoopbackFabric) -> None:
    prefill, decode = split(fabric, request(21))
    decode.post(Cancel(7, 1))
    decode.step()
    decode.step()
    assert decode.all_free()  # forget was answered by IncomingClosed
    prefill.until_idle()
    fabric.pump()
    prefill.step()
    assert prefill.all_free()


def test_prefill_refuses_a_grant_of_another_layout(fabric: LoopbackFabric) -> None:
    prefill, decode = split(fabric, request(21))
    (granted,) = decode.told.of(Granted)
    import dataclasses

    other = dataclasses.replace(granted.grant, compatibility="other", session_id=b"x" * 16)
    prefill.post(Prefill(9, 1, request(21), other))
    prefill.post(Prefill(10, 1, request(21), granted.grant))
    prefill.step()
    codes = {failed.slot: failed.code for failed in prefill.told.of(Failed)}
    assert codes == {9: FailureCode.INCOMPATIBLE, 10: FailureCode.BAD_REQUEST}


def test_token_ids_beyond_the_vocabulary_are_refused(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    bad = GenerateRequest("q", (1, VOCAB, 2), SamplingParams(4))
    bench.post(Generate(1, 1, bad))
    bench.post(Generate(2, 1, request()))
    bench.until_idle()
    assert [(failed.slot, failed.code) for failed in bench.told.of(Failed)] == [(1, FailureCode.BAD_REQUEST)]
    assert bench.told.text(2)[0] == answer(request())


def test_waiting_requests_are_told_their_place(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric, max_num_seqs=1)
    for slot in (1, 2, 3):
        bench.post(Generate(slot, 1, request(salt=slot)))
    bench.until_idle()
    assert [(queued.slot, queued.position) for queued in bench.told.of(Queued)] == [(2, 0), (3, 1)]
    for slot in (1, 2, 3):
        assert bench.told.text(slot)[0] == answer(request(salt=slot))


def test_a_request_that_waited_in_the_inbox_for_too_long_is_not_begun(fabric: LoopbackFabric) -> None:
    """A step that took long lies between its coming and its being read."""
    bench = Bench(fabric, max_num_seqs=1)
    bench.post(Generate(1, 1, dataclasses.replace(request(), queue_timeout_s=1.0)))
    bench.post(Generate(2, 1, dataclasses.replace(request(salt=2), queue_timeout_s=9.0)))
    bench.now += 2.0
    bench.until_idle()
    assert [(failed.slot, failed.code) for failed in bench.told.of(Failed)] == [(1, FailureCode.DEADLINE)]
    assert bench.told.text(2)[0] == answer(request(salt=2))


def test_a_failing_step_costs_its_own_requests_only(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    bench.post(Generate(1, 1, request(salt=1)))
    bench.step(2)
    bench.runner.failures = [ValueError("broken kernel")]
    bench.step()
    assert [(failed.slot, failed.code) for failed in bench.told.of(Failed)] == [(1, FailureCode.INTERNAL)]
    assert "broken" not in bench.told.of(Failed)[0].message
    bench.post(Generate(2, 1, request(salt=2)))
    bench.until_idle()
    assert bench.told.text(2)[0] == answer(request(salt=2))
    assert bench.all_free()


def test_steps_that_keep_failing_end_the_engine(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    bench.runner.failures = [ValueError("broken")] * 5
    for slot in range(2):
        bench.post(Generate(slot, 1, request(salt=slot)))
        bench.step()
    bench.post(Generate(3, 1, request()))
    with pytest.raises(DeviceError, match="3 steps failed"):
        bench.step()


def test_a_device_error_ends_the_engine_at_once(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    bench.runner.failures = [DeviceError("gone")]
    bench.post(Generate(1, 1, request()))
    with pytest.raises(DeviceError, match="gone"):
        bench.step()


def test_a_router_that_does_not_renew_loses_its_work(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    bench.post(Attached(60.0), "other")
    bench.post(Generate(1, 1, request(max_tokens=100)))
    bench.post(Generate(1, 1, request(max_tokens=100, salt=1)), "other")
    bench.step(2)
    bench.now += 4
    bench.post(KeepAlive())
    bench.step()
    bench.now += 4
    bench.step()
    assert bench.told.cut_routers == []
    bench.now += 2
    bench.step()
    assert bench.told.cut_routers == ["r"]
    assert bench.scheduler.stats().running == 1
    bench.until_idle()
    assert bench.told.text(1, router_id="other")[0] == answer(request(max_tokens=100, salt=1))


def test_a_detached_router_loses_its_work_and_its_late_messages(fabric: LoopbackFabric) -> None:
    prefill, decode = split(fabric, request(21))
    prefill.step()
    for bench in (prefill, decode):
        bench.post(Detached())
        bench.post(Generate(1, 1, request()))
        bench.step(2)
        assert bench.all_free()
        assert not bench.told.of(Failed)


def test_prefix_cache_events_and_snapshot_agree(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    asked = request(21)
    bench.post(Generate(1, 1, asked))
    bench.until_idle()
    bench.post(RequestSnapshot())
    bench.step()
    events, (snapshot,) = bench.told.of(KVEvents), bench.told.of(KVSnapshot)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert snapshot.sequence == events[-1].sequence
    known = {snapshot.digests[i : i + 8] for i in range(0, len(snapshot.digests), 8)}
    stored = b"".join(event.stored for event in events)
    assert known == {stored[i : i + 8] for i in range(0, len(stored), 8)}
    assert {asked.prefix_digests[i : i + 8] for i in range(0, 160, 32)} <= known


def test_draining_refuses_new_work_and_ends_when_the_old_is_done(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    bench.post(Generate(1, 1, request()))
    bench.post(Drain(), "")
    bench.post(Generate(2, 1, request(salt=2)))
    bench.step()
    assert not bench.engine.drained
    assert [(failed.slot, failed.code) for failed in bench.told.of(Failed)] == [(2, FailureCode.DRAINING)]
    bench.until_idle()
    assert bench.engine.drained
    assert bench.told.text(1)[0] == answer(request())
    assert bench.engine.load().draining


def test_the_heartbeat_shows_a_stuck_step(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    inner = bench.runner.run
    loads = []

    def slow(plan: StepPlan) -> StepResult:
        bench.now += 0.125
        loads.append(bench.engine.load())
        return inner(plan)

    bench.runner.run = slow  # type: ignore[method-assign]
    bench.post(Generate(1, 1, request(max_tokens=20)))
    bench.step(12)
    assert [load.step_age_s for load in loads] == [0.125] * 12
    assert [load.step for load in loads] == list(range(1, 13))
    assert loads[11].predicted_step_s == pytest.approx(0.125)
    assert bench.engine.load().step_age_s == 0.0


def test_a_full_inbox_refuses_requests_but_not_cancels(fabric: LoopbackFabric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "MAX_INBOX", 3)
    bench = Bench(fabric)
    assert [bench.engine.post("r", Generate(slot, 1, request(salt=slot))) for slot in range(3)] == [True, True, False]
    assert bench.engine.post("r", Cancel(1, 1))


def test_the_loop_sleeps_when_idle_and_wakes_for_a_message(fabric: LoopbackFabric) -> None:
    import time

    bench = Bench(fabric)
    bench.engine = Engine(
        EngineParts(bench.scheduler, bench.runner, bench.handover, KVEventFeed(None, bench.told), bench.told),
        time.monotonic,
        bench.awake,
    )
    thread = threading.Thread(target=bench.engine.run)
    thread.start()
    bench.post(Attached(5.0))
    time.sleep(0.05)
    began = time.monotonic()
    bench.post(Generate(1, 1, request()))
    while bench.told.text(1)[1] is EndReason.NONE and time.monotonic() < began + 5:
        time.sleep(0.001)
    took = time.monotonic() - began
    bench.engine.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert bench.told.text(1)[0] == answer(request())
    assert took < 0.2


def place(bench: Bench, kind: type, key: tuple[int, int] = (1, 1)) -> list[int]:
    """Where messages of this kind about (slot, attempt) stand in what was told."""
    found = []
    for index, (_, message) in enumerate(bench.told.messages):
        if isinstance(message, TokenFrame):
            about = list(zip(message.slots.tolist(), message.attempts.tolist(), strict=True))
        else:
            about = [(getattr(message, "slot", -1), getattr(message, "attempt", -1))]
        if isinstance(message, kind) and key in about:
            found.append(index)
    return found


@pytest.mark.parametrize("split", [False, True])
def test_scores_and_embedding_are_told_before_the_first_token(fabric: LoopbackFabric, split: bool) -> None:
    bench = Bench(fabric, max_num_batched_tokens=8)
    asked = dataclasses.replace(request(30, 1 if split else 6, prompt_logprobs=2), embed=True)
    bench.post(Prefill(1, 1, asked, None) if split else Generate(1, 1, asked))
    bench.post(Generate(2, 1, request(21, 6, salt=3)))
    bench.until_idle()
    scores = PromptScores(30, 2)
    for message in bench.told.of(PromptLogprobs):
        assert scores.apply(message)
    assert scores.complete
    assert [score.top[0][0] for score in scores.read()[1:] if score] == list(asked.prompt[1:])
    assert len(bench.told.of(PromptLogprobs)) > 2
    (embedding,) = bench.told.of(Embedding)
    assert embedding.values.tolist() == expected_embedding(asked.prompt).tolist()
    told = place(bench, Started) + place(bench, PromptLogprobs) + place(bench, Embedding)
    assert told == sorted(told)
    assert told[-1] < place(bench, TokenFrame)[0]
    assert bench.told.text(1) == (answer(asked), EndReason.LENGTH)
    assert bench.all_free()


@pytest.mark.parametrize(
    "wish", [{"logit_bias": ((VOCAB, 1.0),)}, {"allowed_token_ids": (VOCAB,)}, {"bad_words": ((1, VOCAB),)}]
)
def test_a_token_that_the_model_lacks_costs_its_own_request_only(fabric: LoopbackFabric, wish: dict[str, Any]) -> None:
    bench = Bench(fabric)
    bench.post(Generate(1, 1, request(**wish)))
    bench.post(Generate(2, 1, request(salt=2)))
    bench.until_idle()
    (failed,) = bench.told.of(Failed)
    assert (failed.slot, failed.code) == (1, FailureCode.BAD_REQUEST)
    assert next(iter(wish)) in failed.message
    assert bench.told.text(2) == (answer(request(salt=2)), EndReason.LENGTH)


def test_min_tokens_holds_for_the_oracle_too(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    plain = answer(request(max_tokens=8))
    asked = request(max_tokens=8, stop_token_ids=(plain[1], plain[5]), min_tokens=3)
    bench.post(Generate(1, 1, asked))
    bench.until_idle()
    assert bench.told.text(1) == (plain[:6], EndReason.STOP)
    assert answer(asked) == plain[:6]


def test_idle_moments_are_used_for_preparation_and_work_comes_first(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    left, seen = [3], []

    def prepare() -> bool:
        stats = bench.scheduler.stats()
        seen.append(stats.running + stats.waiting)
        if left[0] == 0:
            bench.engine.stop()
            return False
        left[0] -= 1
        return True

    bench.engine._prepare = prepare
    bench.post(Generate(1, 1, request(max_tokens=5)))
    bench.engine.run()
    assert bench.told.text(1)[1] is EndReason.LENGTH
    assert seen == [0, 0, 0, 0]  # never beside running work, and until there is none left


def test_sequences_whose_bank_is_lost_go_on_in_another(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric, banks=2)
    asked = {slot: request(9, max_tokens=12, salt=slot) for slot in range(4)}
    for slot, each in asked.items():
        bench.post(Generate(slot, 1, each))
    bench.step(3)
    bench.runner.failures = [BanksLostError("rank 1 is gone", (1,))]
    bench.until_idle()
    for slot, each in asked.items():
        assert bench.told.text(slot) == (answer(each), EndReason.LENGTH)
    assert bench.told.of(Failed) == []
    load = bench.engine.load()
    assert (load.free_blocks, load.totals.blocks_lost, load.preemptions) == (32, 32, 2)


def test_a_bank_that_is_lost_while_nothing_runs_takes_no_more(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric, banks=2)
    bench.post(Reserve(1, 1, request(9, salt=1)))
    bench.post(Reserve(2, 1, request(9, salt=2)))
    bench.step()
    assert len(bench.told.of(Granted)) == 2
    bench.idle = [BanksLostError("rank 1 is gone", (1,))]
    bench.run_until(lambda: bench.engine.load().totals.blocks_lost == 32)
    (failed,) = bench.told.of(Failed)  # the one whose blocks a peer was to write there
    assert failed.code is FailureCode.TRANSFER_FAILED
    bench.scheduler.check_integrity()


def test_experts_that_stay_gone_are_named_to_whom_they_fail(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric)
    bench.post(Generate(1, 1, request()))
    bench.runner.failures = [ExpertsGoneError("nobody can refill layer 0: experts 4, 5", ((0, 4), (0, 5)))]
    bench.step()
    (failed,) = bench.told.of(Failed)
    assert (failed.code, failed.message) == (FailureCode.INTERNAL, "nobody can refill layer 0: experts 4, 5")
    assert bench.all_free()
