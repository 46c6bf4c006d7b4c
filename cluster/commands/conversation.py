"""A conversation with a running cluster: its messages, and one streamed answer at a time.

`chat.py` drives it from a terminal or a pipe. Knows the client handle; knows nothing of terminals.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from penstock.cluster.client import Handle
from penstock.cluster.client_answers import Chunk, Usage


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer ended: the server's reason, None when it was cancelled; the tokens where they are known."""

    text: str
    finish_reason: str | None
    usage: Usage | None


class Conversation:
    """Messages so far. A turn that fails leaves them as they were; a cancelled one keeps what was shown."""

    def __init__(self, handle: Handle, system: str, options: dict[str, Any]) -> None:
        self._handle = handle
        self._options = options
        self.system = system
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.turns = []

    def ask(self, message: str, show: Callable[[str], None]) -> Ending:
        """Stream the answer to `show`. Ctrl-C ends the answer. Raises PenstockError."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": message}
        stream = self._handle.stream([*first, *self.turns, asked], **self._options)
        ending = follow(stream, show)
        if ending.text or ending.finish_reason is not None:
            self.turns += [asked, {"role": "assistant", "content": ending.text}]
        return ending


def follow(stream: Iterator[Chunk], show: Callable[[str], None]) -> Ending:
    """Hand every piece to `show`. Ctrl-C closes the stream, by which the server learns of it."""
    pieces: list[str] = []
    reason: str | None = None
    usage: Usage | None = None
    try:
        for chunk in stream:
            if chunk.text:
                pieces.append(chunk.text)
                show(printable(chunk.text))
            reason = chunk.finish_reason or reason
            usage = chunk.usage or usage
    except KeyboardInterrupt:
        reason = None
    finally:
        if isinstance(stream, Generator):
            stream.close()
    return Ending("".join(pieces), reason, usage)


def printable(text: str) -> str:
    """`text` without control characters, which could take over the terminal; line ends and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") or c in "\u200d\u200c")
