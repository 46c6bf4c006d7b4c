"""What a grammar makes a model write is what the parser of the same format reads; nothing else can be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes.embedded_app import embedded_codec
from fakes.tiny_model import byte_level_bpe, write_tiny_model

from penstock.cluster.model_directory import EMBEDDED_MODEL, describe
from penstock.cluster.text import TextCodec, load_text
from penstock.cluster.tool_calls.call_grammar import enforceable, forced_calls, possible_calls
from penstock.cluster.tool_calls.formats import FORMATS, PLAIN_FORMAT
from penstock.cluster.tool_calls.parsing import CallParser
from penstock.workers.errors import GrammarError
from penstock.workers.grammar import CompiledGrammar, GrammarVocabulary
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec
from penstock.workers.settings import RunnerSettings

ENDS = (0, 4)
SCHEMAS: dict[str, Any] = {
    "add": {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    },
    "look": {"type": "object"},
}
WRITTEN = [name for name, form in FORMATS.items() if form.written is not None]
GOOD, OTHER = ("add", '{"n": 1}'), ("look", '{"a": [{}]}')


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return embedded_codec()


@pytest.fixture(scope="module")
def vocabulary() -> GrammarVocabulary:
    return GrammarVocabulary((EMBEDDED_MODEL / "tokenizer.json").read_text(), 1536)


def written(form: str, *calls: tuple[str, str]) -> str:
    """The calls as the format's table says."""
    how = FORMATS[form].written
    assert how is not None
    mark = FORMATS[form].marks[0] if not FORMATS[form].opener else ""
    texts = [how.before.replace("NAME", name) + arguments + how.behind for name, arguments in calls]
    if how.between is None:
        return "\n".join(mark + how.begin + text + how.end for text in texts)
    return mark + how.begin + how.between.join(texts) + how.end


def ends(vocabulary: GrammarVocabulary, codec: TextCodec, grammar: str, text: str) -> bool | None:
    """Whether the text may end there; None: it may not even be written."""
    compiled = CompiledGrammar(GrammarSpec(GrammarKind.LARK, grammar, ENDS), vocabulary)
    try:
        guide = compiled.guide(tuple(codec.encode(text, "text")))
    except GrammarError:
        return None
    return bool(int(guide.mask[0]) & 1)


@pytest.mark.parametrize("form", WRITTEN)
def test_forced_calls(vocabulary: GrammarVocabulary, codec: TextCodec, form: str) -> None:
    several = forced_calls(FORMATS[form], SCHEMAS, codec.split_specials, True)
    one = forced_calls(FORMATS[form], SCHEMAS, codec.split_specials, False)
    alone, both = written(form, GOOD), written(form, GOOD, OTHER)
    assert ends(vocabulary, codec, several, alone)
    assert ends(vocabulary, codec, one, alone)
    assert ends(vocabulary, codec, several, both)
    assert ends(vocabulary, codec, one, both) is None
    assert ends(vocabulary, codec, several, "") is False
    for wrong in ("Hello", written(form, ("add", '{"n": "1"}')), written(form, ("nobody", "{}"))):
        assert ends(vocabulary, codec, several, wrong) is None
    parser = CallParser(FORMATS[form], SCHEMAS)
    reading = parser.push(both)
    assert (reading.content, parser.complete) == ("", 2)
    for call, arguments in enumerate((GOOD[1], OTHER[1])):
        assert "".join(piece.arguments for piece in reading.calls if piece.index == call) == arguments


@pytest.mark.parametrize("form", WRITTEN)
def test_possible_calls(vocabulary: GrammarVocabulary, codec: TextCodec, form: str) -> None:
    free = possible_calls(FORMATS[form], SCHEMAS, codec.split_specials, True)
    lead = "" if FORMATS[form].opener else "So: "
    for text in ("", "Hello {} world", lead + written(form, GOOD), lead + written(form, GOOD, OTHER)):
        assert ends(vocabulary, codec, free, text), text
    assert ends(vocabulary, codec, free, lead + written(form, ("add", '{"n": "1"}'))) is None
    schema = {"type": "object", "required": ["z"]}
    if FORMATS[form].opener:  # begins as any JSON does
        with pytest.raises(ValueError, match="apart"):
            possible_calls(FORMATS[form], SCHEMAS, codec.split_specials, True, schema)
        return
    answer = possible_calls(FORMATS[form], SCHEMAS, codec.split_specials, True, schema)
    assert ends(vocabulary, codec, answer, written(form, GOOD))
    assert ends(vocabulary, codec, answer, '{"z": 1}')
    assert ends(vocabulary, codec, answer, "Hello") is None


def test_lenient_refuses_only_what_is_no_schema(vocabulary: GrammarVocabulary, codec: TextCodec) -> None:
    def tried(schema: Any) -> None:
        lark = possible_calls(FORMATS["hermes"], {"f": schema}, codec.split_specials, True, lenient=True)
        CompiledGrammar(GrammarSpec(GrammarKind.LARK, lark, ENDS), vocabulary)

    tried({"type": "object", "not": {"required": ["a"]}, "properties": {"a": {"type": "string", "format": "odd"}}})
    for wrong in ({"properties": 5}, {"properties": {"a": {"type": "strange"}}}, {"$ref": "http://127.0.0.1:1/s"}):
        with pytest.raises(GrammarError):
            tried({"type": "object", **wrong})


def test_a_format_that_is_only_read_is_enforced_as_a_plain_list() -> None:
    assert enforceable(FORMATS["qwen3_coder"]) is PLAIN_FORMAT is enforceable(None)
    with pytest.raises(ValueError, match="enforced"):
        forced_calls(FORMATS["qwen3_coder"], SCHEMAS, lambda text: [text], True)


def test_marks_that_are_special_tokens(tmp_path: Path) -> None:
    """As Mistral has them: named by id in grammars, shown to the parser, and hidden from everybody else."""
    directory = write_tiny_model(tmp_path / "model")
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens(["[TOOL_CALLS]"])
    tokenizer.save(str(directory / "tokenizer.json"))
    templates = [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "tool_use", "template": "[TOOL_CALLS] {{ tools[0].function.name }} {{ messages[0].content }}"},
    ]
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": templates})
    )
    model = describe(RunnerSettings(model_dir=str(directory)))
    codec = load_text(model, False, 512)
    mark = tokenizer.token_to_id("[TOOL_CALLS]")
    assert codec.tool_format is FORMATS["mistral"]
    assert codec.split_specials("a[TOOL_CALLS]b") == ["a", mark, "b"]
    assert load_text(model, False, 512, "hermes").tool_format is FORMATS["hermes"]
    asked = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "f"}}
    assert codec.decode(codec.encode_chat(asked), False) == "hi"
    assert codec.decode(codec.encode_chat(asked, tools=[tool]), False) == "[TOOL_CALLS] f hi"
    tokens = [mark, *codec.encode('[{"name": "add", "arguments": {"n": 1}}]', "text")]
    assert codec.decode(tokens).startswith("[{")
    assert codec.stream(show_calls=True).push(tokens).startswith("[TOOL_CALLS][{")
    vocabulary = GrammarVocabulary(codec.tokenizer_json, codec.vocab_size)
    for lark in (
        forced_calls(FORMATS["mistral"], SCHEMAS, codec.split_specials, True),
        possible_calls(FORMATS["mistral"], SCHEMAS, codec.split_specials, True),
    ):
        spec = GrammarSpec(GrammarKind.LARK, lark, codec.eos_token_ids)
        guide = CompiledGrammar(spec, vocabulary).guide(tuple(tokens))
        end = codec.eos_token_ids[0]
        assert int(guide.mask[end // 32]) >> (end % 32) & 1
