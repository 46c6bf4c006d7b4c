"""How each family of models writes tool calls: a closed table, by the names that `--tool-call-parser` takes.

`parsing.py` reads with a format, `call_grammar.py` writes a grammar of it, `text.py` finds the one that a model's chat
template tells. A new format that fits the fields is one entry; one that does not brings a `CallBody` of its own.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from penstock.cluster.tool_calls.call_body import CallBody, Schemas
from penstock.cluster.tool_calls.object_body import ObjectBody
from penstock.cluster.tool_calls.tag_body import TagBody

_NAME = r"(?P<name>[A-Za-z0-9_-]{1,64})"
_SHORT = string.ascii_letters + string.digits


class After(Enum):
    """What may come behind a text between calls."""

    CALL = auto()  # another call
    TEXT = auto()
    GAP = auto()  # more such texts


@dataclass(frozen=True, slots=True)
class Written:
    """Calls as the model is made to write them: mark, begin, calls with `between` between them, end.

    `before` and `behind` stand around the arguments; NAME is the tool's. `between` None: one call per mark, and the
    marks in lines of their own.
    """

    begin: str
    before: str
    behind: str
    between: str | None
    end: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls. `marks` begin calls anywhere in the text; `opener` does at its beginning, and is the
    first character of the call's own text. `specials`: other texts of the format that may be special tokens."""

    name: str
    marks: tuple[str, ...]
    body: Callable[[Schemas], CallBody]
    gaps: Mapping[str, After]
    written: Written | None  # None: enforced calls are written in the plain format
    telling: tuple[str, ...] = ()  # a template with all of these texts speaks it
    opener: str = ""
    specials: tuple[str, ...] = ()
    new_id: Callable[[], str] = field(default=lambda: f"call_{secrets.token_hex(12)}")


def _objects(lead: str) -> Callable[[Schemas], CallBody]:
    pattern = re.compile(lead)
    return lambda schemas: ObjectBody(pattern, schemas)


def _short_id() -> str:
    """Mistral's templates refuse every other form."""
    return "".join(secrets.choice(_SHORT) for _ in range(9))


_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END, _SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_DEEPSEEK_GAPS = {"```": After.GAP, _CALL_END: After.GAP, _CALL: After.CALL, _CALLS_END: After.TEXT}
_PLAIN = '{"name": "NAME", "parameters": '
PLAIN_FORMAT = ToolFormat(
    "json", (), _objects(r"\[?\s*"), {",": After.CALL, "]": After.TEXT}, Written("[", _PLAIN, "}", ", ", "]"),
    opener="[",
)  # fmt: skip
# The order is that of detection: earlier entries are told apart by more.
_TABLE = (
    ToolFormat(
        "qwen3_coder", ("<tool_call>",), TagBody, {"</tool_call>": After.TEXT}, None, ("<tool_call>", "<function=")
    ),
    ToolFormat(
        "deepseek_v3",
        (_CALLS,),
        _objects(rf"\s*({_CALL})?function{_SEP}{_NAME}\n```json\n\s*"),
        _DEEPSEEK_GAPS,
        Written("", f"{_CALL}function{_SEP}NAME\n```json\n", f"\n```{_CALL_END}", "\n", _CALLS_END),
        (_CALLS, "```json"),
        specials=(_CALLS_END, _CALL, _CALL_END, _SEP),
    ),
    ToolFormat(
        "deepseek_v31",
        (_CALLS,),
        _objects(rf"\s*({_CALL})?{_NAME}{_SEP}\s*"),
        _DEEPSEEK_GAPS,
        Written("", f"{_CALL}NAME{_SEP}", _CALL_END, "", _CALLS_END),
        (_CALLS,),
        specials=(_CALLS_END, _CALL, _CALL_END, _SEP),
    ),
    ToolFormat(
        "mistral",
        ("[TOOL_CALLS]",),
        _objects(rf"\s*(\[\s*|{_NAME}\s*(\[CALL_ID\][^{{]*)?(\[ARGS\]\s*)?)?"),
        {",": After.CALL, "]": After.TEXT},
        Written("[", '{"name": "NAME", "arguments": ', "}", ", ", "]"),
        ("[TOOL_CALLS]",),
        specials=("[ARGS]", "[CALL_ID]"),
        new_id=_short_id,
    ),
    ToolFormat(
        "hermes",
        ("<tool_call>",),
        _objects(r"\s*"),
        {"</tool_call>": After.TEXT},
        Written("\n", '{"name": "NAME", "arguments": ', "}", None, "\n</tool_call>"),
        ("<tool_call>",),
        specials=("</tool_call>",),
    ),
    ToolFormat(
        "llama3_json",
        ("<|python_tag|>",),
        _objects(r"\s*"),
        {";": After.CALL},
        Written("", _PLAIN, "}", "; ", ""),
        ('"parameters": ',),
        opener="{",
    ),
    PLAIN_FORMAT,
)
FORMATS: Mapping[str, ToolFormat] = {form.name: form for form in _TABLE}


def detected(template: str) -> ToolFormat | None:
    """The format that a chat template tells its model to write, or writes itself; None: none that is known."""
    return next((form for form in _TABLE if form.telling and all(text in template for text in form.telling)), None)
