"""Requests with an adapter wait for it and for a place, hold up nobody who needs neither, and cannot be kept out."""

from __future__ import annotations

import random
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fakes.scheduler_stand import Stand, make_request, make_stand

from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.errors import AdapterError, IntegrityError
from penstock.workers.protocol import FailureCode, GenerateRequest
from penstock.workers.scheduler.adapters import AdapterPlaces, LoadedAdapter
from penstock.workers.scheduler.events import PreemptedEvent, QueuedEvent, RefusedEvent, SequenceKey, Work


@dataclass(frozen=True)
class Loaded:
    revision: bytes


class ManualAdapters:
    """Loads at once, or when the test says so; remembers what stands in every place."""

    def __init__(self, num_places: int, at_once: bool = True) -> None:
        self.num_places = num_places
        self.at_once = at_once
        self.futures: dict[str, Future[LoadedAdapter]] = {}
        self.standing: dict[int, bytes] = {}
        self.puts = 0

    def begin(self, ref: AdapterRef) -> Future[LoadedAdapter]:
        future = self.futures[ref.name] = Future()
        if self.at_once:
            future.set_result(Loaded(ref.revision))
        return future

    def put(self, place: int, adapter: LoadedAdapter) -> None:
        assert 0 <= place < self.num_places
        self.standing[place] = adapter.revision
        self.puts += 1


def adapted(name: str, prompt: list[int] | None = None, max_tokens: int = 8, **changes: Any) -> GenerateRequest:
    ref = AdapterRef(name, name, name.encode().ljust(32))
    return make_request(prompt or [1, 2, 3], max_tokens, adapter=ref, **changes)


def rows_and_adapters(stand: Stand, adapters: ManualAdapters) -> dict[int, str | None]:
    """The next step's router slots, each with what stands in its row's place; the step is run."""
    plan = stand.scheduler.plan(0.0)
    assert plan is not None
    table = stand.scheduler._table
    slots = [table.sequence_in(row).key.slot for row in plan.slots.tolist()]
    places = plan.adapters.tolist() or [-1] * len(slots)
    found = {
        slot: None if place < 0 else adapters.standing[place].decode().strip()
        for slot, place in zip(slots, places, strict=True)
    }
    stand.scheduler.commit(plan, stand.runner.run(plan), 0.0)
    stand.take()
    stand.scheduler.check_integrity()
    return found


def test_every_row_of_a_step_names_the_place_of_its_own_adapter() -> None:
    adapters = ManualAdapters(2)
    stand = make_stand(adapters=adapters)
    for slot, name in enumerate(("a", "", "b", "a")):
        request = adapted(name, [slot + 1, 2, 3]) if name else make_request([slot + 1, 2, 3])
        stand.submit(slot, Work.GENERATE, request)
    for _ in range(3):
        assert rows_and_adapters(stand, adapters) == {0: "a", 1: None, 2: "b", 3: "a"}
    stand.run()
    assert adapters.puts == 2
    stand.submit(9, Work.GENERATE, make_request([7, 8, 9], 2))
    plan = stand.scheduler.plan(0.0)
    assert plan is not None
    assert len(plan.adapters) == 0  # a step of the model alone pays nothing


def test_a_request_waits_for_its_adapter_and_nobody_waits_for_the_request() -> None:
    adapters = ManualAdapters(1, at_once=False)
    stand = make_stand(adapters=adapters)
    stand.submit(0, Work.GENERATE, adapted("a"))
    stand.submit(1, Work.GENERATE, make_request([4, 5, 6], 4))
    stand.run()
    assert (len(stand.tokens[1]), stand.tokens.get(0)) == (4, None)
    assert [event.key.slot for event in stand.events if isinstance(event, QueuedEvent)] == [0]
    adapters.futures["a"].set_result(Loaded(b"a" * 32))
    stand.run()
    assert len(stand.tokens[0]) == 8


def test_an_adapter_that_cannot_be_loaded_costs_its_own_request_only() -> None:
    adapters = ManualAdapters(1, at_once=False)
    stand = make_stand(adapters=adapters)
    stand.submit(0, Work.GENERATE, adapted("a"))
    stand.submit(1, Work.GENERATE, make_request([4, 5, 6], 4))
    adapters.futures["a"].set_exception(AdapterError("gone"))
    stand.run()
    refused = [event for event in stand.events if isinstance(event, RefusedEvent)]
    assert [(event.key.slot, event.code, event.message) for event in refused] == [(0, FailureCode.ADAPTER, "gone")]
    assert len(stand.tokens[1]) == 4


def test_a_worker_without_adapters_says_so() -> None:
    stand = make_stand()
    stand.submit(0, Work.GENERATE, adapted("a"))
    assert [event.code for event in stand.events if isinstance(event, RefusedEvent)] == [FailureCode.ADAPTER]


def test_who_waits_for_a_place_is_not_passed_by_its_rivals_and_the_model_alone_passes() -> None:
    """Two places, both always asked for: a third adapter's request is next as soon as one of them has drained."""
    adapters = ManualAdapters(2)
    stand = make_stand(adapters=adapters, max_num_seqs=8)
    stand.submit(0, Work.GENERATE, adapted("a", max_tokens=4))
    stand.submit(1, Work.GENERATE, adapted("b", max_tokens=20))
    stand.step()
    stand.submit(2, Work.GENERATE, adapted("c", max_tokens=4))
    for slot in range(3, 6):
        stand.submit(slot, Work.GENERATE, adapted("ab"[slot % 2], max_tokens=4))
    stand.submit(6, Work.GENERATE, make_request([4, 5], 2))
    assert set(rows_and_adapters(stand, adapters)) == {0, 1, 6}
    while 0 not in stand.ends:
        stand.step()
    assert rows_and_adapters(stand, adapters)[2] == "c"  # in the place of `a`, though others wait for `a`
    stand.run()
    assert set(stand.ends) | {6} == set(range(7))


def test_a_place_in_use_keeps_its_adapter_and_of_the_others_the_one_left_first_goes() -> None:
    adapters = ManualAdapters(3)
    places = AdapterPlaces(adapters)
    a, b, c, d = (Loaded(name) for name in (b"a", b"b", b"c", b"d"))
    held = {adapter.revision: places.take(adapter) for adapter in (a, b, c)}
    assert len(set(held.values())) == 3
    assert places.take(d) is None
    assert not places.has_room(d)
    places.leave(held[b"b"] or 0)
    places.leave(held[b"a"] or 0)
    assert places.take(b) == held[b"b"]  # back in use: it was still there
    assert adapters.puts == 3
    assert places.take(d) == held[b"a"]
    assert adapters.standing == {held[b"a"]: b"d", held[b"b"]: b"b", held[b"c"]: b"c"}
    with pytest.raises(KeyError):
        places.leave(77)


def test_a_sequence_that_gives_way_gives_its_place_back() -> None:
    adapters = ManualAdapters(1)
    stand = make_stand(adapters=adapters, num_blocks=6, max_model_len=24, reserve_tokens=0)
    stand.submit(0, Work.GENERATE, adapted("a", [1] * 6, 14))
    stand.submit(1, Work.GENERATE, make_request([2] * 6, 14))
    stand.run()
    assert any(isinstance(event, PreemptedEvent) for event in stand.events)
    assert {slot: len(tokens) for slot, tokens in stand.tokens.items()} == {0: 14, 1: 14}
    places = stand.scheduler._table.adapters.places
    assert places is not None
    assert places.holders == {}


@pytest.mark.parametrize("seed", range(6))
def test_at_random_every_request_ends_and_every_place_comes_back(seed: int) -> None:
    rng = random.Random(seed)
    adapters = ManualAdapters(rng.randint(1, 3), at_once=False)
    stand = make_stand(adapters=adapters, num_blocks=24, max_model_len=32, reserve_tokens=rng.choice((0, 8)))
    open_keys: dict[int, SequenceKey] = {}
    wanted: dict[int, str] = {}
    for slot in range(120):
        name = rng.choice(("", "a", "b", "c", "d", "e"))
        prompt = [rng.randrange(1, 50) for _ in range(rng.randint(1, 12))]
        tokens = rng.randint(1, 12)
        wanted[slot] = name
        open_keys[slot] = stand.submit(
            slot, Work.GENERATE, adapted(name, prompt, tokens) if name else make_request(prompt, tokens)
        )
        if name and rng.random() < 0.9:
            adapters.futures[name].set_result(Loaded(name.encode().ljust(32)))
        elif name:
            adapters.futures[name].set_exception(AdapterError("no"))
        if rng.random() < 0.15:
            gone = rng.choice(list(open_keys))
            stand.scheduler.cancel(open_keys.pop(gone), 0.0)
        for _ in range(rng.randint(0, 3)):
            plan = stand.scheduler.plan(0.0)
            if plan is None:
                break
            _check_places(stand, adapters, plan, wanted)
            stand.scheduler.commit(plan, stand.runner.run(plan), 0.0)
            stand.scheduler.check_integrity()
    stand.run(2000)
    assert stand.scheduler.stats().running + stand.scheduler.stats().waiting == 0
    places = stand.scheduler._table.adapters.places
    assert places is not None
    assert places.holders == {}
    assert adapters.puts > adapters.num_places


def _check_places(stand: Stand, adapters: ManualAdapters, plan: Any, wanted: dict[int, str]) -> None:
    places = plan.adapters if len(plan.adapters) else np.full(len(plan.slots), -1)
    for row, place in zip(plan.slots.tolist(), places.tolist(), strict=True):
        name = wanted[stand.scheduler._table.sequence_in(row).key.slot]
        assert (adapters.standing[place].decode().strip() if place >= 0 else "") == name


def test_a_row_without_a_place_is_a_defect() -> None:
    stand = make_stand(adapters=ManualAdapters(1))
    rows = stand.scheduler._table.adapters
    rows.fill(0, Loaded(b"a" * 32))
    with pytest.raises(IntegrityError, match="without a place"):
        rows.fill(1, Loaded(b"b" * 32))
    rows._place_of[3] = 0
    with pytest.raises(IntegrityError, match="rows have an adapter"):
        rows.check()
