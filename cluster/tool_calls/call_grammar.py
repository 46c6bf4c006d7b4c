"""Grammars of tool calls, in llguidance's dialect of Lark: calls that must come, and calls that may come behind text.

Used by `ingress/tool_fields.py`. A grammar writes a format's own syntax, with every tool's schema behind its name.
Texts that are special tokens of the model are named by id, as no text may spell them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from penstock.cluster.tool_calls.call_body import Schemas
from penstock.cluster.tool_calls.formats import PLAIN_FORMAT, ToolFormat, Written
from penstock.workers.grammar_spec import WHITESPACE

# Text around calls; a mark that is plain text ends it as soon as it is written.
_TEXT = r"TEXT: /(.|\n)*/"
Split = Callable[[str], list[str | int]]  # text into plain text and the ids of special tokens


def enforceable(form: ToolFormat | None) -> ToolFormat:
    """The format in which calls are enforced on a model of this one."""
    return form if form is not None and form.written is not None else PLAIN_FORMAT


def forced_calls(form: ToolFormat, schemas: Schemas, split: Split, several: bool) -> str:
    """The text is calls and nothing else: one, or one and more."""
    written = _written(form)
    mark = "" if form.opener else _literal(form.marks[0], split)
    more = f' ("\\n" {mark} section)*' if several and written.between is None else ""
    return "\n".join([f"start: {mark} section{more}", *_section(written, schemas, split, several)])


def possible_calls(
    form: ToolFormat,
    schemas: Schemas,
    split: Split,
    several: bool,
    answer: Mapping[str, Any] | None = None,
    lenient: bool = False,
) -> str:
    """Text in which calls may come, each as its tool's schema says. `answer`: instead of text, a JSON of this schema
    (of formats whose calls begin with a mark).

    `lenient`: what of a schema cannot be enforced is not.
    """
    rules = _section(_written(form), schemas, split, several, lenient)
    if form.opener:
        if answer is not None:
            raise ValueError(f"calls of {form.name} begin as other JSON does, and a grammar cannot tell them apart")
        other = rf"/[^{re.escape(form.opener)}\s](.|\n)*/"
        return "\n".join(["start: section | (other)?", f"other: {other}", *rules])
    marks = split(form.marks[0])
    mark = _literal(form.marks[0], split)
    if answer is not None:
        calls = "(mark section)+" if several else "mark section"
        return "\n".join([f"start: {calls} | answer", f"answer: {_json(answer)}", f"mark: {mark}", *rules])
    lazy = "" if any(isinstance(part, int) for part in marks) else "[lazy]"
    start = f"start: (mark section){'*' if several else '?'} TEXT"
    return "\n".join([start, f"mark{lazy}: TEXT {mark}", _TEXT, *rules])


def _written(form: ToolFormat) -> Written:
    if form.written is None:
        raise ValueError(f"calls of {form.name} cannot be enforced")
    return form.written


def _section(written: Written, schemas: Schemas, split: Split, several: bool, lenient: bool = False) -> list[str]:
    """The rules of what stands behind a mark."""
    rules = ["call: " + " | ".join(f"call_{number}" for number in range(len(schemas)))]
    for number, (name, schema) in enumerate(schemas.items()):
        before, behind = (_literal(text.replace("NAME", name), split) for text in (written.before, written.behind))
        rules.append(f"call_{number}: {before} {_json(schema, lenient)} {behind}")
    more = f"({_literal(written.between, split)} call)*" if several and written.between is not None else ""
    parts = [_literal(written.begin, split), "call", more, _literal(written.end, split)]
    return ["section: " + " ".join(part for part in parts if part), *rules]


def _json(schema: Mapping[str, Any], lenient: bool = False) -> str:
    """A JSON value of this schema."""
    told = {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": lenient}}
    return f"%json {json.dumps(told, ensure_ascii=False, separators=(',', ':'))}"


def _literal(text: str, split: Split) -> str:
    """A text as Lark has it; nothing for none."""
    parts = [f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False) for part in split(text)]
    return " ".join(parts)
