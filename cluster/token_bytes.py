"""The exact bytes each token id stands for, and text from a growing list of ids.

Used by `text.py`. A tokenizer's decoder is read once and turned into a table, so that streaming is a look-up and an
incremental UTF-8 decoder: the streamed pieces joined are the decoding of the whole, by construction.
Knows the two decoder families of Llama and Qwen tokenizers: byte-level BPE, and SentencePiece with byte fallback.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from penstock.workers.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_WORD_MARK = "\u2581"


@dataclass(frozen=True, slots=True)
class TokenTable:
    """`pieces[i]` is what id i stands for, `plain[i]` the same with special tokens left out. One entry per id of the
    vocabulary, so that look-ups need no check; ids without a token stand for nothing."""

    pieces: Sequence[bytes]
    plain: Sequence[bytes]
    longest: int  # bytes of the longest piece


class TextStream:
    """Text of one choice as its tokens come. An incomplete UTF-8 character waits for its last byte."""

    __slots__ = ("_decode", "_pieces")

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, tokens: Iterable[int]) -> str:
        """The text that `tokens` complete."""
        pieces = self._pieces
        return self._decode(b"".join([pieces[token] for token in tokens]))

    def finish(self) -> str:
        """What was held back; cut characters become U+FFFD."""
        return self._decode(b"", final=True)


def token_table(tokenizer: Tokenizer, vocab_size: int, path: str) -> TokenTable:
    """Read the tokenizer's decoder. Raises ModelError (naming `path`) for a family that is not known."""
    state = json.loads(tokenizer.to_str())
    kinds = _decoder_kinds(state.get("decoder"))
    if "ByteLevel" in kinds:
        to_bytes = _byte_level_decoder()
    elif kinds & {"ByteFallback", "Metaspace"}:
        to_bytes = _sentence_piece
    else:
        stated = ", ".join(sorted(kinds)) or "none"
        raise ModelError(f"{path}: decoder {stated} is not supported (known: ByteLevel, ByteFallback, Metaspace)", path)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=0)
    if largest >= vocab_size:
        raise ModelError(f"{path}: token id {largest} is outside vocab_size {vocab_size} of config.json", path)
    pieces = [b""] * vocab_size
    for token, index in vocabulary.items():
        pieces[index] = to_bytes(token)
    plain = list(pieces)
    for added in state.get("added_tokens", ()):
        if added.get("special"):
            plain[added["id"]] = b""
    return TokenTable(pieces, plain, max(map(len, pieces), default=0))


def _decoder_kinds(decoder: object) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    if decoder.get("type") == "Sequence":
        return {kind for part in decoder.get("decoders", ()) for kind in _decoder_kinds(part)}
    return {str(decoder.get("type"))}


def _byte_level_decoder() -> Callable[[str], bytes]:
    """GPT-2's printable stand-ins for the 256 bytes, inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    stand_ins = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

    def to_bytes(token: str) -> bytes:
        try:
            return bytes([stand_ins[c] for c in token])
        except KeyError:  # an added token holds plain text
            return token.encode("utf-8", "replace")

    return to_bytes


def _sentence_piece(token: str) -> bytes:
    if match := _BYTE_TOKEN.match(token):
        return bytes([int(match[1], 16)])
    return token.replace(_WORD_MARK, " ").encode("utf-8", "replace")
