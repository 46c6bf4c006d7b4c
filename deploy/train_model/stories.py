"""Longer English: stories, short poems, letters and days, all put together from sentences written for this module.

A story follows one plot from beginning to end; hero, friend, place and things are drawn, and the words the user names
(an animal, a person, a made-up creature) come back in it.
"""

from random import Random

from deploy.train_model.exchange import Exchange, Scene, alternatives, article, capital, loosely, pick
from deploy.train_model.lexicon import (
    ANIMALS,
    BEINGS,
    COLORS,
    DISHES,
    FOODS,
    PEOPLE,
    PLACES,
    THINGS,
    TRAITS,
    made_up_word,
    people,
    person,
    plural,
)

OPENINGS = """Once upon a time, there was {a_trait_hero} named {name}. {name} lived {place}.
|Once upon a time, {a_trait_hero} named {name} lived {place}.
|There once was {a_hero} called {name}. {name} was very {trait} and lived {place}.
|Long ago, {a_trait_hero} lived {place}. The name of the {hero} was {name}.
|In the days when the world was young, {a_trait_hero} called {name} lived {place}."""
HABITS = """Every morning {name} went for a walk and said hello to everyone.|{name} loved to look at the stars at night.
|{name} liked nothing more than {dish} and a warm fire.|Most of all, {name} liked to sing.
|{name} had a {color} {thing} and took it everywhere.|Everyone there knew {name} and liked the {trait} {hero}.
|The days were quiet, and {name} was content."""
PLOTS = (
    """One day the {color} {thing} of {name} was gone.|One morning {name} could not find the {color} {thing}.
    //{name} looked under the bed, behind the door and in the garden, but it was not there.
    |{name} looked everywhere, but the {thing} was not in the house and not in the garden.
    //Then {a_friend} named {other} came by. "Why are you sad?" asked {other}.
    |On the road {name} met {a_friend} named {other}. "What are you looking for?" asked {other}.
    //"I have lost my {thing}," said {name}. "Let us look together," said {other}.
    //They looked all day, and at last they found the {thing} under an old tree.
    |They walked along the river, and there, between two stones, was the {color} {thing}.
    //{name} was so glad that they shared {a_food} and laughed until evening.""",
    """One night a great storm came. The wind was loud and the rain did not stop.
    |One evening the sky turned black, and a storm began.
    //In the middle of the storm, {name} heard somebody call for help.|Then {name} heard a small voice outside.
    //It was {a_friend} named {other}, wet and cold. "My house is gone," said {other}.
    //{name} opened the door at once. "Come in," said {name}. "There is room for two."
    //They sat by the fire, ate {dish} and listened to the rain.|{other} ate {dish}, got warm and fell asleep by the
    fire.
    //In the morning the sun was back, and together they built a new house for {other}.""",
    """One day {name} found an old map under a stone.|One day an old map fell out of a book, right in front of {name}.
    //The map showed a cross next to a tall tree, far behind the hills.
    //{name} took {a_food} and {a_thing} and set out at once.|{name} packed {a_food} and {a_thing} and left before
    sunrise.
    //The way was long. Half way there, {name} met {a_friend} named {other}, who came along.
    //Under the tall tree they found a box, and in the box there was {a_color_thing} and a letter.
    //"The best treasure is a friend on the road," said the letter, and {name} and {other} had to smile.""",
    """One day there was a big race in the village, and {name} wanted to win it.
    |Once a year there was a race around the lake, and this year {name} wanted to run too.
    //"You are too slow," laughed {a_friend} named {other}.|{a_friend_cap} named {other} laughed. "You will never win,"
    said {other}.
    //But {name} practised every day, in the sun and in the rain.
    //On the day of the race {other} ran very fast, but soon {other} was tired and sat down under a tree.
    //{name} did not stop. Step by step the {trait} {hero} went on and came in first.
    //{other} was ashamed, but {name} said, "Let us run together next time." And so they did.""",
    """One winter there was very little to eat.|That winter was cold and long, and food was hard to find.
    //{name} had one last {food} and wanted to keep it.|All that {name} had left was {a_food}.
    //Then {a_friend} named {other} knocked at the door. "I am so hungry," said {other}.
    //{name} thought for a moment, cut the {food} in two and gave {other} one half.
    //When spring came, {other} came back with a basket full of {foods}.
    //"You shared with me when you had almost nothing," said {other}. "Now I share with you." """,
    """{name} had one big wish: to see the northern lights.|More than anything, {name} wanted to see the northern
    lights.
    //"It is too far," said everyone. But {name} took {a_thing} and set out.
    //On the first day {name} crossed the forest. On the second day {name} climbed a mountain.
    //On the third day {name} met {a_friend} named {other}, who knew the way.
    //That night they saw it: the sky was full of green and purple light.
    //They sat in the snow until the sun came up, and nobody said a word.""",
    """One day {a_friend} named {other} moved in next door.|One spring {a_friend} named {other} came to live close by.
    //At first {name} was shy and did not say hello.|{name} did not know what to say to {other} and hid behind the door.
    //But {other} could not open the heavy gate, and so {name} came out to help.
    //"Thank you," said {other}. "Would you like some {dish}?"
    //They ate together, and {name} showed {other} the garden and the old {color} {thing}.
    //From that day on they were friends and saw each other every day.""",
    """One day {name} wanted to learn how to make {a_thing}.|{name} wanted to make {a_thing}, but did not know how.
    //The first one broke. The second one fell apart. The third one was far too small.
    //"I will never learn it," said {name} and began to cry.
    //Then {a_friend} named {other} sat down beside {name}. "Nobody can do it on the first day," said {other}.
    //They tried again together, slowly, one step after the other.
    //In the evening there was {a_color_thing} on the table, and {name} had made it with both hands.""",
)
ENDINGS = """And they lived happily ever after.|From that day on, {name} and {other} were the best of friends.
|And if you go there today, you can still hear them laugh.|That night {name} fell asleep with a smile.
|And {name} never forgot that day.|So {name} learned that it is good to have a friend.
|Since then everyone there tells the story of {name} and {other}."""
ASKED_PLAINLY = """Tell me a story.|Tell me a story|Write a story.|Write a short story.|Can you tell me a story?
    |tell me a story|I want to hear a story.|Tell me a bedtime story.|Once more, a story please.|Tell me another story.
    |Tell me a short story."""
ASKED_ABOUT = """Tell me a story about {it}.|Write a story about {it}.|Write a short story about {it}.
    |tell me a story about {it}|Can you tell me a story about {it}?|A story about {it}, please.
    |I would like a story about {it}.|Tell me about {it} in a story.|Tell me a short story about {it}.
    |Write me a story about {it}."""
VERSES = """The {color} {noun} is far away, / I think about {it} all day, / It comes at night, it goes by day,
    / And here it is, and here will stay.
    |The {noun} is bright, the {noun} is small, / I see {it} by the garden wall, / It does not hear me when I call,
    / And yet I love it most of all.
    |O {noun}, O {noun}, where do you go / When winter brings the wind and snow? / I asked the river, soft and slow,
    / The river said: I do not know.
    |One {noun} in the morning light, / One {noun} to watch the stars at night, / The world is wide, the moon is white,
    / And all that was so dark is bright."""
POEM_REQUESTS = """Write a poem about {it}.|Write me a poem about {it}.|A poem about {it}, please.
    |write a short poem about {it}|Can you write a poem about {it}?|Make a poem about {it}."""
LETTER = """Dear {name},//thank you for the {color} {thing}. It is very beautiful.|how are you? I hope that all is well
with you.
|I write to you because I have good news.//Yesterday I bought {a_thing}, and today I made {dish} for everyone.
|The weather here is fine, and every day I walk by the river.//Please come and see me soon. We will eat {dish} and talk
all night.
|Please write back soon and tell me how you are.//Your friend {other}"""


def hero(rng: Random) -> str:
    """Who a story is about."""
    if rng.random() < 0.08:
        return made_up_word(rng)
    return rng.choice(rng.choice((ANIMALS, ANIMALS, PEOPLE, BEINGS)))


def slots(rng: Random, main: str, name: str) -> dict[str, str]:
    """The words that fill a story's places."""
    trait, color, thing, food = rng.choice(TRAITS), rng.choice(COLORS), rng.choice(THINGS), rng.choice(FOODS)
    friend = rng.choice([animal for animal in ANIMALS if animal != main])
    other = next(other for other in people(rng, 2) if other != name)
    return {
        "name": name, "other": other, "hero": main, "trait": trait, "color": color, "thing": thing, "food": food,
        "dish": rng.choice(DISHES),
        "place": rng.choice(PLACES), "foods": plural(food), "a_hero": article(main), "a_friend": article(friend),
        "a_trait_hero": f"{article(trait)} {main}", "a_food": article(food), "a_thing": article(thing),
        "a_friend_cap": capital(article(friend)), "a_color_thing": f"{article(color)} {thing}",
    }  # fmt: skip


def story_text(rng: Random, words: dict[str, str]) -> str:
    """A story of one plot, in three paragraphs most of the time."""
    steps = [pick(rng, step) for step in rng.choice(PLOTS).split("//")]
    opening = pick(rng, OPENINGS) + (" " + pick(rng, HABITS) if rng.random() < 0.6 else "")
    middle = rng.randint(2, 4)
    parts = [opening, " ".join(steps[:middle]), " ".join([*steps[middle:], pick(rng, ENDINGS)])]
    return ("\n\n" if rng.random() < 0.8 else " ").join(parts).format(**words)


def story(rng: Random) -> Scene:
    """A story, about whom the user wants."""
    main, name = hero(rng), person(rng)
    words = slots(rng, main, name)
    roll = rng.random()
    if roll < 0.3:
        question = pick(rng, ASKED_PLAINLY)
    else:
        it = article(main)
        if roll > 0.75:
            it += f" {pick(rng, 'named|called')} {name}"
        elif roll > 0.6:
            it = words["a_trait_hero"]
        question = loosely(rng, pick(rng, ASKED_ABOUT).format(it=it))
    return [Exchange(question, story_text(rng, words), varied=True)]


def plain_story(rng: Random) -> str:
    """A story with no question before it."""
    return story_text(rng, slots(rng, hero(rng), person(rng)))


def poem(rng: Random) -> Scene:
    """Four or eight lines about a thing."""
    word = made_up_word(rng) if rng.random() < 0.1 else rng.choice(rng.choice((ANIMALS, THINGS, BEINGS, FOODS)))
    verses = rng.sample(alternatives(VERSES), rng.randint(1, 2))
    words = {"noun": word, "it": f"the {word}", "color": rng.choice(COLORS)}
    text = "\n\n".join(verses).replace(" / ", "\n").format(**words)
    asked = pick(rng, f"the {word}|{article(word)}|{plural(word)}")
    question = loosely(rng, pick(rng, POEM_REQUESTS).format(it=asked))
    return [Exchange(question, text, varied=True)]


def letter(rng: Random) -> Scene:
    """A short letter to somebody."""
    name = person(rng)
    words = slots(rng, "friend", name)
    parts = [pick(rng, part).format(**words) for part in LETTER.split("//")]
    text = f"{parts[0]}\n\n{' '.join(parts[1:-1])}\n\n{parts[-1]}"
    form = """Write a letter to {name}.|Write a short letter to {name}.|Can you write to {name} for me?
    |Write an email to {name}."""
    return [Exchange(loosely(rng, pick(rng, form).format(name=name)), text, varied=True)]
