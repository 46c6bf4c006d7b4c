"""Calls are read the same however their text is cut, in every format; what is no call is content to its last letter."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from penstock.cluster.tool_calls.formats import FORMATS, detected
from penstock.cluster.tool_calls.parsing import CallParser

SCHEMAS: dict[str, Any] = {
    "f": {"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}}},
    "g": {"type": "object"},
}
F, G = ("f", '{"a": 1}'), ("g", "{}")
Calls = list[tuple[str, str]]


def read(form: str, pieces: list[str], cut: bool = False) -> tuple[str, Calls, int]:
    """Content, calls that were not taken back, and how many the parser says are complete."""
    parser = CallParser(FORMATS[form], SCHEMAS)
    content, calls, ids = "", {}, set()
    for reading in [*map(parser.push, pieces), parser.finish(cut)]:
        content += reading.content
        for piece in reading.calls:
            if piece.dropped:
                del calls[piece.index]
            elif piece.id:
                assert piece.index == len(calls)
                assert piece.arguments == ""
                calls[piece.index] = [piece.name, ""]
                ids.add(piece.id)
            else:
                calls[piece.index][1] += piece.arguments
    assert len(ids) >= len(calls)
    return content, [(name, arguments) for name, arguments in calls.values()], parser.complete


def cuts(text: str, seed: int) -> list[str]:
    draw, pieces = random.Random(seed), []
    while text:
        size = draw.randint(1, 6)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


DEEP_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
DEEP_V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
DEEP = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
CALLS: list[tuple[str, str, str, Calls]] = [
    ("hermes", 'So.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "So.", [F]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>\n{"arguments": {}, "name": "g"}'
        "\n</tool_call>\nDone.\n",
        "\nDone.",
        [F, G],
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"s": "\\"}{\\\\"}, "id": [{}]}</tool_call>',
        "",
        [("f", '{"s": "\\"}{\\\\"}')],
    ),
    ("hermes", '<think>\nHm.\n</think>\n\n<tool_call>{"name": "g"}', "<think>\nHm.\n</think>", [G]),
    ("llama3_json", ' {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', "", [F, G]),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [F]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abc"}, {"name": "g"}]', "", [F, G]),
    ("mistral", 'Well[TOOL_CALLS]f[CALL_ID]1[ARGS]{"a": 1}[TOOL_CALLS]g{}', "Well", [F, G]),
    ("deepseek_v3", "x" + DEEP.format(DEEP_V3.format(*F) + "\n" + DEEP_V3.format(*G)), "x", [F, G]),
    ("deepseek_v31", "x" + DEEP.format(DEEP_V31.format(*F) + DEEP_V31.format(*G)), "x", [F, G]),
    (
        "qwen3_coder",
        "x\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=s>\n1 < 2\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call><function=g></function></tool_call>",
        "x",
        [("f", '{"a": 1, "s": "1 < 2\\n3"}'), G],
    ),
    ("json", '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]', "", [F, G]),
]
HERMES = '<tool_call>{{"name": "f", "arguments": {}}}</tool_call>'
NO_CALLS = [
    ("hermes", "Plain text, with a <tool and some space. \n\n"),
    ("hermes", " \n "),
    ("hermes", "x\n" + HERMES.format('{"a": }')),
    ("hermes", HERMES.format('{"a": NaN}')),
    ("hermes", HERMES.format('"text"')),
    ("hermes", HERMES.format("[1]")),
    ("hermes", HERMES.format('{"a": ' + "[" * 200 + "]" * 200 + "}")),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}, "arguments": {"a": 2}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}, "name": "g"}</tool_call> after'),
    ("hermes", '<tool_call>{"name": "nobody", "arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1'),
    ("hermes", "<tool_call>" + "no brace " * 100),
    ("hermes", "<tool_call>\n"),
    ("llama3_json", '{"name": "Rex", "age": 3}'),
    ("llama3_json", "Say {} twice."),
    ("mistral", '[TOOL_CALLS]nobody{"a": 1}'),
    ("deepseek_v31", DEEP.format("<｜tool▁call▁begin｜>f{}")),
    ("qwen3_coder", "<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter></function>"),
    ("qwen3_coder", "<tool_call><function=f>words</function></tool_call>"),
    ("qwen3_coder", "<tool_call><function=nobody></function></tool_call>"),
    ("json", "[1, 2]"),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CALLS)
def test_calls_however_they_are_cut(form: str, text: str, content: str, calls: Calls) -> None:
    assert read(form, [text]) == (content, calls, len(calls))
    for pieces in [list(text), *(cuts(text, seed) for seed in range(20))]:
        assert read(form, pieces) == (content, calls, len(calls))


@pytest.mark.parametrize(("form", "text"), NO_CALLS)
def test_what_is_no_call_is_content(form: str, text: str) -> None:
    for pieces in [[text], list(text), *(cuts(text, seed) for seed in range(20))]:
        assert read(form, pieces) == (text, [], 0)


def test_a_good_call_stays_when_the_next_is_none() -> None:
    text = HERMES.format('{"a": 1}') + HERMES.format("{nonsense}") + " and so on"
    for seed in range(20):
        content, calls, complete = read("hermes", cuts(text, seed))
        assert (content, calls, complete) == (HERMES.format("{nonsense}") + " and so on", [F], 1)


def test_arguments_come_as_they_are_written() -> None:
    parser = CallParser(FORMATS["hermes"], SCHEMAS)
    first = parser.push('<tool_call>{"name": "f", "arguments": {"s": "ab')
    assert [(piece.name, piece.arguments) for piece in first.calls] == [("f", ""), ("", '{"s": "ab')]
    assert [piece.arguments for piece in parser.push("cd").calls] == ["cd"]
    assert [piece.arguments for piece in parser.push('"}').calls] == ['"}']
    assert parser.push("}</tool_call>").calls == ()
    assert parser.complete == 1


def test_a_call_that_was_cut_short_by_its_length_is_told_as_far_as_it_goes() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1'
    assert read("hermes", list(text), cut=True) == ("", [("f", '{"a": 1')], 0)
    assert read("hermes", list(text[:20]), cut=True) == (text[:20], [], 0)


def test_an_object_that_names_its_tool_last_is_safe_to_send() -> None:
    text = '<tool_call>{"arguments": {"s": "\\ud800"}, "name": "f"}'
    ((_, arguments),) = read("hermes", [text])[1]
    assert json.loads(arguments.encode().decode()) == {"s": "\ud800"}


def test_ids_are_made_for_every_call_and_of_the_form_that_templates_take() -> None:
    made = [FORMATS["hermes"].new_id() for _ in range(100)]
    assert len(set(made)) == 100
    assert all(one.startswith("call_") and len(one) == 29 for one in made)
    assert all(len(FORMATS["mistral"].new_id()) == 9 for _ in range(9))


@pytest.mark.parametrize("form", FORMATS)
def test_random_text_never_raises_and_is_never_lost(form: str) -> None:
    draw = random.Random(form)
    parts = [*FORMATS[form].marks, *FORMATS[form].gaps, '{"name": "f", "arguments": ', "<function=f>", "<parameter=a>"]
    parts += ["</parameter>", "</function>", '{"a": 1}', "{", "}", '"', "\\", "[", "]", " ", "\n", "f", "1", ","]
    for _ in range(400):
        text = "".join(draw.choice(parts) for _ in range(draw.randint(1, 30)))
        seen = [read(form, pieces) for pieces in ([text], list(text), cuts(text, draw.randint(0, 99)))]
        assert seen[0] == seen[1] == seen[2]
        content, calls, complete = seen[0]
        assert complete == len(calls)
        for name, arguments in calls:
            assert name in SCHEMAS
            assert isinstance(json.loads(arguments), dict)
        assert calls or content.strip() == text.strip()


@pytest.mark.parametrize(
    ("form", "lead", "part"),
    [
        ("hermes", "", "<tool_cal"),
        ("hermes", "", " \n"),
        ("hermes", "<tool_call>", "{"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "', "\\"),
        ("hermes", '<tool_call>{"name": "g", "arguments": {}}', " "),
        ("hermes", "", '<tool_call>{"name": "g", "arguments": {}}</tool_call>'),
        ("qwen3_coder", "<tool_call><function=f><parameter=a>", "</paramete"),
        ("llama3_json", "", " "),
    ],
)
def test_time_is_linear(form: str, lead: str, part: str) -> None:
    """Four times the text takes at most some ten times as long, piece by piece; a quadratic reader takes sixteen."""

    def seconds(count: int) -> float:
        best = float("inf")
        for _ in range(3):
            began = time.process_time()
            read(form, [lead, *([part] * count)])
            best = min(best, time.process_time() - began)
        return best

    assert seconds(8_000) < 10 * seconds(2_000) + 0.05


def test_formats_are_told_apart_by_templates() -> None:
    assert detected("{{ messages }}") is None
    for text, name in {
        "<tool_call>": "hermes",
        "<tool_call> <function=": "qwen3_coder",
        "[TOOL_CALLS]": "mistral",
        "<｜tool▁calls▁begin｜> ```json": "deepseek_v3",
        "<｜tool▁calls▁begin｜>": "deepseek_v31",
        '{"name": ..., "parameters": ': "llama3_json",
    }.items():
        found = detected(text)
        assert found is not None
        assert found.name == name
