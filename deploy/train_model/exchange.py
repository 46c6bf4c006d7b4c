"""The unit of the training text: one question and its answer, and the loose ways in which people type.

It does not know what is asked: every topic module makes its own exchanges. Any topic is a function from a random
source to a scene, a short list of exchanges that belong together in this order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from zlib import crc32

HELD_OUT_PARTS = 32


@dataclass(frozen=True)
class Exchange:
    """One turn: what the user types and what the model should answer.

    `varied` says that the topic has far more exchanges than training can show, so that one in `HELD_OUT_PARTS` can be
    kept back for the evaluation without hiding a fact from the model.
    """

    question: str
    answer: str
    varied: bool = False

    @property
    def held_out(self) -> bool:
        """True for the part of the varied exchanges that training never shows."""
        return self.varied and crc32(f"{self.question}\n{self.answer}".encode()) % HELD_OUT_PARTS == 0


Scene = list[Exchange]
Topic = Callable[[Random], Scene]


def alternatives(options: str) -> list[str]:
    """The texts that `options` lists between bars; each may run over lines."""
    return [" ".join(option.split()) for option in options.split("|")]


def pick(rng: Random, options: str) -> str:
    """One of the alternatives."""
    return rng.choice(alternatives(options))


def article(noun: str) -> str:
    """The noun with `a` or `an` before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(sentence: str) -> str:
    """The sentence with its first letter in upper case and the rest as it was."""
    return sentence[:1].upper() + sentence[1:]


def loosely(rng: Random, question: str) -> str:
    """The question as somebody in a hurry may type it: no capital, no full stop, or a polite word around it."""
    roll = rng.random()
    if roll < 0.45 or question.startswith("I "):
        return question
    if roll < 0.6:
        return question.rstrip("?.!")
    if roll < 0.72:
        return question[0].lower() + question[1:]
    if roll < 0.86:
        return question[0].lower() + question[1:].rstrip("?.!")
    opening = pick(rng, "Please|Please,|Hi!|Hello,|Now|OK,|And")
    inner = question if opening == "Hi!" else question[0].lower() + question[1:]
    return f"{opening} {inner}"
