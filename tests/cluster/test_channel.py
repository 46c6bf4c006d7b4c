"""Channels over a fake link: what becomes an event, in which order, and what is left behind."""

import asyncio

from fakes.virtual_clock import run_virtual

from penstock.cluster.channel import Order, RequestChannel, Seat
from penstock.router.emission import Emission
from penstock.router.port import Ended, Event, FirstToken, Lost, TimedOut
from penstock.workers.protocol import (
    EndReason,
    Failed,
    FailureCode,
    Generate,
    GenerateRequest,
    Prefill,
    Reserve,
    SamplingParams,
    Started,
)

REQUEST = GenerateRequest("r", (1, 2, 3), SamplingParams(max_tokens=8))


class FakeLink:
    def __init__(self) -> None:
        self.seats: dict[int, Seat] = {}
        self.posted: list[Order] = []
        self.cancelled: list[int] = []
        self.next_slot = 0

    def occupy(self, seat: Seat) -> int:
        self.next_slot += 1
        self.seats[self.next_slot] = seat
        return self.next_slot

    def post(self, order: Order) -> None:
        self.posted.append(order)

    def vacate(self, seat: Seat, cancel: bool) -> None:
        if self.seats.pop(seat.slot, None) is not None and cancel:
            self.cancelled.append(seat.slot)


class FakeLinks:
    def __init__(self, *worker_ids: str) -> None:
        self.links = {worker_id: FakeLink() for worker_id in worker_ids}

    def post_to(self, worker_id: str) -> FakeLink | None:
        return self.links.get(worker_id)

    def open(self) -> RequestChannel:
        emission = Emission.for_request(REQUEST)
        emission.begin_attempt(1)
        return RequestChannel(self, emission)


def split(links: FakeLinks) -> tuple[RequestChannel, Seat, Seat]:
    """A channel with an attempt split over p and d."""
    channel = links.open()
    channel.reserve("d", 1, REQUEST)
    channel.prefill("p", 1, REQUEST, None)
    return channel, links.links["p"].seats[1], links.links["d"].seats[1]


async def drain(channel: RequestChannel) -> list[tuple[str, type]]:
    found = []
    while not isinstance((event := await channel.next_event(0.01)).body, TimedOut):
        found.append((event.worker_id, type(event.body)))
    return found


def test_orders_carry_slot_and_attempt() -> None:
    links = FakeLinks("p", "d", "m")
    channel, prefill, reserve = split(links)
    channel.generate("m", 2, REQUEST)
    assert links.links["d"].posted == [Reserve(reserve.slot, 1, REQUEST)]
    assert links.links["p"].posted == [Prefill(prefill.slot, 1, REQUEST, None)]
    assert links.links["m"].posted == [Generate(1, 2, REQUEST)]


def test_a_split_request_tells_first_token_and_one_end() -> None:
    async def scenario() -> None:
        links = FakeLinks("p", "d")
        channel, prefill, reserve = split(links)
        prefill.apply(0, [10], EndReason.NONE)
        reserve.apply(1, [11, 12], EndReason.NONE)
        reserve.apply(3, [13], EndReason.LENGTH)
        reserve.apply(3, [13], EndReason.LENGTH)  # twice from the wire
        assert await drain(channel) == [("p", FirstToken), ("d", Ended)]
        assert channel.emission.take().tokens == (10, 11, 12, 13)
        channel.close()
        assert links.links["p"].cancelled == links.links["d"].cancelled == []
        assert not links.links["p"].seats
        assert not links.links["d"].seats

    run_virtual(scenario())


def test_the_end_is_told_when_the_gap_before_it_is_closed() -> None:
    async def scenario() -> None:
        links = FakeLinks("p", "d")
        channel, prefill, reserve = split(links)
        reserve.apply(1, [11], EndReason.STOP)
        assert await drain(channel) == []
        prefill.apply(0, [10], EndReason.NONE)
        assert await drain(channel) == [("p", FirstToken), ("p", Ended)]
        assert channel.emission.take().tokens == (10, 11)

    run_virtual(scenario())


def test_cancel_tells_the_worker_and_drops_what_it_said() -> None:
    async def scenario() -> None:
        links = FakeLinks("p", "d")
        channel, prefill, reserve = split(links)
        prefill.answer(Started(prefill.slot, 1, 0))
        reserve.answer(Started(reserve.slot, 1, 0))
        channel.cancel("p")
        assert links.links["p"].cancelled == [prefill.slot]
        assert await drain(channel) == [("d", Started)]
        channel.cancel("p")
        assert links.links["p"].cancelled == [prefill.slot]

    run_virtual(scenario())


def test_close_cancels_only_where_something_may_still_run() -> None:
    links = FakeLinks("p", "d", "m")
    channel, prefill, reserve = split(links)
    channel.generate("m", 1, REQUEST)
    prefill.answer(Failed(prefill.slot, 1, FailureCode.INTERNAL, "x"))
    channel.close()
    assert links.links["p"].cancelled == []
    assert links.links["d"].cancelled == [reserve.slot]
    assert links.links["m"].cancelled == [1]
    assert not any(link.seats for link in links.links.values())


def test_an_unknown_worker_is_lost_and_so_is_one_whose_stream_breaks() -> None:
    async def scenario() -> None:
        links = FakeLinks("d")
        channel = links.open()
        channel.generate("gone", 1, REQUEST)
        assert await channel.next_event(1.0) == Event("gone", 1, Lost("no stream to the worker"))
        channel.reserve("d", 1, REQUEST)
        links.links["d"].seats.pop(1).lost("broken")
        assert await channel.next_event(1.0) == Event("d", 1, Lost("broken"))
        channel.close()
        assert links.links["d"].cancelled == []

    run_virtual(scenario())


def test_waiting_ends_with_the_event_or_the_time() -> None:
    async def scenario() -> None:
        links = FakeLinks("m")
        channel = links.open()
        loop = asyncio.get_running_loop()
        channel.generate("m", 1, REQUEST)
        loop.call_later(2.0, links.links["m"].seats[1].answer, Started(1, 1, 5))
        assert isinstance((await channel.next_event(None)).body, Started)
        assert loop.time() == 2.0
        assert isinstance((await channel.next_event(3.0)).body, TimedOut)
        assert loop.time() == 5.0

    run_virtual(scenario())


def test_after_close_nothing_is_sent_or_told() -> None:
    async def scenario() -> None:
        links = FakeLinks("m")
        channel = links.open()
        channel.generate("m", 1, REQUEST)
        seat = links.links["m"].seats[1]
        channel.close()
        seat.apply(0, [1], EndReason.STOP)
        channel.generate("m", 2, REQUEST)
        assert await drain(channel) == []
        assert len(links.links["m"].posted) == 1

    run_virtual(scenario())
