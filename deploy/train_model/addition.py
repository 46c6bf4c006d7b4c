"""Addition of numbers up to 99, with a tenth of the two-digit pairs kept out of training for good.

The rule that holds a pair out is a checksum of its digits, so that a test can compute it again with no list of pairs.
"""

import re
from random import Random
from zlib import crc32

from deploy.train_model.exchange import Exchange, Scene, loosely, pick
from deploy.train_model.lexicon import FOODS, THINGS, people, plural

PHRASINGS = """What is {a} + {b}?|What is {a} plus {b}?|{a} + {b}|{a}+{b}|{a}+{b}=|{a} + {b} =|{a} + {b} = ?|{a}+{b}?
|Add {a} and {b}.|{a} plus {b}|{a} plus {b}?|How much is {a} + {b}?|How much is {a} plus {b}?|What is {a}+{b}?
|What is the sum of {a} and {b}?|Calculate {a} + {b}.|Compute {a} + {b}.|Add {b} to {a}.|What do you get for {a} + {b}?
|What does {a} + {b} make?|Sum of {a} and {b}|Can you add {a} and {b}?|Can you add {a} and {b} for me?
|Do you know what {a} + {b} is?|Tell me {a} + {b}.|What's {a} + {b}?|What's {a} plus {b}?|Solve {a} + {b}.
|Give me the sum of {a} and {b}.|What is {a} and {b} together?"""
PROBLEMS = """{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?
|{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have?
|There are {a} {things} in one box and {b} {things} in another. How many {things} are there?
|{name} has {a} {things} and {other} has {b}. How many {things} do they have together?"""


def is_held_out(a: int, b: int) -> bool:
    """True for the tenth or so of the two-digit pairs, in either order, that training never shows."""
    low, high = sorted((a, b))
    return low >= 10 and crc32(f"{low}+{high}".encode()) % 10 == 0


def held_out_pairs() -> list[tuple[int, int]]:
    """Every ordered pair of two-digit addends that is held out."""
    return [(a, b) for a in range(10, 100) for b in range(10, 100) if is_held_out(a, b)]


def training_pair(rng: Random) -> tuple[int, int]:
    """A pair that training may show; six in seven have two digits each."""
    while True:
        low = 10 if rng.random() < 6 / 7 else 0
        a, b = rng.randint(low, 99), rng.randint(low, 99)
        if not is_held_out(a, b):
            return a, b


def answered(a: int, b: int) -> str:
    """The answer to every plain addition: the sum, written out."""
    return f"{a} + {b} = {a + b}."


def phrased(rng: Random, a: int, b: int) -> str:
    """One of the ways of asking for the sum."""
    return loosely(rng, pick(rng, PHRASINGS).format(a=a, b=b))


def is_right(reply: str, a: int, b: int) -> bool:
    """True when the last number of the reply is the sum."""
    numbers = re.findall(r"\d+", reply)
    return bool(numbers) and int(numbers[-1]) == a + b


def addition(rng: Random) -> Scene:
    """One to three additions in a row."""
    scene = []
    for turn in range(rng.choice((1, 1, 1, 2, 3))):
        a, b = training_pair(rng)
        question = phrased(rng, a, b)
        if turn and rng.random() < 0.3:
            question = pick(rng, "And {a} + {b}?|and {a} plus {b}?|Now {a} + {b}.").format(a=a, b=b)
        scene.append(Exchange(question, answered(a, b)))
    return scene


def word_problem(rng: Random) -> Scene:
    """An addition told as a little story."""
    a, b = (max(2, n) for n in training_pair(rng))
    if is_held_out(a, b):
        return word_problem(rng)
    name, other = people(rng, 2)
    things = plural(rng.choice(FOODS + THINGS))
    question = pick(rng, PROBLEMS).format(a=a, b=b, name=name, other=other, things=things)
    return [Exchange(question, f"{a} + {b} = {a + b}, so the answer is {a + b} {things}.", varied=True)]


def sums_text(rng: Random) -> str:
    """A plain column of sums."""
    pairs = [training_pair(rng) for _ in range(rng.randint(3, 10))]
    return "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)
