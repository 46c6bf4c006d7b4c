"""Chat: one answer to a pipe, a conversation at a terminal, Ctrl-C ends the answer only, errors are said plainly."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator, Step, deltas, echo
from fakes.http_server import HttpServer
from fakes.tiny_model import CONTEXT

from penstock.cluster import cli
from penstock.cluster.client import Handle
from penstock.cluster.commands.conversation import Conversation, printable
from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec
from penstock.workers.errors import PenstockError
from penstock.workers.protocol import GenerateRequest

pytestmark = pytest.mark.timeout(60)
PENSTOCK = str(Path(sys.executable).parent / "penstock")


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator()


@pytest.fixture
def url(codec: TextCodec, generator: FakeGenerator) -> Iterator[str]:
    with HttpServer(build_app(IngressSettings(("tiny",), CONTEXT), codec, generator, Metrics(), FakeFleet())) as server:
        yield server.url


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, url: str) -> Callable[..., int]:
    """Exit status of `penstock ARGUMENTS --url ...` with a text on stdin."""

    def call(*arguments: str, stdin: str = "", address: str = url) -> int:
        monkeypatch.setattr(sys, "argv", ["penstock", *arguments, "--url", address])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.delenv("PENSTOCK_API_KEY", raising=False)
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return call


def test_a_pipe_is_one_message(
    run: Callable[..., int], generator: FakeGenerator, codec: TextCodec, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "chat --system short --temperature 0 --max-tokens 5 --seed 3 --stop zzz --stop yyy --stats".split()
    assert run(*arguments, stdin="the\ncat\n") == 0
    shown = capsys.readouterr()
    (request,) = generator.submitted
    assert request.sampling.max_tokens == 5
    assert request.sampling.temperature == 0
    assert request.sampling.seed == 3
    prompt = codec.decode(request.prompt)
    assert "short" in prompt
    assert "the\ncat" in prompt
    assert shown.out.endswith("\n")
    assert shown.out.strip()
    assert "5 out; first after" in shown.err
    assert "cut off at its longest" in shown.err


def test_lines_are_turns_of_one_conversation(run: Callable[..., int], generator: FakeGenerator) -> None:
    assert run("chat", "--lines", "--max-tokens", "3", stdin="one\n\ntwo\nthree\n") == 0
    lengths = [len(request.prompt) for request in generator.submitted]
    assert len(lengths) == 3
    assert lengths == sorted(set(lengths)), "each prompt holds the turns before it"


def test_a_message_as_an_argument(run: Callable[..., int], generator: FakeGenerator) -> None:
    assert run("chat", "hello there", "--max-tokens", "2") == 0
    assert len(generator.submitted) == 1


def test_complete(
    run: Callable[..., int], generator: FakeGenerator, codec: TextCodec, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("complete", "--max-tokens", "4", stdin="once upon a") == 0
    assert run("complete", "once upon a", "--max-tokens", "4") == 0
    assert [codec.decode(one.prompt) for one in generator.submitted] == ["once upon a"] * 2
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


@pytest.mark.parametrize("verb", ["chat", "complete"])
def test_mistakes_are_told_plainly(run: Callable[..., int], capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert run(verb, stdin="  \n") == 2
    assert "stdin: there is no message" in capsys.readouterr().err
    assert run(verb, "--temperature", "-3", stdin="hi") == 1
    assert "temperature" in capsys.readouterr().err
    assert run(verb, stdin="hi", address="http://127.0.0.1:1") == 1
    assert "cannot reach http://127.0.0.1:1" in capsys.readouterr().err
    assert run(verb, "--temperatur", "0", stdin="hi") == 2
    assert "--temperature" in capsys.readouterr().err


def test_a_failed_turn_is_forgotten_and_a_reset_forgets_all(url: str, generator: FakeGenerator) -> None:
    with Handle(url, "") as handle:
        talk = Conversation(handle, "", {"max_tokens": 3})
        talk.ask("one", lambda piece: None)
        kept = list(talk.turns)
        assert [turn["role"] for turn in kept] == ["user", "assistant"]
        generator.script = lambda request: [RuntimeError("broken")]
        with pytest.raises(PenstockError):
            talk.ask("two", lambda piece: None)
        assert talk.turns == kept
        talk.reset()
        assert talk.turns == []


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2J\x07b\tc\nd\u202ee\x9bf") == "a[2Jb\tc\ndef"
    assert printable("naïve 👩\u200d🚀 日本") == "naïve 👩\u200d🚀 日本"


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "PYTHONWARNINGS": "ignore"}
        environment.pop("PENSTOCK_API_KEY", None)
        self.process = subprocess.Popen(
            [PENSTOCK, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            close_fds=True,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str, timeout_s: float = 25.0) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                self.seen += os.read(self._ours, 4096).decode(errors="replace")
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._ours)


def _take_terminal() -> None:
    """Make the terminal on fd 0 the controlling one, so that Ctrl-C becomes a signal; as in any shell, a heeded one."""
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever starts tests in the background has it ignored
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def slow(request: GenerateRequest) -> Iterator[Step]:
    """A first token at once, then one every 50 ms."""
    for step in deltas(request.prompt[::-1] * 40):
        yield step
        yield 0.05


def test_a_conversation_at_a_terminal(url: str, generator: FakeGenerator) -> None:
    generator.script = slow
    terminal = Terminal("chat", "--url", url, "--max-tokens", "400", "--stats")
    try:
        terminal.wait_for("/help lists commands")
        terminal.type("tell me\n")
        while not generator.submitted:
            time.sleep(0.05)
        time.sleep(0.5)  # some of the answer is on the screen
        terminal.type("\x03")
        terminal.wait_for("(cancelled)")
        terminal.wait_for("> ")
        assert terminal.process.poll() is None, "Ctrl-C must end the answer, not the program"
        deadline = time.monotonic() + 10
        while not generator.cancelled and time.monotonic() < deadline:
            time.sleep(0.05)
        assert generator.cancelled, "the server was not told"
        terminal.type("\x03")
        terminal.wait_for("(/exit or Ctrl-D ends)")
        generator.script = lambda request: echo(request)[:2] + deltas([5])
        terminal.type("and \\\nthen\n")
        terminal.wait_for("tokens in")
        assert len(generator.submitted[1].prompt) > len(generator.submitted[0].prompt)
        terminal.type("/reset\n")
        terminal.wait_for("(forgotten)")
        terminal.type("/nonsense\n")
        terminal.wait_for("There is no command /nonsense")
        terminal.wait_for("/exit")
        generator.script = lambda request: [RuntimeError("broken")]
        terminal.type("again\n")
        terminal.wait_for("Error")
        terminal.type("/exit\n")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.close()
