"""The step loop over a device that computes beside it: the next step is planned while one runs, and nothing changes."""

import dataclasses

import pytest
from fakes.engine_bench import Bench, answer, request
from fakes.loopback_transfer import LoopbackFabric

from penstock.workers.protocol import (
    Cancel,
    EndReason,
    Failed,
    Generate,
    Granted,
    Prefill,
    Reserve,
    SamplingParams,
    TokenFrame,
)


@pytest.fixture
def fabric() -> LoopbackFabric:
    return LoopbackFabric()


def test_texts_are_the_same_when_the_next_step_is_planned_while_one_runs(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric, late=True, reserve_tokens=0, num_blocks=40)
    requests = [request(8 + 3 * salt, max_tokens=5 + 7 * salt, salt=salt) for salt in range(7)]
    expected = [answer(each) for each in requests]
    stopping = request(9, max_tokens=20, salt=8)
    stop = answer(stopping)[6]
    requests.append(dataclasses.replace(stopping, sampling=SamplingParams(20, stop_token_ids=(stop,))))
    for slot, each in enumerate(requests):
        bench.post(Generate(slot, 1, each))
    bench.until_idle()
    assert bench.device.most_under_way == 2
    assert bench.scheduler.stats().preemptions > 0
    for slot, tokens in enumerate(expected):
        assert bench.told.text(slot) == (tokens, EndReason.LENGTH)
    text, end = bench.told.text(len(expected))
    assert (text[-1], end, len(text)) == (stop, EndReason.STOP, 7)
    assert bench.all_free()


def test_the_device_has_its_next_step_before_the_last_is_reported(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric, late=True)
    bench.post(Generate(1, 1, request(max_tokens=6)))
    for turn in range(5):
        bench.step()
        assert len(bench.told.of(TokenFrame)) == turn, "one step stays under way"
    assert bench.device.under_way == 1


def test_a_cancelled_row_keeps_its_blocks_until_the_device_is_done_with_it(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric, late=True)
    bench.post(Generate(1, 1, request(max_tokens=30)))
    bench.step(3)
    bench.post(Cancel(1, 1))
    bench.engine._take_inbox(bench.now)
    assert not bench.all_free()
    bench.step(2)
    assert bench.all_free()
    assert not bench.told.of(Failed)


@pytest.mark.parametrize("rounds", [2, 7])
def test_a_device_that_fails_costs_the_sequences_of_the_steps_under_way(fabric: LoopbackFabric, rounds: int) -> None:
    bench = Bench(fabric, late=True)
    bench.post(Generate(1, 1, request(max_tokens=20)))
    bench.step(rounds)
    bench.runner.failures.append(ValueError("no such thing"))
    bench.post(Generate(2, 1, request(max_tokens=4, salt=5)))
    bench.until_idle()
    failed = {message.slot for message in bench.told.of(Failed)}
    assert failed == {1, 2}, "the second was in the step that was fed by the failed one"
    bench.post(Generate(3, 1, request(max_tokens=4, salt=6)))
    bench.until_idle()
    assert bench.told.text(3) == (answer(request(max_tokens=4, salt=6)), EndReason.LENGTH)
    assert bench.all_free()


def test_steps_under_way_are_taken_in_when_the_loop_ends(fabric: LoopbackFabric) -> None:
    bench = Bench(fabric, late=True)
    bench.post(Generate(1, 1, request(max_tokens=20)))
    bench.step(3)
    bench.engine.stop()
    bench.engine.run()
    assert bench.device.under_way == 0
    assert len(bench.told.of(TokenFrame)) == 3


def test_a_split_request_planned_ahead_on_both_sides(fabric: LoopbackFabric) -> None:
    prefill, decode = Bench(fabric, "p", late=True), Bench(fabric, "d", late=True)
    wanted = request(23, max_tokens=9)
    decode.post(Reserve(4, 1, wanted))
    decode.step()
    (granted,) = decode.told.of(Granted)
    prefill.post(Prefill(7, 1, wanted, granted.grant))
    for _ in range(30):
        prefill.step()
        fabric.pump()
        decode.step()
    text, end = decode.told.text(4)
    first, _ = prefill.told.text(7)
    assert ([*first, *text[1:]], end) == (answer(wanted), EndReason.LENGTH)
    assert prefill.all_free()
    assert decode.all_free()
