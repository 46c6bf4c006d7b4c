"""A model's own chat template, rendered in Jinja's immutable sandbox. Templates never come from a request.

Used by `text.py`. Follows the conventions of Hugging Face templates: `messages`, `add_generation_prompt`,
`bos_token`, `raise_exception`, `strftime_now`, `tojson` without escapes, trimmed blocks, loop controls.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock.cluster.model_directory import read_json
from penstock.workers.errors import ModelError, RequestError

Message = Mapping[str, Any]
MAX_REASON_CHARS = 200
MAX_PRODUCT = 1_000_000  # characters or items of a repeated text or list; exponents may reach a thousandth of it
# What the template is always given, or may call; never a caller's to set.
RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template"}
)
_TOLD = ("tokenizer_class", "add_bos_token", "add_eos_token", "add_prefix_space", "padding_side")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a caller's number cannot make a template multiply text, or numbers, without bound."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        factors = [len(one) if isinstance(one, Sized) else abs(one) for one in (left, right)]
        size = factors[0] * factors[1] if operator == "*" else factors[1] * 1000
        if size > MAX_PRODUCT and (operator == "**" or isinstance(left, Sized) or isinstance(right, Sized)):
            raise jinja2.TemplateError("a product in the template is too large")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """One compiled template with the special tokens it may use. `tells_tools`: it shows the model tools it is given."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], path: str, max_chars: int) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda style: datetime.datetime.now().astimezone().strftime(style)
        try:
            self._template = environment.from_string(source)
            read = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ModelError(f"{path}: the chat template does not compile: {error}", path=path) from error
        self.source = source
        self.tells_tools = "tools" in read
        self.variables = frozenset(n for n in read - RESERVED - environment.globals.keys() if not n.endswith("_token"))
        self._special_tokens = dict(special_tokens)
        self._max_chars = max_chars

    def render(
        self, messages: Sequence[Message], variables: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The prompt text. Raises RequestError with the template's own words when it refuses the messages."""
        told = {"messages": messages, "tools": list(tools) or None, "documents": None}
        arguments = {**self._special_tokens, **variables, **told}
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(arguments):
                pieces.append(piece)
                size += len(piece)
                if size > self._max_chars:
                    raise RequestError("the rendered messages are longer than the model's context", field="messages")
        except RequestError:
            raise
        # A template is a program over the caller's data: whatever it raises is about that data, not about us.
        except Exception as error:
            reason = str(error)[:MAX_REASON_CHARS] or type(error).__name__
            raise RequestError(f"the chat template refused the messages: {reason}", field="messages") from error
        return "".join(pieces)


def load_chat_template(directory: Path, max_chars: int, name: str = "default") -> ChatTemplate | None:
    """The directory's template (`chat_template.jinja`, else the tokenizer configuration's), or None.

    `name`: which one, of a tokenizer configuration that states several; `tool_use` is the other usual one.
    """
    source, path = _source(directory, name)
    return ChatTemplate(source, special_token_texts(directory), str(path), max_chars) if source else None


def tokenizer_information(directory: Path) -> dict[str, Any]:
    """What clients that template or count by themselves ask for: class, special tokens, chat template."""
    config = read_json(directory / "tokenizer_config.json", required=False)
    told = {name: config[name] for name in _TOLD if isinstance(config.get(name), (str, int, bool))}
    source, _ = _source(directory)
    return {**told, **special_token_texts(directory), "chat_template": source or None}


def _source(directory: Path, name: str = "default") -> tuple[str, Path]:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return (path.read_text(encoding="utf-8") if name == "default" else ""), path
    path = directory / "tokenizer_config.json"
    return _named(read_json(path, required=False).get("chat_template"), name), path


def special_token_texts(directory: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, … as text, from the tokenizer's configuration files."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_json(directory / name, required=False).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def _named(stated: object, name: str) -> str:
    """The template text; some models state a list of named ones, of which `default` is the plain chat."""
    if isinstance(stated, list):
        found = {item.get("name"): item.get("template") for item in stated if isinstance(item, dict)}
    else:
        found = {"default": stated}
    template = found.get(name)
    return template if isinstance(template, str) else ""


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))
