"""What one chat request means by its tools, with everything decided: plain frozen data.

`ingress/tool_fields.py` makes it, the template, the sampler and the reader of the answer each take their part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.cluster.tool_calls.formats import ToolFormat
from penstock.cluster.tool_calls.parsing import CallParser
from penstock.workers.grammar_spec import GrammarSpec


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """`shown`: the tools as the template is told. `grammar`: what the text must keep to; `trial`: what must only be a
    grammar at all, so that a schema that is none is refused. `form` None: no call is looked for."""

    shown: tuple[Mapping[str, Any], ...] = ()
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    form: ToolFormat | None = None
    several: bool = True  # more calls than one may come
    named: bool = False  # which tool is called was the caller's choice, so calling it is no reason of its own to end
    grammar: GrammarSpec | None = None
    trial: GrammarSpec | None = None

    def parser(self) -> CallParser | None:
        """A reader for one choice."""
        return None if self.form is None else CallParser(self.form, self.schemas)
