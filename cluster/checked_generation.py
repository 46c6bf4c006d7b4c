"""Generates text under a checker: where it finds an error, the answer is rolled back to a place before and goes on.

    answer = handle.rewindable(prompt, max_tokens=400)
    result = generate_checked(answer, python_checker, TokenCost(most=400))

The answer streams on while the checker reads; error-free text costs nothing but the checker's own time. Which place to
go back to is a policy's choice: near ones are cheap, and useless if the cause lies before them. Every attempt forbids
the token with which the last one left the chosen place. Method: Hydra (arXiv 2605.15238): the policies `Backwards` and
token cost. Knows handles' answers; nothing of HTTP or workers.
"""

from __future__ import annotations

import codeop
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from penstock.cluster.client_rewind import Mark, RewindableStream

MAX_ROLLBACKS = 8
_MEAN_DISTANCE = 16.0  # tokens from an error back to its cause, where nothing better is known
_FIX_PROBABILITY = 0.7  # that going on from before the cause goes well


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a checker says of text that may go on: `sound` leading characters are whole and good."""

    sound: int
    error: str = ""  # empty: nothing is wrong so far


Checker = Callable[[str], Verdict]


class RollbackPolicy(Protocol):
    """Chooses where to go back to."""

    def choose(self, distances: Sequence[int]) -> int:
        """Index of one of the places, which lie so many tokens before the error, the nearest first."""
        ...

    def failed(self, distance: int) -> None:
        """Going on from so far before the error ended in an error again."""
        ...


class Backwards:
    """One attempt at each place, from the nearest on."""

    def __init__(self) -> None:
        self._tried = 0

    def choose(self, distances: Sequence[int]) -> int:
        """See `RollbackPolicy`."""
        return next((index for index, distance in enumerate(distances) if distance > self._tried), len(distances) - 1)

    def failed(self, distance: int) -> None:
        """See `RollbackPolicy`."""
        self._tried = max(self._tried, distance)


class TokenCost:
    """The place with the least expected number of tokens, by a belief about how far back the cause lies.

    Going on from `x` tokens back costs x, and succeeds with s(x) = P(d <= x) p; else V is still to be paid. With V the
    same before and after, V = min over x of x + (1 - s(x)) V, whose best x is that of the least x / s(x). After a
    failure the belief in d <= x shrinks by 1 - p (Bayes).
    """

    def __init__(self, most: int, mean: float = _MEAN_DISTANCE, fix: float = _FIX_PROBABILITY) -> None:
        """Causes lie 1 to `most` tokens back, geometrically with this `mean` at first; `fix` is p, in (0, 1)."""
        chance = 1.0 / max(mean, 1.0)
        self.belief = (1.0 - chance) ** np.arange(most)  # [most]; entry d - 1: the cause is d tokens back
        self.belief /= self.belief.sum()
        self._fix = fix

    def choose(self, distances: Sequence[int]) -> int:
        """See `RollbackPolicy`."""
        places = np.clip(np.asarray(distances), 1, len(self.belief))
        success = np.cumsum(self.belief)[places - 1] * self._fix
        return int((places / success).argmin())

    def failed(self, distance: int) -> None:
        """See `RollbackPolicy`."""
        self.belief[:distance] *= 1.0 - self._fix
        self.belief /= self.belief.sum()


@dataclass(frozen=True, slots=True)
class Checked:
    """A finished answer. `error` is what is still wrong with it, after all attempts; empty: nothing."""

    text: str
    error: str
    rollbacks: int
    tokens_taken_back: int


def python_checker(text: str) -> Verdict:
    """Whole lines of Python compile, or could with more lines after them. Nothing is run."""
    sound = text.rfind("\n") + 1
    try:
        codeop.compile_command(text[:sound], "<answer>", "exec")
    except (SyntaxError, ValueError, OverflowError) as error:
        return Verdict(0, str(error))
    return Verdict(sound)


def generate_checked(
    answer: RewindableStream, check: Checker, policy: RollbackPolicy, most_rollbacks: int = MAX_ROLLBACKS
) -> Checked:
    """Read the answer to its end, going back where `check` finds an error; at most so many times. Raises what the
    stream raises."""
    marks = [answer.checkpoint()]  # where everything before was sound, oldest first
    sound = rollbacks = taken_back = 0
    tried: dict[Mark, list[int]] = {}
    went_to = 0  # how far the last attempt had gone back
    while True:
        verdict = Verdict(0)
        for _ in answer:
            verdict = check(answer.text)
            if verdict.error:
                break
            if verdict.sound > sound:
                sound = verdict.sound
                marks.append(answer.checkpoint())
        if not verdict.error or rollbacks == most_rollbacks:
            answer.close()
            return Checked(answer.text, verdict.error, rollbacks, taken_back)
        if went_to:
            policy.failed(went_to)
        here = len(answer.token_ids)
        places = [mark for mark in reversed(marks) if mark.tokens < here]
        mark = places[policy.choose([here - place.tokens for place in places])]
        tried.setdefault(mark, []).append(answer.token_ids[mark.tokens])
        went_to, rollbacks, taken_back = here - mark.tokens, rollbacks + 1, taken_back + here - mark.tokens
        marks = [place for place in marks if place.tokens <= mark.tokens]
        sound = min(sound, mark.characters)
        answer.rollback(mark, forbid_first=tried[mark])
