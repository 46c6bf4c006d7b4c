"""Short lists of words or numbers: copied, reversed, sorted, counted, and counting itself.

Answers repeat the items with commas between, the way the question lists them.
"""

from random import Random

from deploy.train_model.exchange import Exchange, Scene, pick
from deploy.train_model.lexicon import noun

COPY = """Copy this list: {items}|Repeat this list: {items}|Repeat: {items}|Say this again: {items}
|Write the same list again: {items}|Copy: {items}|Repeat after me: {items}|copy {items}|Please repeat {items}"""
REVERSE = """Reverse this list: {items}|Reverse: {items}|Write this list backwards: {items}|reverse {items}
|Turn this list around: {items}|Say these in reverse order: {items}|List these from last to first: {items}
|Please reverse the list {items}"""
SORT_NUMBERS = """Sort these numbers: {items}|Sort: {items}|Sort this list: {items}|sort {items}
|Put these numbers in order: {items}|Order these from smallest to largest: {items}|Sort the numbers {items}
|Please sort {items}"""
SORT_WORDS = """Sort these words: {items}|Sort: {items}|Sort this list: {items}|sort {items}
|Put these words in alphabetical order: {items}|Sort these alphabetically: {items}|Please sort {items}"""
PICK_ONE = {
    "first": "What is the first item of this list: {items}|Which comes first: {items}|Give me the first of {items}",
    "last": "What is the last item of this list: {items}|Which comes last: {items}|Give me the last of {items}",
    "count": "How many items are in this list: {items}|Count these: {items}|How many are there: {items}",
}
COUNTING = """Count from {a} to {b}.|Count from {a} to {b}|Can you count from {a} to {b}?|count from {a} to {b}
|List the numbers from {a} to {b}.|Write the numbers from {a} to {b}."""
LISTS = ("copy", "reverse", "sort")


def words(rng: Random, count: int) -> list[str]:
    """Different words."""
    chosen: list[str] = []
    while len(chosen) < count:
        word = noun(rng)
        if word not in chosen:
            chosen.append(word)
    return chosen


def listed(rng: Random, items: list[str]) -> str:
    """The items as the user types them: commas mostly, brackets or blanks at times."""
    roll = rng.random()
    if roll < 0.12:
        return f"[{', '.join(items)}]"
    if roll < 0.2:
        return " ".join(items)
    if roll < 0.25:
        return ",".join(items)
    return ", ".join(items) + pick(rng, " | | |.")


def list_exchange(rng: Random, task: str) -> Exchange:
    """One exchange of a task of `LISTS`."""
    numeric = rng.random() < 0.5
    count = rng.randint(3, 6)
    items = [str(n) for n in rng.sample(range(100), count)] if numeric else words(rng, count)
    if task == "copy":
        phrasings, result = COPY, items
    elif task == "reverse":
        phrasings, result = REVERSE, items[::-1]
    else:
        phrasings = SORT_NUMBERS if numeric else SORT_WORDS
        result = sorted(items, key=int) if numeric else sorted(items)
    question = pick(rng, phrasings).format(items=listed(rng, items))
    return Exchange(question, ", ".join(result), varied=True)


def list_task(rng: Random) -> Scene:
    """A list to copy, reverse or sort; sorting, the hardest, comes up most."""
    return [list_exchange(rng, rng.choice((*LISTS, "sort")))]


def list_question(rng: Random) -> Scene:
    """The first, the last or the number of items of a list."""
    task = rng.choice(tuple(PICK_ONE))
    items = words(rng, rng.randint(2, 6))
    answer = {"first": items[0], "last": items[-1], "count": f"There are {len(items)} items."}[task]
    return [Exchange(pick(rng, PICK_ONE[task]).format(items=", ".join(items)), answer, varied=True)]


def counting(rng: Random) -> Scene:
    """Counting upwards, from one to forty numbers."""
    start = rng.choice((1, 1, 1, rng.randint(0, 60)))
    stop = min(99, start + rng.choice((rng.randint(2, 12), rng.randint(2, 40))))
    question = pick(rng, COUNTING).format(a=start, b=stop)
    if start == 1 and rng.random() < 0.4:
        question = pick(rng, "Count to {b}.|Count to {b}|count to {b}|Can you count to {b}?").format(b=stop)
    return [Exchange(question, ", ".join(str(n) for n in range(start, stop + 1)))]
