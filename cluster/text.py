"""Text to ids and back: tokenizer, chat template, stop tokens; one place for HTTP and handles.

The ingress loads one `TextCodec` at start; workers see ids only. Knows nothing of HTTP, requests or workers.
With `skip_tokenizer_init` the codec exists without a tokenizer: ids pass through and text is refused, typed.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from penstock.cluster.chat_template import (
    ChatTemplate,
    Message,
    load_chat_template,
    special_token_texts,
    tokenizer_information,
)
from penstock.cluster.model_directory import ModelDescription
from penstock.cluster.token_bytes import TextStream, TokenTable, token_table
from penstock.cluster.tool_calls.formats import FORMATS, ToolFormat, detected
from penstock.workers.errors import ModelError, RequestError

TAIL_MARGIN = 4096  # characters tokenised beyond those that can matter, so that the cut does not show


class TextCodec:
    """A model's tokenizer and template. Immutable after construction; safe from several threads."""

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        tokenizer: Tokenizer | None = None,
        table: TokenTable | None = None,
        template: ChatTemplate | None = None,
        info: Mapping[str, Any] | None = None,
        tool_template: ChatTemplate | None = None,
        tool_format: ToolFormat | None = None,
    ) -> None:
        """`tool_template`: for chats with tools, where the model has one of its own for them."""
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(sorted(set(eos_token_ids)))
        nothing = [b""] * vocab_size
        self.table = table or TokenTable(nothing, nothing, 0)
        self._tokenizer = tokenizer
        self._template = template
        self._tool_template = tool_template or template
        self.template_tells_tools = self._tool_template is not None and self._tool_template.tells_tools
        self.tool_format = tool_format if self.template_tells_tools else None
        self._specials = _special_texts(tokenizer)
        self._special_pattern = re.compile("|".join(map(re.escape, self._specials))) if self._specials else None
        self._plain = _without_specials(tokenizer) if self._specials else None
        self._lead = _lead(tokenizer)
        self._shown = self._with_format_specials()
        self.info: Mapping[str, Any] = info or {}  # what /tokenizer_info tells

    @property
    def has_tokenizer(self) -> bool:
        """False: token ids only."""
        return self._tokenizer is not None

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as its file states it; empty without one."""
        return "" if self._tokenizer is None else str(self._tokenizer.to_str())

    @property
    def template_variables(self) -> frozenset[str]:
        """Names a caller may set for the chat template: those it reads."""
        return self._template.variables if self._template is not None else frozenset()

    def longest_text(self, max_tokens: int) -> int:
        """UTF-8 bytes that `max_tokens` tokens can stand for at most; longer text need not be tokenised."""
        return max_tokens * self.table.longest

    def encode(self, text: str, field: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, in which special tokens are recognised. Raises RequestError naming `field`."""
        return _ids(self._ready(field), text, add_special_tokens)

    def encode_end(self, text: str, field: str, keep: int, add_special_tokens: bool = True) -> list[int]:
        """The last `keep` ids of `text`, a leading special token (as `<s>`) included; far more text than those can
        stand for is not tokenised."""
        tail = text[-(2 * self.longest_text(keep) + TAIL_MARGIN) :]
        return self.cut(self.encode(tail, field, add_special_tokens), keep)

    def cut(self, ids: list[int], keep: int) -> list[int]:
        """The last `keep` ids; one of them the leading special token, where there is one."""
        lead = len(self._lead)
        if len(ids) <= keep or not lead or lead >= keep or ids[:lead] != self._lead:
            return ids[-keep:]
        return self._lead + ids[-(keep - lead) :]

    def encode_chat(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        field: str = "messages",
        continue_final: bool = False,
    ) -> list[int]:
        """Ids of the rendered chat. Special tokens written by a caller stay plain text: they cannot forge a role.

        `variables`: what else the template may read. `tools`: as JSON. `continue_final`: the prompt ends with the last
        message's text, for the model to go on with.
        """
        tokenizer = self._ready(field)
        template = self._tool_template if tools else self._template
        if template is None:
            raise RequestError("this model has no chat template; use /v1/completions", field=field)
        mark = secrets.token_hex(8)
        masked = self._masked(list(messages), mark)
        end = f"\ue000{mark}:end\ue001"
        if continue_final:
            masked[-1] = {**masked[-1], "content": f"{masked[-1]['content']}{end} "}
        rendered = template.render(masked, self._masked(dict(variables or {}), mark), self._masked(list(tools), mark))
        if continue_final:
            rendered = _until(rendered, end, str(messages[-1]["content"]), field)
        ids: list[int] = []
        for index, part in enumerate(re.split(f"\ue000{mark}:([0-9]+)\ue001", rendered)):
            if index % 2:
                ids += self._encode_plain(self._specials[int(part)])
            elif part:
                ids += _ids(tokenizer, part, False)
        return ids

    def stream(self, skip_special_tokens: bool = True, show_calls: bool = False) -> TextStream:
        """An incremental detokeniser for one choice. `show_calls`: with the special tokens that tool calls are written
        with."""
        plain = self._shown if show_calls else self.table.plain
        return TextStream(plain if skip_special_tokens else self.table.pieces)

    def split_specials(self, text: str) -> list[str | int]:
        """Plain text and the ids of special tokens, in their order."""
        if self._special_pattern is None or self._tokenizer is None:
            return [text] if text else []
        parts = re.split(f"({self._special_pattern.pattern})", text)
        ids = {part: self._tokenizer.token_to_id(part) for part in parts[1::2]}
        return [part if (token := ids.get(part)) is None else token for part in parts if part]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole list of ids."""
        stream = self.stream(skip_special_tokens)
        return stream.push(tokens) + stream.finish()

    def decode_whole(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids that begin a text: the tokenizer's own decoding, which may drop a leading word mark."""
        return str(self._ready("tokens").decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def _ready(self, field: str) -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError("this server runs without a tokenizer: send the prompt as token ids", field=field)
        return self._tokenizer

    def _encode_plain(self, text: str) -> list[int]:
        return _ids(self._plain, text, False) if self._plain else []

    def _masked(self, value: Any, mark: str) -> Any:
        """The same JSON value with every special token in its text replaced by an unguessable stand-in."""
        pattern = self._special_pattern
        if pattern is None:
            return value
        if isinstance(value, str):
            return pattern.sub(lambda found: f"\ue000{mark}:{self._specials.index(found[0])}\ue001", value)
        if isinstance(value, Mapping):
            return {self._masked(name, mark): self._masked(item, mark) for name, item in value.items()}
        if isinstance(value, list):
            return [self._masked(item, mark) for item in value]
        return value

    def _with_format_specials(self) -> Sequence[bytes]:
        """The table of plain text, in which the special tokens of tool calls are text too."""
        form, tokenizer = self.tool_format, self._tokenizer
        special = [] if form is None else [text for text in (*form.marks, *form.specials) if text in self._specials]
        if not special or tokenizer is None:
            return self.table.plain
        shown = list(self.table.plain)
        for text in special:
            token = tokenizer.token_to_id(text)
            if token is not None:
                shown[token] = self.table.pieces[token]
        return shown


def load_text(
    model: ModelDescription, skip_tokenizer: bool, max_model_len: int, tool_call_parser: str = "auto"
) -> TextCodec:
    """The codec of a model directory. Raises ModelError naming the file when the tokenizer is absent or unreadable.

    `tool_call_parser`: a name of `tool_calls.formats.FORMATS`, or "auto": as the chat template tells.
    """
    if skip_tokenizer or model.directory is None:
        return TextCodec(model.vocab_size, model.eos_token_ids)
    path = model.directory / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{path}: missing; serve with --skip-tokenizer-init to work with token ids only", path=str(path)
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # tokenizers raises bare Exception for every kind of bad file
    except Exception as error:
        raise ModelError(f"{path}: not a tokenizer: {error}", path=str(path)) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    table = token_table(tokenizer, model.vocab_size, str(path))
    longest = max_model_len * max(1, table.longest)
    template = load_chat_template(model.directory, longest)
    tool_template = load_chat_template(model.directory, longest, "tool_use")
    source = next((one.source for one in (tool_template, template) if one is not None), "")
    tool_format = detected(source) if tool_call_parser == "auto" else FORMATS[tool_call_parser]
    eos = {*model.eos_token_ids, *_tokenizer_eos(model.directory, tokenizer)}
    info = tokenizer_information(model.directory)
    return TextCodec(model.vocab_size, tuple(eos), tokenizer, table, template, info, tool_template, tool_format)


def _tokenizer_eos(directory: Path, tokenizer: Tokenizer) -> list[int]:
    text = special_token_texts(directory).get("eos_token")
    found = tokenizer.token_to_id(text) if text else None
    return [] if found is None else [found]


def _ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """As a batch of one: only those let other threads run meanwhile, and a megabyte takes seconds."""
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)


def _lead(tokenizer: Tokenizer | None) -> list[int]:
    """Special tokens that the tokenizer puts before every text."""
    return [] if tokenizer is None else list(tokenizer.encode("", add_special_tokens=True).ids)


def _until(rendered: str, end: str, content: str, field: str) -> str:
    """What was rendered before `end`, which follows `content`; without the content's last white space where the
    template trims its messages (it then also trimmed the space after `end`)."""
    at = rendered.rfind(end)
    if at < 0:
        raise RequestError("the chat template does not show the last message's text", field=field)
    trimmed = not rendered.startswith(" ", at + len(end))
    # Content of nothing but white space went with the trim from the left.
    trailing = len(content) - len(content.rstrip()) if trimmed and content.strip() else 0
    return rendered[: at - trailing]


def _special_texts(tokenizer: Tokenizer | None) -> list[str]:
    """Longest first, so that a special token which contains another is masked whole."""
    if tokenizer is None:
        return []
    added = tokenizer.get_added_tokens_decoder().values()
    return sorted((t.content for t in added if t.special and t.content), key=len, reverse=True)


def _without_specials(tokenizer: Tokenizer | None) -> Tokenizer | None:
    if tokenizer is None:
        return None
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return plain
