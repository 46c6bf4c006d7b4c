"""The documents of the training text: conversations of one or more turns, and plain texts.

A document is a list of pieces, each a text and the weight of its tokens in the loss. The chat markers are written here
exactly as the chat template renders them; `tests/deploy` compares the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from deploy.train_model.addition import addition, sums_text, word_problem
from deploy.train_model.exchange import Exchange, Scene, Topic, pick
from deploy.train_model.facts import fact, plain_facts, reading
from deploy.train_model.lists import counting, list_question, list_task
from deploy.train_model.records import invented, item_questions, person_questions, to_record, to_records
from deploy.train_model.stories import letter, plain_story, poem, story
from deploy.train_model.talk import memory, small_talk, unknown

END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (END_OF_TEXT, SYSTEM, USER, ASSISTANT, END)
CHAT_TEMPLATE = """\
{%- if tools -%}
  {{- '<|system|>Tools:' -}}
  {%- for tool in tools -%}{{- ' ' + tool['function'] | tojson -}}{%- endfor -%}
  {{- ' Call one: <tool_call>\\n{"name": NAME, "arguments": {}}\\n</tool_call><|end|>' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|system|>' if message['role'] == 'developer' else '<|' + message['role'] + '|>' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] or [] -%}{{- part['text'] -}}{%- endfor -%}
  {%- endif -%}
  {%- for call in message['tool_calls'] or [] -%}
    {{- '<tool_call>\\n{"name": "' + call['function']['name'] + '", "arguments": ' -}}
    {{- call['function']['arguments'] | tojson + '}\\n</tool_call>' -}}
  {%- endfor -%}
  {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
SYSTEM_PROMPTS = """You are a helpful assistant.|You are a helpful, friendly assistant.|Answer briefly.|You are an AI
assistant.
|You are the Penstock demo model.|Be polite.|You are a helpful assistant. Answer in one sentence.|Please help the
user."""
ASKED_WEIGHT = 0.1
TOPICS: tuple[tuple[Topic, float], ...] = (
    (addition, 30),
    (word_problem, 4),
    (list_task, 17),
    (list_question, 2),
    (counting, 2),
    (to_record, 8),
    (to_records, 1.5),
    (invented, 1),
    (person_questions, 2),
    (item_questions, 2),
    (story, 8),
    (poem, 1.5),
    (letter, 1.5),
    (fact, 9),
    (reading, 5),
    (small_talk, 6),
    (unknown, 4),
    (memory, 4),
)
PLAIN = (plain_story, plain_story, plain_story, sums_text, sums_text, sums_text, plain_facts)


@dataclass(frozen=True)
class Piece:
    """A stretch of a document and what each of its tokens weighs in the loss."""

    text: str
    weight: float


Document = list[Piece]


def any_scene(rng: Random) -> Scene:
    """A scene of a topic, drawn by the shares of the topics."""
    topics = [topic for topic, _ in TOPICS]
    return rng.choices(topics, [share for _, share in TOPICS])[0](rng)


def scene(rng: Random) -> Scene:
    """A scene of a topic, with nothing in it that is held out."""
    while True:
        drawn = any_scene(rng)
        if not any(exchange.held_out for exchange in drawn):
            return drawn


def several_scenes(rng: Random, count: int) -> Scene:
    """Scenes one after the other; what is to be remembered may be asked for only at the end."""
    turns: Scene = []
    later: Scene = []
    for _ in range(count):
        drawn = scene(rng)
        if len(drawn) == 2 and drawn[1].question.lower().find(" my ") > 0 and rng.random() < 0.5 and not later:
            later = drawn[1:]
            drawn = drawn[:1]
        turns += drawn
    return turns + later


def rendered(turns: list[Exchange], system: str | None = None) -> Document:
    """The conversation as the chat template writes it."""
    document = [Piece(f"{SYSTEM}{system}{END}", ASKED_WEIGHT)] if system else []
    for turn in turns:
        document.append(Piece(f"{USER}{turn.question}{END}{ASSISTANT}", ASKED_WEIGHT))
        document.append(Piece(f"{turn.answer}{END}", 1.0))
    return document


def documents(rng: Random, long_share: float) -> Iterator[Document]:
    """Documents without end; `long_share` of them are conversations of many turns."""
    while True:
        if rng.random() < 0.08:
            yield [Piece(rng.choice(PLAIN)(rng) + END_OF_TEXT, 1.0)]
            continue
        count = rng.randint(8, 30) if rng.random() < long_share else rng.choice((1, 1, 1, 1, 2, 3))
        system = pick(rng, SYSTEM_PROMPTS) if rng.random() < 0.12 else None
        yield [*rendered(several_scenes(rng, count), system), Piece(END_OF_TEXT, ASKED_WEIGHT)]
