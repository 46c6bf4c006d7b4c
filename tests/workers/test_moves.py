"""Moves between engines whatever meets them: no block is lost on either side, and every text stays the oracle's.

Three engines over a transfer that does what the test says. What a router does is done here by messages, into its own
`Emission`.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from fakes.engine_bench import Bench, answer, request
from fakes.loopback_transfer import LoopbackFabric

from penstock.router.emission import Emission
from penstock.workers.protocol import Cancel, Failed, Generate, Granted, Move, Reserve, Stays, TokenFrame, ToRouter

STREAMS = 6
TOKENS = 48
BLOCKS = 44  # of one engine: too few for half of the streams and what is reserved for moves


class Stream:
    """One request: where it runs, and where it may be going."""

    def __init__(self, number: int, at: Bench, happened: Counter[str]) -> None:
        self.request = request(9 + number, TOKENS, salt=number)
        self.slot = number + 1
        self.at, self.attempt, self.issued = at, 1, 1
        self.target: Bench | None = None
        self.sent = False  # the source was told
        self.emitted = 0  # tokens that the target's request has
        self.emission = Emission(TOKENS)
        self.emission.begin_attempt(1)
        self._happened = happened
        at.post(Generate(self.slot, 1, self.request))

    def begin(self, target: Bench) -> None:
        """As the router does for a stream that is asked to leave."""
        if self.target is not None or self.emission.ended or not self.emission.count:
            return
        self.issued += 1
        self.target, self.sent, self.emitted = target, False, self.emission.count
        self.emission.expect_successor(self.issued, self._taken_over)
        resumed = replace(self.request, emitted=tuple(self.emission.tokens))
        target.post(Reserve(self.slot, self.issued, resumed, takes_over=True))

    def give_up(self, why: str) -> None:
        if self.target is not None:
            self.target.post(Cancel(self.slot, self.issued))
            self.target = None
            self.emission.forget_successor()
            self._happened[why] += 1

    def hear(self, bench: Bench, message: ToRouter) -> None:
        if isinstance(message, TokenFrame):
            self._take(message)
        elif not isinstance(message, Granted | Failed | Stays) or message.slot != self.slot:
            return
        elif bench is self.target and message.attempt == self.issued:
            if isinstance(message, Granted):
                self.sent = True
                self.at.post(Move(self.slot, self.attempt, message.grant, self.emitted))
            elif not self.sent:
                self.give_up("refused")
        elif bench is self.at and message.attempt == self.attempt:
            assert isinstance(message, Stays), "the source of a move has lost the sequence"
            self.give_up("stayed")

    def _take(self, frame: TokenFrame) -> None:
        begin = 0
        for row, count in enumerate(frame.counts.tolist()):
            if frame.slots[row] == self.slot:
                tokens = frame.tokens[begin : begin + count].tolist()
                self.emission.apply(int(frame.attempts[row]), int(frame.starts[row]), tokens, int(frame.ends[row]))
            begin += count
        if self.emission.ended:
            self.give_up("ended meanwhile")

    def _taken_over(self) -> None:
        assert self.target is not None
        self.at.post(Cancel(self.slot, self.attempt))
        self.at, self.attempt, self.target = self.target, self.issued, None
        self._happened["moved"] += 1


class World:
    """Engines, streams and one random course of events."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fabric = LoopbackFabric()
        self.benches = [
            Bench(self.fabric, name, BLOCKS, late=bool(seed % 2), reserve_tokens=8, max_num_seqs=8) for name in "abc"
        ]
        self.happened: Counter[str] = Counter()
        self.streams = [Stream(number, self.rng.choice(self.benches), self.happened) for number in range(STREAMS)]
        self._heard = dict.fromkeys(range(3), 0)

    def turn(self, *, disturb: bool = True) -> None:
        """Something happens, and every engine makes a step, which checks its blocks."""
        dice, stream = self.rng.random(), self.rng.choice(self.streams)
        if disturb and dice < 0.5:
            stream.begin(self.rng.choice([bench for bench in self.benches if bench is not stream.at]))
        elif disturb and dice < 0.6:
            self.lose()
        elif disturb and dice < 0.75 and not stream.sent:  # once the source was told, either of the two may have it
            stream.give_up("given up")
        if self.rng.random() < 0.6 or not disturb:
            self.fabric.pump()
        for number in self.rng.sample(range(3), 3):
            self.benches[number].step()
            self.hear(number)

    def lose(self) -> None:
        """A lease ends, or a digest is wrong: the receiver gives a session up, and its sender finds out."""
        bench = self.rng.choice(self.benches)
        if bench.transfer.incoming:
            bench.transfer.lose(self.rng.choice(sorted(bench.transfer.incoming)))
            self.happened["lost"] += 1

    def hear(self, number: int) -> None:
        messages = self.benches[number].told.messages
        new, self._heard[number] = messages[self._heard[number] :], len(messages)
        for _, message in new:
            for stream in self.streams:
                stream.hear(self.benches[number], message)


def test_any_course_of_events_leaves_texts_right_and_no_block_behind() -> None:
    happened: Counter[str] = Counter()
    preemptions = 0
    for seed in range(30):
        world = World(seed)
        for _ in range(150):
            world.turn()
        for _ in range(600):
            if all(stream.emission.ended for stream in world.streams):
                break
            world.turn(disturb=False)
        for _ in range(4):
            world.turn(disturb=False)
        assert [stream.emission.tokens for stream in world.streams] == [
            answer(stream.request) for stream in world.streams
        ], seed
        assert [bench.all_free() for bench in world.benches] == [True] * 3, seed
        assert [bench.engine.load().transfers for bench in world.benches] == [0] * 3, seed
        happened += world.happened
        preemptions += sum(bench.scheduler.stats().preemptions for bench in world.benches)
    print(dict(happened), f"{preemptions} preemptions")
    assert min(happened[what] for what in ("moved", "stayed", "lost", "given up", "ended meanwhile")) > 0
    assert preemptions > 10


@pytest.mark.parametrize("full", ["blocks", "rows"])
def test_a_destination_that_is_full_keeps_the_stream_where_it_is(full: str) -> None:
    fabric = LoopbackFabric()
    source = Bench(fabric, "a")
    limits = {"max_num_seqs": 1} if full == "rows" else {}
    target = Bench(fabric, "b", 64 if full == "rows" else 24, **limits)
    happened: Counter[str] = Counter()
    target.post(Generate(99, 1, request(40, TOKENS, salt=70)))
    target.step(3)
    stream = Stream(1, source, happened)
    source.step(4)
    for _, message in source.told.messages:
        stream.hear(source, message)
    stream.begin(target)
    target.step(3)
    assert target.told.of(Granted) == []
    stream.give_up("no room")
    target.until_idle()
    source.until_idle()
    assert source.told.text(stream.slot)[0] == answer(stream.request)
    assert target.told.text(99)[0] == answer(request(40, TOKENS, salt=70))
    assert source.all_free()
    assert target.all_free()
