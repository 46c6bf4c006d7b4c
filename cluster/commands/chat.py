"""`penstock chat` and `penstock complete`: ask a running cluster from a terminal or a script; answers are streamed.

At a terminal, chat is a conversation: a line is a message (a backslash at its end continues it), Ctrl-C ends the
answer, /help lists the commands. From a pipe, all of stdin is one message; with --lines, every line is one, in one
conversation. The answer goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from penstock.cluster.client import Handle, connect
from penstock.cluster.commands.conversation import Conversation, Ending, follow
from penstock.cluster.commands.declaration import declare
from penstock.workers.errors import ConfigError, PenstockError

CHAT_HELP = "Talk to a running server; from a pipe, answer what stdin says."
COMPLETE_HELP = "Continue a text, given as an argument or on stdin."
COMMANDS = {
    "/exit": "end (so does Ctrl-D)",
    "/reset": "forget the conversation",
    "/system TEXT": "set the system message; without TEXT: none",
    "/help": "this list",
}
MAX_INPUT_CHARS = 16 << 20


def _option(kind: Any, spelling: str, metavar: str, text: str) -> Any:
    return Annotated[kind, typer.Option(spelling, metavar=metavar, help=text)]


CONNECTION: dict[str, tuple[Any, object]] = {
    "url": (_option(str | None, "--url", "U", "Server; default $PENSTOCK_URL."), None),
    "api_key": (_option(str | None, "--api-key", "K", "Default $PENSTOCK_API_KEY."), None),
}
SAMPLING: dict[str, tuple[Any, object]] = {
    "model": (_option(str | None, "--model", "S", "Name in the API; default the server's first."), None),
    "temperature": (_option(float | None, "--temperature", "T", "0 takes the likeliest token."), None),
    "top_p": (_option(float | None, "--top-p", "P", "Share of probability to draw from."), None),
    "top_k": (_option(int | None, "--top-k", "K", "Number of tokens to draw from."), None),
    "max_tokens": (_option(int | None, "--max-tokens", "N", "Longest answer."), None),
    "seed": (_option(int | None, "--seed", "N", "The same seed gives the same answer."), None),
    "stop": (_option(list[str] | None, "--stop", "TEXT", "End before this text; may be repeated."), None),
}
STATS = {"stats": (Annotated[bool, typer.Option("--stats", help="Tokens and times of each answer.")], False)}


def chat_command() -> Callable[..., None]:
    """The function that typer makes a command of."""

    def chat(message: str | None, system: str, lines: bool, stats: bool, **given: Any) -> None:
        with _connected(given) as handle:
            conversation = Conversation(handle, system, _sampling(given))
            if message is not None:
                _answer(conversation, message, stats)
            elif sys.stdin.isatty():
                _converse(conversation, stats)
            elif lines:
                for line in sys.stdin:
                    if line.strip():
                        _answer(conversation, line.strip(), stats)
            else:
                _answer(conversation, _all_of_stdin(), stats)

    word = Annotated[str | None, typer.Argument(metavar="MESSAGE", help="One message; none: a conversation.")]
    own: dict[str, tuple[Any, object]] = {
        "system": (_option(str, "--system", "TEXT", "System message."), ""),
        "lines": (Annotated[bool, typer.Option("--lines", help="From a pipe: every line is a message.")], False),
    }
    declare(chat, {"message": (word, None), **CONNECTION, **SAMPLING, **own, **STATS})
    return chat


def complete_command() -> Callable[..., None]:
    """The same for `penstock complete`."""

    def complete(prompt: str | None, stats: bool, **given: Any) -> None:
        with _connected(given) as handle:
            stream = handle.stream(_all_of_stdin() if prompt is None else prompt, **_sampling(given))
            _timed(lambda show: follow(stream, show), stats)

    text = Annotated[str | None, typer.Argument(metavar="PROMPT", help="The text to continue; none: stdin.")]
    declare(complete, {"prompt": (text, None), **CONNECTION, **SAMPLING, **STATS})
    return complete


def _connected(given: dict[str, Any]) -> Handle:
    return connect(given["url"], given["api_key"])


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Only what was stated; the rest is the server's."""
    return {name: given[name] for name in SAMPLING if given[name] not in (None, [])}


def _all_of_stdin() -> str:
    text = sys.stdin.read(MAX_INPUT_CHARS + 1)
    if len(text) > MAX_INPUT_CHARS:
        raise ConfigError(f"stdin: more than {MAX_INPUT_CHARS} characters", key="stdin")
    if not text.strip():
        raise ConfigError("stdin: there is no message", key="stdin")
    return text


def _converse(conversation: Conversation, stats: bool) -> None:
    """Until /exit or Ctrl-D. An error ends a turn, not the program."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - editing and history of the lines that input() reads
    typer.echo("Ctrl-C ends an answer, Ctrl-D the conversation; /help lists commands.", err=True)
    while True:
        try:
            message = _read_message()
        except EOFError:
            typer.echo("", err=True)
            return
        except KeyboardInterrupt:
            typer.echo("\n(/exit or Ctrl-D ends)", err=True)
            continue
        if message.startswith("/"):
            if not _command(conversation, message):
                return
        elif message:
            try:
                _answer(conversation, message, stats)
            except PenstockError as error:
                typer.echo(f"{type(error).__name__}: {error}", err=True)


def _read_message() -> str:
    """One line, or several joined by backslashes."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("... "))
    return "\n".join(lines).strip()


def _command(conversation: Conversation, line: str) -> bool:
    """Do what a /command says; False ends the conversation."""
    name, _, rest = line.partition(" ")
    if name == "/exit":
        return False
    if name == "/reset":
        conversation.reset()
        typer.echo("(forgotten)", err=True)
    elif name == "/system":
        conversation.system = rest.strip()
        typer.echo("(the system message is set)" if rest.strip() else "(no system message)", err=True)
    else:
        if name != "/help":
            typer.echo(f"There is no command {name}.", err=True)
        for known, text in COMMANDS.items():
            typer.echo(f"  {known:<14}{text}", err=True)
    return True


def _answer(conversation: Conversation, message: str, stats: bool) -> None:
    _timed(lambda show: conversation.ask(message, show), stats)


def _timed(ask: Callable[[Callable[[str], None]], Ending], stats: bool) -> None:
    """Show an answer as it comes, end its line, and say on stderr what should be known about it."""
    started = time.monotonic()
    first_s: list[float] = []
    shown = ""

    def show(piece: str) -> None:
        nonlocal shown
        if not first_s:
            first_s.append(time.monotonic() - started)
        shown = piece or shown
        typer.echo(piece, nl=False)

    try:
        ending = ask(show)
    finally:
        if not shown.endswith("\n"):
            typer.echo("")
    if ending.finish_reason is None:
        typer.echo("(cancelled)", err=True)
    elif ending.finish_reason == "length":
        typer.echo("(the answer was cut off at its longest; see --max-tokens)", err=True)
    if stats and ending.usage is not None and first_s:
        took, usage = time.monotonic() - started, ending.usage
        typer.echo(
            f"({usage.prompt_tokens} tokens in, {usage.cached_tokens} of them cached, {usage.completion_tokens} out; "
            f"first after {first_s[0] * 1000:.0f} ms, all in {took:.2f} s)",
            err=True,
        )
