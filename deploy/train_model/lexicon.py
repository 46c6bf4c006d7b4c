"""The words of the small world: names, places, animals and things, and made-up words beside them.

Only word lists and the drawing of words from them; no sentence is built here. Made-up words teach the model to copy
what it has never seen.
"""

from random import Random

NAMES = tuple(
    """Ana Ben Carla David Emma Felix Grace Hugo Iris Jack Kate Leo Maria Noah Olga Paul Quinn Rosa Sam Tina Uma Victor
    Wendy Xavier Yara Zoe Alice Bob Clara Daniel Elena Frank Greta Henry Ivan Julia Karl Lena Max Nina Oscar Petra
    Robin Sara Tom Vera Will Amir Bella Chen Dora Eric Fatima George Hana Ines John Kofi Lucy Mia Nils Omar Priya Ravi
    Sofia Theo Anna Marco Peter Alex Chris Jane Mary James Laura""".split()
)
CITIES = tuple(
    """Oslo Paris Rome Lima Cairo Berlin Madrid London Tokyo Vienna Prague Dublin Athens Lisbon Warsaw Boston Delhi
    Seoul Geneva Zurich Milan Porto Nairobi Toronto Sydney Chicago Hamburg Lyon Turin Bergen""".split()
)
JOBS = tuple(
    """baker teacher doctor farmer painter pilot nurse cook driver singer writer builder gardener tailor sailor
    dentist lawyer engineer musician student""".split()
)
ANIMALS = tuple(
    """fox cat dog bear owl wolf rabbit mouse horse duck frog lion tiger hen goat crow deer swan badger hedgehog
    otter turtle elephant monkey penguin squirrel donkey sheep pig cow""".split()
)
PEOPLE = tuple("girl boy king queen farmer sailor baker painter knight princess wizard fisherman gardener".split())
BEINGS = tuple("dragon robot giant ghost snowman fairy cloud star tree train boat".split())
TRAITS = tuple("brave little clever kind curious lazy quiet cheerful old young shy proud hungry lonely happy".split())
COLORS = tuple("red blue green yellow white black brown orange purple pink grey golden".split())
THINGS = tuple(
    """hat ball book lamp key box cup coat bell kite drum basket chair clock shoe bag pen ring map bottle spoon mirror
    scarf umbrella bicycle phone table plate candle blanket""".split()
)
FOODS = tuple(
    """apple pear cake plum cherry carrot potato egg tomato lemon pie cookie orange banana melon nut peach onion
    pancake""".split()
)
DISHES = tuple("bread soup cheese honey rice fruit fish cake chocolate salad".split())
PLACES = tuple(
    place.strip()
    for place in """in a small village|near a deep forest|by the sea|on a green hill|beside a quiet river
    |in an old castle|at the edge of a big city|in a little house under a tree|on a farm|in the mountains|next to a lake
    |in a warm valley""".split("|")
)
WORDS = tuple(
    """sun moon rain snow wind stone sand leaf root seed bird fish gold iron wood glass paper salt sugar milk water fire
    door wall roof road bridge tower field garden school market winter summer morning night song dance game story
    dream gift flag rope wheel nail brush desk window pocket button river ocean island storm""".split()
)
ONSETS = "b bl br c ch cl d dr f fl g gl gr h j k l m n p pl r s sh sl st t th tr v w z".split()
VOWELS = "a e i o u ai ea oo ou".split()
CODAS = "b ck d f g ll m n nd nk p r rn s sh st t x".split()


def made_up_word(rng: Random) -> str:
    """A word of one to three syllables that most likely no language has."""
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 2))]
    return "".join(syllables) + rng.choice(CODAS)


def person(rng: Random) -> str:
    """A first name, one time in six a made-up one."""
    return made_up_word(rng).capitalize() if rng.random() < 1 / 6 else rng.choice(NAMES)


def people(rng: Random, count: int) -> list[str]:
    """Different first names."""
    names: list[str] = []
    while len(names) < count:
        name = person(rng)
        if name not in names:
            names.append(name)
    return names


def city(rng: Random) -> str:
    """A city, one time in eight a made-up one."""
    return made_up_word(rng).capitalize() if rng.random() < 1 / 8 else rng.choice(CITIES)


def noun(rng: Random) -> str:
    """Any thing, food, animal or plain word of the lists, one time in ten a made-up one."""
    if rng.random() < 1 / 10:
        return made_up_word(rng)
    return rng.choice(rng.choice((THINGS, FOODS, ANIMALS, WORDS)))


def plural(word: str) -> str:
    """The plural of a word of these lists."""
    irregular = {"mouse": "mice", "sheep": "sheep", "deer": "deer", "wolf": "wolves", "leaf": "leaves", "fish": "fish"}
    if word in irregular:
        return irregular[word]
    if word.endswith(("s", "x", "ch", "sh", "tomato", "potato")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"
