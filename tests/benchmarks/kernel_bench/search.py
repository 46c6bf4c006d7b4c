"""Find a fast configuration in few measurements: evolution guided by a cost model that is fitted as it goes.

After Zheng et al. 2020 ("Ansor", sections 4 and 5), with ridge regression on log-features in place of boosted trees:
each round mutates and crosses the best configurations so far, ranks them by the model and measures the most promising
and, now and then, something quite different. Deterministic for a seed. Knows configurations as numbers only; what a
measurement is, the caller decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .space import Config

F64 = NDArray[np.float64]
TRIALS, PER_ROUND, RANDOM_PER_ROUND, FIRST = 40, 4, 1, 12
POPULATION = 256
_RIDGE = 0.1
CROSS = 0.5


@dataclass(slots=True)
class Found:
    """What was measured, in order; `None` seconds for a configuration that failed."""

    trials: list[tuple[Config, float | None]] = field(default_factory=list)

    @property
    def best(self) -> tuple[Config, float]:
        """The fastest. Raises ValueError when nothing ran."""
        ran = [(config, seconds) for config, seconds in self.trials if seconds is not None]
        if not ran:
            raise ValueError("no configuration ran")
        return min(ran, key=lambda pair: pair[1])


def search(
    configs: Sequence[Config],
    measure: Callable[[Config], float | None],
    *,
    accept: Callable[[Config], bool] = lambda config: True,
    features: Callable[[Config], tuple[float, ...]] = lambda config: (),
    start: Sequence[Config] = (),
    trials: int = TRIALS,
    seed: int = 0,
) -> Found:
    """Measure at most `trials` of `configs`, those in `start` first; see `Search`."""
    running = Search(configs, measure, accept=accept, features=features, start=start, seed=seed)
    while len(running.found.trials) < trials and running.left:
        running.round(trials - len(running.found.trials))
    return running.found


class Search:
    """One search that can be continued round by round.

    `accept` is asked right before a measurement, once a configuration (compiling is slow): a refusal costs no trial.
    """

    def __init__(
        self,
        configs: Sequence[Config],
        measure: Callable[[Config], float | None],
        *,
        accept: Callable[[Config], bool] = lambda config: True,
        features: Callable[[Config], tuple[float, ...]] = lambda config: (),
        start: Sequence[Config] = (),
        seed: int = 0,
    ) -> None:
        self.found = Found()
        self._points, self._rng = Points(configs, features), np.random.default_rng(seed)
        self._measure, self._accept = measure, accept
        self._asked = set[int]()
        places = (self._points.number_of(config) for config in start)
        self._start = [place for place in places if place is not None]

    @property
    def left(self) -> bool:
        """Whether anything is left to ask."""
        return len(self._asked) < len(self._points.configs)

    def round(self, most: int) -> None:
        """The start and a spread of configurations first; then what the model and evolution propose."""
        if self._start:
            numbers = [self._start.pop(0)]
        elif len(self.found.trials) < FIRST:
            numbers = [self._points.furthest(self._asked, self._rng)]
        else:
            numbers = _next_round(self._points, self.found, self._asked, self._rng)
        for number in numbers[:most]:
            if number not in self._asked:
                self._asked.add(number)
                config = self._points.configs[number]
                if self._accept(config):
                    self.found.trials.append((config, self._measure(config)))


class Points:
    """Configurations as rows of log2 numbers, each column scaled to 0 .. 1."""

    def __init__(self, configs: Sequence[Config], features: Callable[[Config], tuple[float, ...]]) -> None:
        self.names = sorted(configs[0])
        self.configs = configs
        self.numbers = {self._tuple(config): number for number, config in enumerate(configs)}
        raw = np.array([[math.log2(config[name] + 1) for name in self.names] for config in configs])
        low, high = raw.min(axis=0), raw.max(axis=0)
        self.rows: F64 = (raw - low) / np.where(high > low, high - low, 1)
        derived = np.array([features(config) for config in configs])
        spread = derived.std(axis=0) if derived.size else np.ones(0)
        self.derived: F64 = (
            (derived - derived.mean(axis=0)) / np.where(spread > 0, spread, 1) if derived.size else derived
        )
        self.choices = {name: sorted({config[name] for config in configs}) for name in self.names}

    def _tuple(self, config: Config) -> tuple[int, ...]:
        return tuple(config[name] for name in self.names)

    def number_of(self, config: Config) -> int | None:
        """Its place among the configurations, None where it is not admitted."""
        return self.numbers.get(self._tuple(config))

    def furthest(self, asked: set[int], rng: np.random.Generator) -> int:
        """Of some that were not asked, the one furthest from all that were."""
        rest = np.array(sorted(set(range(len(self.configs))) - asked))
        some = rng.choice(rest, size=min(len(rest), 64), replace=False)
        if not asked:
            return int(some[0])
        apart = np.abs(self.rows[some][:, None, :] - self.rows[sorted(asked)][None, :, :]).sum(axis=2).min(axis=1)
        return int(some[int(apart.argmax())])

    def features(self, numbers: Sequence[int]) -> F64:
        """1, every number, its square, what the space derives, and every product of two numbers, at less weight."""
        rows, derived = self.rows[list(numbers)], self.derived[list(numbers)]
        products = [
            (1.0 if i == j else CROSS) * rows[:, i] * rows[:, j]
            for i in range(rows.shape[1])
            for j in range(i, rows.shape[1])
        ]
        return np.column_stack((np.ones(len(rows)), rows, derived, *products))


def _next_round(points: Points, found: Found, asked: set[int], rng: np.random.Generator) -> list[int]:
    """Some candidates by the model, and some far from everything measured."""
    ran = [(points.number_of(config), seconds) for config, seconds in found.trials if seconds is not None]
    known = [(number, math.log(seconds)) for number, seconds in ran if number is not None]
    if not known:
        return [points.furthest(asked, rng)]
    elite = [number for number, _ in sorted(known, key=lambda pair: pair[1])[:6]]
    candidates = sorted(_offspring(points, elite, rng) - asked)
    chosen = []
    if candidates:
        predicted = predict(points, known, candidates)
        chosen = [candidates[place] for place in np.argsort(predicted, kind="stable")[: PER_ROUND - RANDOM_PER_ROUND]]
    while len(chosen) < PER_ROUND and len(asked) + len(chosen) < len(points.configs):
        chosen.append(points.furthest(asked | set(chosen), rng))
    return chosen


def _offspring(points: Points, elite: Sequence[int], rng: np.random.Generator) -> set[int]:
    """All that differ from an elite member in one number by one step, and random mutants and crosses of several."""
    found = set[int]()
    for number in elite:
        for name in points.names:
            for value in points.choices[name]:
                other = points.number_of({**points.configs[number], name: value})
                if other is not None:
                    found.add(other)
    for _ in range(POPULATION):
        first, second = (points.configs[elite[int(rng.integers(len(elite)))]] for _ in range(2))
        child = {name: (first if rng.random() < 0.5 else second)[name] for name in points.names}
        for name in points.names:
            if rng.random() < 0.3:
                child[name] = int(rng.choice(points.choices[name]))
        other = points.number_of(child)
        if other is not None:
            found.add(other)
    return found


def predict(points: Points, known: Sequence[tuple[int, float]], candidates: Sequence[int]) -> F64:
    """Log seconds: a quadratic model, corrected by what nearby measurements say about its error.

    Slow measurements weigh less: where the model is to be right is near the best.
    """
    numbers, logs = [number for number, _ in known], np.array([log for _, log in known])
    x, weight = points.features(numbers), np.exp(-1.0 * (logs - logs.min()))
    centre = float(np.average(logs, weights=weight))
    gram = (x * weight[:, None]).T @ x + _RIDGE * np.eye(x.shape[1])
    solved = np.linalg.solve(gram, (x * weight[:, None]).T @ (logs - centre))
    errors = logs - centre - x @ solved
    apart = np.abs(points.rows[list(candidates)][:, None, :] - points.rows[numbers][None, :, :]).sum(axis=2)
    near = np.exp(-4 * apart)
    return centre + points.features(candidates) @ solved + (near @ errors) / (near.sum(axis=1) + 0.5)


def next_task(shares: Sequence[float], fractions: Sequence[float], gains: Sequence[float]) -> int:
    """Which of several searches gets the next round: the largest expected saving of total time.

    `shares` of the time that each kernel and shape takes in the workload, `fractions` of its bound reached so far,
    `gains` its relative improvement in its last round (1 before the first). The first of equals.
    """
    expected = [
        share * max(0.0, 1 - fraction) * max(gain, 0.01)
        for share, fraction, gain in zip(shares, fractions, gains, strict=True)
    ]
    return int(np.argmax(expected))
