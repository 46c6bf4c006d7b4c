"""Who of a group is at fault: silent ranks, a step that does not end, a rank that holds all others up. Pure decisions.

Rank 0's control thread feeds what it hears and asks; the answer is a rank and a sentence. Two detectors, after the
diagnosis of C4 (Dong et al. 2024, section 3): every rank's own thread says that it lives, and steps are compared to
what they should take. Ranks run in lock-step, so the culprit is who has not come to where the others wait.

Knows no sockets, processes or threads; the clock comes in as numbers of seconds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from penstock.workers.parallel.group_messages import Beat
from penstock.workers.settings import GroupSettings
from penstock.workers.step_time import StepTimeModel

FLOOR_S = 1.0  # no step is called stuck earlier: pages are touched, code is loaded, other processes have their turn
_FIRST_STEPS = 8  # before so many steps nothing is known of how long they take
_FIRST_STEP_S = 60.0  # how long one of them may take
_SLOW_FOR_S, _SLOW_LOOKS = 0.9, 2  # a rank must be slow for so long, and in so many intervals in a row
_LEAST_STEPS, _LONGEST_INTERVAL_S = 4, 0.75  # an interval ends with so many steps, or then with fewer
_HELD_UP = 0.8  # of `slow_factor`: what a slow rank adds is not all there is to a step
_TRUSTED = 0.5  # of `slow_factor`: steps beyond are not learned from
_LEAST_BUSY_S = 0.001  # per step: below, what a rank takes by itself is noise
_ADAPT_AFTER_S = 10.0  # steps that stay slow for so long without a rank to blame are what steps take now
_ROOM = 1.5  # steps beyond so many times the most tokens seen are not judged by the line through the others


@dataclass(frozen=True, slots=True)
class Verdict:
    """The group cannot go on with `rank`, the culprit; None where none stands out."""

    rank: int | None
    reason: str


class StepPace:
    """How long steps take, learned from those that nobody held up."""

    def __init__(self, slow_factor: float) -> None:
        self._slow_factor = slow_factor
        self._model = StepTimeModel(first_steps=0, least_steps=3)  # who stands still at first is to be found too
        self._count = 0
        self._most_tokens = 0
        self._most_s_per_token = 0.0
        self._slow_since: float | None = None
        self._steps = 0  # of this interval
        self._took_s = self._expected_s = 0.0

    def limit_s(self, tokens: int) -> float:
        """When a step of `tokens` is called stuck, in seconds from its begin."""
        if self._count < _FIRST_STEPS:
            return _FIRST_STEP_S * max(1.0, self._slow_factor / 3)
        return max(FLOOR_S, self._slow_factor * self._predicted_s(tokens))

    def observe(self, tokens: int, seconds: float, now: float) -> None:
        """A step of `tokens` ended after `seconds`."""
        if self._count >= _FIRST_STEPS:
            self._steps += 1
            self._took_s += seconds
            self._expected_s += self._predicted_s(tokens)
        if self._count >= _FIRST_STEPS and seconds > _TRUSTED * self._slow_factor * self._predicted_s(tokens):
            self._slow_since = now if self._slow_since is None else self._slow_since
            if now - self._slow_since < _ADAPT_AFTER_S:
                return  # what a fault makes of steps must not become what is expected of them
        else:
            self._slow_since = None
        self._model.observe(tokens, seconds)
        self._count += 1
        self._most_tokens = max(self._most_tokens, tokens)
        self._most_s_per_token = max(self._most_s_per_token, seconds / max(1, tokens))

    @property
    def slow(self) -> bool:
        """The steps of this interval took much longer than they should."""
        return self._took_s > _HELD_UP * self._slow_factor * self._expected_s

    @property
    def steps(self) -> int:
        """Of this interval."""
        return self._steps

    def next_interval(self) -> None:
        """Begin a new one."""
        self._steps = 0
        self._took_s = self._expected_s = 0.0

    def _predicted_s(self, tokens: int) -> float:
        predicted = self._model.predict(tokens)
        if tokens > _ROOM * self._most_tokens:
            predicted = max(predicted, self._most_s_per_token * tokens)
        return predicted


class GroupWatch:
    """What is heard of every rank, rank 0 included, and what follows from it."""

    def __init__(self, settings: GroupSettings, now: float) -> None:
        self._settings = settings
        self._beats: list[Beat] = [Beat(0, 0)] * settings.width
        self._heard = [now] * settings.width
        self._marks: list[Beat] = list(self._beats)  # at the last look at how slow ranks are
        self._marked = now
        self._strikes = [0] * settings.width
        self._slow_since = [now] * settings.width
        self._ranks = list(range(settings.width))  # that are still part of the group
        self.armed = False  # silence and slowness are judged only once all ranks have loaded

    def arm(self, now: float) -> None:
        """All ranks are ready."""
        self._heard = [now] * self._settings.width
        self.armed = True

    def leave_out(self, rank: int) -> None:
        """This rank is no part of the group any more."""
        self._ranks = [each for each in self._ranks if each != rank]

    def heard(self, rank: int, beat: Beat, now: float) -> None:
        """A rank gave a sign of life."""
        self._beats[rank], self._heard[rank] = beat, now

    def silent(self, now: float) -> Verdict | None:
        """A rank whose silence has come so near its limit that the group's end is there in time."""
        if not self.armed:
            return None
        age, rank = max((now - self._heard[rank], -rank) for rank in self._ranks)
        if age <= silence_limit_s(self._settings):
            return None
        return Verdict(-rank, f"rank {-rank} has given no sign of life for {age:.1f} s")

    def stuck(self, age_s: float, limit_s: float, now: float) -> Verdict | None:
        """The step under way is `age_s` old and may take `limit_s`."""
        if not self.armed or age_s <= limit_s:
            return None
        rank = self.behind(now)
        who = "no rank stands out" if rank is None else f"rank {rank} has not come to where the others wait"
        return Verdict(rank, f"a step has taken {age_s:.1f} s instead of at most {limit_s:.1f} s: {who}")

    def behind(self, now: float) -> int | None:
        """The rank that the others wait for: the one not heard of, or else the one alone in being least far."""
        quiet = [rank for rank in self._ranks if now - self._heard[rank] > 1.8 * self._settings.heartbeat_s]
        if quiet:
            return max(quiet, key=lambda rank: now - self._heard[rank])
        beats = {rank: self._beats[rank] for rank in self._ranks}
        places = {rank: (beat.begun, 2 * beat.calls - beat.waiting) for rank, beat in beats.items()}
        least = min(places.values())
        last = [rank for rank, place in places.items() if place == least]
        return last[0] if len(last) == 1 else None

    def slow(self, pace: StepPace, now: float) -> Verdict | None:
        """Asked with every beat: the rank that has been slow by itself, and has made steps slow, for a while."""
        enough = pace.steps >= _LEAST_STEPS or (pace.steps and now - self._marked > _LONGEST_INTERVAL_S)
        if not enough:
            return None
        marks, began = self._marks, self._marked
        self._marks, self._marked = list(self._beats), now
        steps_slow = pace.slow
        pace.next_interval()
        busy = [_busy_per_step(before, after) for before, after in zip(marks, self._beats, strict=True)]
        for rank in self._ranks:
            own = busy[rank]
            others = [found for other in self._ranks if other != rank and (found := busy[other]) is not None]
            usual = max(_LEAST_BUSY_S, statistics.median(others)) if others else None
            if own is None or usual is None:
                continue  # nothing new is known of it, as of one that stands still
            held_up = self.armed and steps_slow and own > _HELD_UP * self._settings.slow_factor * usual
            if not held_up:
                self._strikes[rank], self._slow_since[rank] = 0, now
                continue
            self._slow_since[rank] = min(self._slow_since[rank], began)
            self._strikes[rank] += 1
            if self._strikes[rank] >= _SLOW_LOOKS and now - self._slow_since[rank] >= _SLOW_FOR_S:
                return Verdict(rank, f"rank {rank} takes {own * 1e3:.1f} ms per step, the others {usual * 1e3:.1f} ms")
        return None


def silence_limit_s(settings: GroupSettings) -> float:
    """When to act on a rank's silence; a beat is due twice as often as `heartbeat_s` says."""
    return settings.silence_s - settings.heartbeat_s / 2


def _busy_per_step(before: Beat, after: Beat) -> float | None:
    """Seconds that a rank worked by itself per step between two beats; None: it did nothing."""
    steps = after.steps - before.steps
    busy = after.busy_s - before.busy_s
    if steps <= 0 and busy <= 0.0:
        return None
    return busy / max(1, steps)
