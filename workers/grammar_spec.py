"""What a choice's text must look like, as plain data: a part of `protocol.SamplingParams`.

The ingress writes it (`cluster/ingress/grammar_fields.py`), it travels with the request, and every worker derives the
rest from it and the tokens (`grammar.py`). Knows neither the library that follows grammars nor tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_GRAMMAR_BYTES = 64 << 10  # of one grammar's text, UTF-8
# White space between JSON's parts; without a bound a small model may write nothing else for ever.
WHITESPACE = r"[ \t\r\n]{0,40}"


class GrammarKind(StrEnum):
    """How the text of a grammar is written; a closed set, safe as a metric label."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"  # Rust's syntax; the whole text must match
    LARK = "lark"  # llguidance's dialect of Lark, or GBNF


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A grammar, and the tokens that may come where its text is complete, and nowhere else."""

    kind: GrammarKind
    text: str
    end_token_ids: tuple[int, ...]  # all of them end the choice
