"""Grammars are tried out in processes: slow and greedy ones are killed, verdicts are kept, crowds are shed."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from fakes.embedded_app import embedded_codec

from penstock.cluster.ingress import grammar_check
from penstock.cluster.ingress.errors import problem_of
from penstock.cluster.ingress.grammar_check import GrammarCheck, GrammarRefusedError
from penstock.cluster.metrics import GrammarVerdict
from penstock.workers.errors import RefusedError
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec
from penstock.workers.protocol import FailureCode

GOOD = GrammarSpec(GrammarKind.REGEX, "a+b", (0,))
BAD = GrammarSpec(GrammarKind.REGEX, "(", (0,))
# A child that greets, and then does with a grammar what its text says.
SCRIPT = """
import json, os, sys, time
sys.stdin.readline()
print('""', flush=True)
for line in sys.stdin:
    text = json.loads(line)["text"]
    time.sleep(60 if text == "sleep" else 0)
    os._exit(1) if text == "die" else print('""', flush=True)
"""


def pids(check: GrammarCheck) -> list[int]:
    return [child._process.pid for child in check._children if child._process is not None]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def doing(text: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.LARK, text, (0,))


@pytest.fixture
def scripted(tmp_path: Path) -> object:
    path = tmp_path / "child.py"
    path.write_text(SCRIPT)
    return mock.patch.object(grammar_check, "_COMMAND", (sys.executable, str(path)))


def test_verdicts_and_what_is_known() -> None:
    async def scenario() -> None:
        check = GrammarCheck(embedded_codec())
        assert await check.check(GOOD, "f", "t") is GrammarVerdict.ACCEPTED
        assert await check.check(GOOD, "f", "t") is GrammarVerdict.KNOWN
        for verdict in (GrammarVerdict.REFUSED, GrammarVerdict.KNOWN):
            with pytest.raises(GrammarRefusedError, match=r"f: .*unclosed") as caught:
                await check.check(BAD, "f", "t")
            assert caught.value.verdict is verdict
        started = pids(check)
        assert started
        check.close()
        assert not any(map(alive, started))

    asyncio.run(scenario())


def test_a_slow_one_is_killed_and_the_next_is_served(scripted: mock._patch) -> None:
    async def scenario() -> None:
        check = GrammarCheck(embedded_codec(), limit_s=0.5)
        await check.check(doing("start"), "f", "t")
        before = pids(check)
        for verdict in (GrammarVerdict.TOO_SLOW, GrammarVerdict.KNOWN):
            with pytest.raises(GrammarRefusedError, match=r"longer than 0\.5 s") as caught:
                await check.check(doing("sleep"), "f", "t")
            assert caught.value.verdict is verdict
        with pytest.raises(GrammarRefusedError, match="memory") as caught:
            await check.check(doing("die"), "f", "t")
        assert caught.value.verdict is GrammarVerdict.DIED
        for number in range(4):
            assert await check.check(doing(f"good {number}"), "f", "t") is GrammarVerdict.ACCEPTED
        everybody = {*before, *pids(check)}
        check.close()
        assert not any(map(alive, everybody))

    with scripted:
        asyncio.run(scenario())


def test_a_crowd_is_shed_and_the_loop_stays_free(scripted: mock._patch) -> None:
    async def scenario() -> None:
        check = GrammarCheck(embedded_codec(), limit_s=0.3)
        with mock.patch.object(grammar_check, "MOST_WAITING", 2):
            slow = [asyncio.ensure_future(check._try(doing("sleep"), f"t{i}")) for i in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(RefusedError) as caught:
                await check.check(doing("good"), "f", "t")
        assert caught.value.code is FailureCode.OVERLOADED
        assert {verdict for verdict, _ in await asyncio.gather(*slow)} == {GrammarVerdict.TOO_SLOW}
        check.close()

    with scripted:
        asyncio.run(scenario())


def test_one_tenants_crowd_is_its_own(scripted: mock._patch) -> None:
    """100 new grammars at once of one tenant: 429 for most, while another's is compiled when its turn comes."""

    async def scenario() -> None:
        check = GrammarCheck(embedded_codec(), limit_s=5.0)
        crowd = [asyncio.ensure_future(check.check(doing(f"good {i}"), "f", "greedy")) for i in range(100)]
        await asyncio.sleep(0)
        assert await check.check(doing("other"), "f", "modest") is GrammarVerdict.ACCEPTED
        found = await asyncio.gather(*crowd, return_exceptions=True)
        refused = [error for error in found if isinstance(error, RefusedError)]
        assert len(refused) == 100 - grammar_check.MOST_WAITING_EACH
        assert {problem_of(error).status for error in refused} == {429}
        assert not check._waiting
        check.close()

    with scripted:
        asyncio.run(scenario())


@pytest.mark.parametrize("text", ["(a+)+$", "(.{1,5000}){1,5000}", "((a{0,99}){0,99}){0,99}b"])
def test_expressions_that_break_others_are_linear_here(text: str) -> None:
    """Nothing backtracks, so they need not be refused; whatever the verdict, it comes within the limit."""

    async def scenario() -> None:
        check = GrammarCheck(embedded_codec())
        await check.check(GOOD, "f", "t")  # the processes have started
        began = time.monotonic()
        with contextlib.suppress(GrammarRefusedError):
            await check.check(GrammarSpec(GrammarKind.REGEX, text, (0,)), "f", "t")
        assert time.monotonic() - began < grammar_check.LIMIT_S + 3.0
        assert await check.check(GrammarSpec(GrammarKind.REGEX, "b", (0,)), "f", "t") is GrammarVerdict.ACCEPTED
        check.close()

    asyncio.run(scenario())


def test_a_process_that_does_not_start_is_not_the_grammars_fault() -> None:
    async def scenario() -> None:
        check = GrammarCheck(embedded_codec())
        for command in ((sys.executable, "-c", "pass"), ("/nowhere/python",)):
            with mock.patch.object(grammar_check, "_COMMAND", command), pytest.raises(RefusedError) as caught:
                await check.check(GOOD, "f", "t")
            assert caught.value.code is FailureCode.OVERLOADED
        assert await check.check(GOOD, "f", "t") is GrammarVerdict.ACCEPTED
        check.close()

    asyncio.run(scenario())


def test_what_is_known_has_a_bound(scripted: mock._patch) -> None:
    async def scenario() -> None:
        check = GrammarCheck(embedded_codec())
        with mock.patch.object(grammar_check, "MAX_KEPT", 2):
            for text in ("1", "2", "1", "3", "1"):
                await check.check(doing(text), "f", "t")
            assert len(check._known) == 2
            assert await check.check(doing("2"), "f", "t") is GrammarVerdict.ACCEPTED
        check.close()

    with scripted:
        asyncio.run(scenario())


def test_children_end_with_their_ingress() -> None:
    """Also where nobody calls `close`: their input ends."""
    program = (
        "import asyncio, os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from fakes.embedded_app import embedded_codec\n"
        "from penstock.cluster.ingress.grammar_check import GrammarCheck\n"
        "from penstock.workers.grammar_spec import GrammarKind, GrammarSpec\n"
        "check = GrammarCheck(embedded_codec())\n"
        "asyncio.run(check.check(GrammarSpec(GrammarKind.REGEX, 'a', (0,)), 'f', 't'))\n"
        "print(*[child._process.pid for child in check._children if child._process], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )

    async def scenario() -> None:
        tests = str(Path(__file__).parents[2])
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, tests, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), 60)
        children = [int(pid) for pid in output.split()]
        assert children
        for _ in range(500):
            if all(not alive(pid) or _zombie(pid) for pid in children):
                return
            await asyncio.sleep(0.02)
        raise AssertionError("a child outlived its ingress")

    asyncio.run(scenario())


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True  # gone altogether
