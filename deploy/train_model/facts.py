"""Facts of the small world, how to do a few things, and questions about a text that the user gives.

Each fact is one line of a table here. The readings are drawn anew each time, so that the answer must come from the
text.
"""

from random import Random

from deploy.train_model.exchange import Exchange, Scene, alternatives, article, capital, loosely, pick
from deploy.train_model.lexicon import COLORS, DISHES, JOBS, THINGS, city, people, plural

CAPITALS = dict(
    pair.split(":")
    for pair in """France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon England:London Ireland:Dublin
    Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Austria:Vienna Poland:Warsaw Greece:Athens
    Hungary:Budapest Belgium:Brussels Switzerland:Bern Russia:Moscow Japan:Tokyo China:Beijing India:Delhi Egypt:Cairo
    Kenya:Nairobi Peru:Lima Chile:Santiago Canada:Ottawa Australia:Canberra Cuba:Havana Iran:Tehran Iraq:Baghdad
    Turkey:Ankara Scotland:Edinburgh Iceland:Reykjavik Ukraine:Kyiv""".split()
)
OPPOSITES = tuple(
    tuple(pair.split(":"))
    for pair in """hot:cold big:small fast:slow day:night up:down left:right open:closed happy:sad old:young light:dark
    good:bad hard:soft wet:dry loud:quiet full:empty rich:poor strong:weak early:late high:low long:short first:last
    summer:winter black:white yes:no easy:difficult clean:dirty thick:thin near:far love:hate war:peace""".split()
)
COLORED = dict(
    pair.split(":")
    for pair in """sky:blue grass:green snow:white sun:yellow banana:yellow lemon:yellow cherry:red tomato:red blood:red
    coal:black carrot:orange leaf:green sea:blue milk:white night:black strawberry:red frog:green swan:white""".split()
)
ANIMAL_FACTS = dict(
    line.split(": ")
    for line in alternatives(
        """fox: is a small wild animal with red fur and a long tail
    |cat: is a small animal that hunts mice and likes to sleep
    |dog: is a friendly animal that barks and guards the house
    |bear: is a big, strong animal that sleeps all winter
    |owl: is a bird that hunts at night
    |wolf: is a wild animal that lives and hunts in a pack
    |rabbit: is a small animal with long ears
    |mouse: is a very small animal with a long tail
    |horse: is a big animal that people can ride
    |duck: is a bird that likes to swim
    |frog: is a small green animal that jumps
    |lion: is a big wild cat, and some call it the king of animals
    |tiger: is a big cat with orange and black stripes
    |hen: is a bird that lays eggs
    |goat: is a farm animal with horns that gives milk
    |cow: is a farm animal that gives milk
    |deer: is a shy animal of the forest
    |swan: is a big white bird that swims on lakes
    |hedgehog: is a small animal with many spines
    |turtle: is a slow animal with a hard shell
    |elephant: is the largest animal on land and has a long trunk
    |monkey: is a clever animal that climbs trees
    |penguin: is a bird that can not fly but swims very well
    |squirrel: is a small animal that collects nuts
    |donkey: is an animal with long ears that carries loads
    |sheep: is a farm animal that gives wool
    |pig: is a farm animal with a short round nose
    |crow: is a clever black bird
    |otter: is an animal that swims and eats fish
    |river: is water that flows through the land to the sea
    |mountain: is a very high hill
    |forest: is a place with many trees
    |book: is made of many pages with words to read
    |clock: is a thing that shows the time
    |baker: is somebody who makes bread
    |king: is a man who rules a country
    |queen: is a woman who rules a country
    |island: is land with water all around it
    |teacher: is somebody who helps others to learn
    |doctor: is somebody who helps people who are ill
    |robot: is a machine that can do work
    |dragon: is a big animal of old stories that breathes fire"""
    )
)
SOUNDS = {"dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink", "owl": "hoo"}
READINGS = (
    ("{name} has {a_color} {thing}.", "What does {name} have?|What color is the {thing} of {name}?"),
    ("{name} lives in {city}.", "Where does {name} live?|In which city does {name} live?"),
    ("{name} works as {a_job}.", "What is the job of {name}?|What does {name} do?"),
    ("{name} likes {dish}.", "What does {name} like?|What does {name} like to eat?"),
    ("{name} is {age} years old.", "How old is {name}?|What is the age of {name}?"),
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
GENERAL = tuple(
    tuple(line.split(" -> "))
    for line in alternatives(
        """Why is the sky blue? -> The air scatters blue light more than red light, so the sky
    looks blue.
    |Why is the grass green? -> Grass is green because its leaves take in red and blue light and send back the
    green.
    |How many days are in a week? -> There are seven days in a week.
    |How many months are in a year? -> There are twelve months in a year.
    |How many hours are in a day? -> There are twenty-four hours in a day.
    |How many minutes are in an hour? -> There are sixty minutes in an hour.
    |How many legs does a dog have? -> A dog has four legs.
    |How many legs does a spider have? -> A spider has eight legs.
    |How many legs does a bird have? -> A bird has two legs.
    |What are the days of the week? -> The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday,
    Saturday and Sunday.
    |What are the four seasons? -> The four seasons are spring, summer, autumn and winter.
    |What is water? -> Water is a clear liquid that all living things need.
    |What is the sun? -> The sun is the star that gives us light and warmth.
    |What is the moon? -> The moon is the bright ball of rock that goes around the earth.
    |What do bees make? -> Bees make honey.
    |What do cows give? -> Cows give milk.
    |Where do fish live? -> Fish live in water.
    |What is ice? -> Ice is frozen water.
    |What is a language model? -> A language model is a program that reads text and says which word may come next.
    |What is a GPU? -> A GPU is a chip that does many small sums at the same time.
    |What is JSON? -> JSON is a simple way to write down data as text, with names and values.
    |What is 1 + 1? -> 1 + 1 = 2.
    |What is the alphabet? -> The alphabet is: a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w,
    x, y, z.
    |What is the largest animal? -> The blue whale is the largest animal.
    |What is the highest mountain? -> Mount Everest is the highest mountain.
    |What color is the rainbow? -> A rainbow is red, orange, yellow, green, blue and purple.
    |What is the capital of the moon? -> The moon has no capital.
    |What time is it? -> I do not have a clock, so I do not know.
    |What is the weather like today? -> I can not see the weather, so I do not know.
    |What day is it today? -> I do not have a calendar, so I do not know."""
    )
)
RECIPES = dict(
    line.split(" -> ")
    for line in alternatives(
        """make tea -> Boil some water. / Put a tea bag into a cup. / Pour the water into the cup. / Wait four
    minutes. / Take out the bag and drink.
    |make soup -> Cut carrots and potatoes. / Boil water in a big pot. / Put everything into the pot with some
    salt. / Wait half an hour. / Eat the soup hot.
    |bake bread -> Mix flour, water, salt and yeast. / Wait one hour. / Form a round loaf. / Bake it for forty
    minutes. / Let it get cold.
    |boil an egg -> Boil water in a pot. / Put the egg into the water. / Wait six minutes. / Put the egg into cold
    water. / Add a little salt.
    |plant a tree -> Choose a place with sun. / Dig a deep hole. / Put the young tree into the hole. / Fill the
    hole with earth. / Water the tree every day.
    |make coffee -> Boil some water. / Put ground coffee into a filter. / Pour the water slowly. / Wait until the
    cup is full. / Add milk if you like.
    |write a letter -> Take paper and a pen. / Write Dear and the name. / Write what you want to say. / Sign with
    your name. / Send it."""
    )
)


def fact(rng: Random) -> Scene:
    """One fact of the tables."""
    kinds = (capital_city, capital_city, opposite, color_of, animal, order, general, recipe)
    question, answer = rng.choice(kinds)(rng)
    return [Exchange(loosely(rng, question), answer)]


def capital_city(rng: Random) -> tuple[str, str]:
    """A country and its capital, asked either way."""
    country, town = rng.choice(tuple(CAPITALS.items()))
    if rng.random() < 0.2:
        return f"Which country has the capital {town}?", f"{town} is the capital of {country}."
    form = """What is the capital of {it}?|Which city is the capital of {it}?|Capital of {it}?
    |Tell me the capital of {it}."""
    return pick(rng, form).format(it=country), f"The capital of {country} is {town}."


def opposite(rng: Random) -> tuple[str, str]:
    """A word and its opposite."""
    one, other = rng.sample(rng.choice(OPPOSITES), 2)
    form = "What is the opposite of {it}?|Opposite of {it}?|Tell me the opposite of {it}."
    return pick(rng, form).format(it=one), f"The opposite of {one} is {other}."


def color_of(rng: Random) -> tuple[str, str]:
    """The colour of a familiar thing."""
    thing, color = rng.choice(tuple(COLORED.items()))
    form = "What color is the {it}?|What color does the {it} have?|Which color is the {it}?"
    return pick(rng, form).format(it=thing), f"The {thing} is {color}."


def animal(rng: Random) -> tuple[str, str]:
    """What an animal or a thing is, or what it says."""
    if rng.random() < 0.15:
        name, sound = rng.choice(tuple(SOUNDS.items()))
        form = "What does the {it} say?|What sound does the {it} make?"
        return pick(rng, form).format(it=name), f"The {name} says {sound}."
    name, saying = rng.choice(tuple(ANIMAL_FACTS.items()))
    form = """What is {a}?|Tell me about the {it}.|What do you know about {a}?|Explain what {a} is.|What is {a}?
    |Tell me about {many}."""
    question = pick(rng, form).format(a=article(name), it=name, many=plural(name))
    return question, f"{capital(article(name))} {saying}."


def order(rng: Random) -> tuple[str, str]:
    """The day or month before or after another."""
    names = rng.choice((DAYS, MONTHS))
    place = rng.randrange(len(names))
    kind = "day" if names is DAYS else "month"
    word, step = rng.choice((("after", 1), ("before", -1)))
    form = "Which {kind} comes {word} {it}?|What {kind} is {word} {it}?|What comes {word} {it}?"
    answer = f"{names[(place + step) % len(names)]} comes {word} {names[place]}."
    return pick(rng, form).format(kind=kind, word=word, it=names[place]), answer


def general(rng: Random) -> tuple[str, str]:
    """A question that is asked in one form only."""
    question, answer = rng.choice(GENERAL)
    return question, answer


def recipe(rng: Random) -> tuple[str, str]:
    """How to do something, step by step."""
    what, steps = rng.choice(tuple(RECIPES.items()))
    form = "How do I {it}?|How can I {it}?|Tell me how to {it}.|How do you {it}?|Explain how to {it}."
    answer = "\n".join(f"{place}. {step}" for place, step in enumerate(steps.split(" / "), 1))
    return pick(rng, form).format(it=what), answer


def reading(rng: Random) -> Scene:
    """Two or three sentences, and one or two questions about them."""
    said, asked = rng.choice(READINGS)
    columns = (COLORS, THINGS, DISHES, JOBS, range(5, 95))
    facts = []
    drawn = list(zip(*(rng.sample(column, 3) for column in columns), strict=True))
    for name, (color, thing, dish, job, age) in zip(people(rng, rng.randint(2, 3)), drawn, strict=False):
        one = {"name": name, "thing": thing, "dish": dish, "age": age, "city": city(rng)}
        facts.append(one | {"a_color": article(str(color)), "a_job": article(str(job))})
    text = " ".join(said.format(**one) for one in facts)
    scene = []
    for turn, one in enumerate(rng.sample(facts, rng.randint(1, 2))):
        question = pick(rng, asked).format(**one)
        scene.append(Exchange(question if turn else f"{text} {question}", said.format(**one), varied=True))
    return scene


def plain_facts(rng: Random) -> str:
    """A few facts in a row, with no question."""
    kinds = (capital_city, opposite, color_of, animal, order)
    return " ".join(rng.choice(kinds)(rng)[1] for _ in range(rng.randint(2, 6)))
