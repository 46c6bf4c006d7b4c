"""Small JSON records: a sentence turned into a record, a record invented, and questions answered from one.

Records are written by `json.dumps` with its default spacing, on one line.
"""

import json
from random import Random

from deploy.train_model.exchange import Exchange, Scene, article, pick
from deploy.train_model.lexicon import COLORS, FOODS, JOBS, THINGS, city, people, person, plural

Record = dict[str, str | int | bool]

REQUESTS = """Write this as JSON: {text}|Turn this into JSON: {text}|Make a JSON record: {text}|{text} Write that as
JSON.
|Convert to JSON: {text}|JSON for this sentence: {text}|Give me a JSON record of this: {text}|As JSON: {text}
|Extract a JSON record from this sentence: {text}|{text} As JSON, please.|{text} Answer in JSON."""
KEYED_REQUESTS = """Write this as JSON with the keys {keys}: {text}|{text} Write it as JSON with the keys {keys}.
|Make a JSON record with {keys}: {text}"""


def person_record(rng: Random) -> tuple[Record, str]:
    """A person's record and a sentence that says the same."""
    record: Record = {"name": person(rng), "age": rng.randint(5, 95), "city": city(rng)}
    text = pick(
        rng,
        """{name} is {age} years old and lives in {city}.|{name} lives in {city} and is {age} years old.
        |{name}, {age}, lives in {city}.|{name} is {age} and comes from {city}.|{name} is {age} years old. {name} lives
        in {city}.""",
    )
    if rng.random() < 0.35:
        record["job"] = rng.choice(JOBS)
        text = text + " " + pick(rng, "{name} works as {a_job}.|{name} is {a_job}.")
        return record, text.format(**record, a_job=article(str(record["job"])))
    return record, text.format(**record)


def item_record(rng: Random) -> tuple[Record, str]:
    """A thing's record and a sentence that says the same."""
    record: Record = {"item": rng.choice(THINGS + FOODS), "color": rng.choice(COLORS), "price": rng.randint(1, 99)}
    text = pick(
        rng,
        """The {color} {item} costs {price} coins.|One {color} {item} is {price} coins.|{price} coins for the {color}
        {item}.
        |The {item} is {color} and costs {price} coins.|I bought the {color} {item} for {price} coins.""",
    )
    return record, text.format(**record)


def order_record(rng: Random) -> tuple[Record, str]:
    """An order's record and a sentence that says the same."""
    record: Record = {"customer": person(rng), "item": rng.choice(FOODS), "count": rng.randint(2, 30)}
    record["paid"] = rng.random() < 0.5
    form = "{customer} ordered {count} {items}|{customer} wants {count} {items}|{count} {items} for {customer}"
    paid = "and has paid.|and paid." if record["paid"] else "and has not paid.|but did not pay."
    text = f"{pick(rng, form)} {pick(rng, paid)}"
    return record, text.format(**record, items=plural(str(record["item"])))


KINDS = (person_record, person_record, item_record, order_record)
INVENTIONS = (
    (person_record, "Give me a JSON record of a person.|Make up a person as JSON.|Write a JSON object for a user."),
    (item_record, "Give me a JSON record of a thing.|Make up a product as JSON.|Write a JSON object for an item."),
    (person_record, "Write some JSON.|Give me a JSON example.|Answer with a JSON object.|Show me some JSON."),
)


def to_record(rng: Random) -> Scene:
    """A sentence to turn into a record, with all its keys or with those the user names."""
    record, text = rng.choice(KINDS)(rng)
    question = pick(rng, REQUESTS).format(text=text)
    if rng.random() < 0.25:
        keys = rng.sample(list(record), rng.randint(1, len(record)))
        record = {key: record[key] for key in keys}
        question = pick(rng, KEYED_REQUESTS).format(text=text, keys=", ".join(keys))
    return [Exchange(question, json.dumps(record), varied=True)]


def to_records(rng: Random) -> Scene:
    """Two or three people to turn into an array of records."""
    names = people(rng, rng.randint(2, 3))
    records: list[Record] = [{"name": name, "age": rng.randint(5, 95)} for name in names]
    text = " ".join(f"{record['name']} is {record['age']}." for record in records)
    question = pick(rng, REQUESTS).format(text=text)
    return [Exchange(question, json.dumps(records), varied=True)]


def invented(rng: Random) -> Scene:
    """A record of the model's own making."""
    kind, phrases = rng.choice(INVENTIONS)
    return [Exchange(pick(rng, phrases), json.dumps(kind(rng)[0]), varied=True)]


def person_questions(rng: Random) -> Scene:
    """Questions about a person's record."""
    record, _ = person_record(rng)
    name = record["name"]
    turns = [
        (f"How old is {name}?|What is the age of {name}?", f"{name} is {record['age']} years old."),
        (f"Where does {name} live?|Which city is {name} from?", f"{name} lives in {record['city']}."),
        ("What is the name?|Who is this?|What is the name in this record?", f"The name is {name}."),
    ]
    return asked_of(rng, record, turns)


def item_questions(rng: Random) -> Scene:
    """Questions about a thing's record."""
    record, _ = item_record(rng)
    item = record["item"]
    turns = [
        (f"What color is the {item}?|Which color does it have?", f"The {item} is {record['color']}."),
        (f"How much is the {item}?|What does the {item} cost?", f"The {item} costs {record['price']} coins."),
        ("What is the price?|How much is it?", f"The {item} costs {record['price']} coins."),
        ("What is the item?|What thing is this?", f"The item is {article(str(item))}."),
    ]
    return asked_of(rng, record, turns)


def asked_of(rng: Random, record: Record, turns: list[tuple[str, str]]) -> Scene:
    """One or two of the turns, the record shown with the first."""
    scene = []
    for place, (questions, answer) in enumerate(rng.sample(turns, rng.randint(1, 2))):
        question = pick(rng, questions)
        if not place:
            form = rng.choice(("{record}\n{question}", "{record} {question}", "Here is a record: {record} {question}"))
            question = form.format(record=json.dumps(record), question=question)
        scene.append(Exchange(question, answer, varied=True))
    return scene


def is_right(reply: str, answer: str) -> bool:
    """True when the reply is JSON and says the same as the answer."""
    try:
        return bool(json.loads(reply) == json.loads(answer))
    except ValueError:
        return False


def is_json(reply: str) -> bool:
    """True when the reply can be read as JSON."""
    try:
        json.loads(reply)
    except ValueError:
        return False
    return True
