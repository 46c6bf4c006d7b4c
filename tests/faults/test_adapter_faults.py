"""Adapters' files go, break or change under real workers, places are fought for, workers die: texts stay right.

Every request names its adapter by content. It gets exactly what that content says, or a typed error; the model alone
and other adapters notice nothing. `-s` prints the rows of the fault table.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree

import pytest
from fakes.adapters import make_adapter, replace_file
from fakes.fault_plan import Action, Fault, FaultPlan
from fakes.in_ci import every
from fakes.lawful import Court, lawful
from fakes.threaded_cluster import ThreadedCluster
from fakes.variants import BLOCK_SIZE, ROOT, Variant
from tokenizers import Tokenizer

from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.fault_points import Point
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from penstock.workers.lora.projections import adaptable
from penstock.workers.model.config import read_config
from penstock.workers.protocol import FailureCode, GenerateRequest, SamplingParams, Tokens
from penstock.workers.settings import AdapterSettings, WorkerSettings

pytestmark = pytest.mark.timeout(120)
SEED = int(os.environ.get("PENSTOCK_FAULT_SEED", "1"))
VARIANT = Variant(split=True, chunk=64, caching=True, preempt=False)
NAMES = ("a", "b", "c")
MAX_RANK = 8
TOKENS = 40
P, D = "prefill-0", "decode-0"
Outside = Callable[["Home", Court], Awaitable[None]]


class Home:
    """The adapters' directory, with what each of them is to say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tokenizer = Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
        self._places = adaptable(read_config(EMBEDDED_MODEL))
        self.refs: dict[str, AdapterRef | None] = {"": None}
        for number, name in enumerate(NAMES):
            self.write(name, number)

    def write(self, name: str, seed: int) -> AdapterRef:
        """Make or exchange the adapter; requests from now on name this content."""
        make_adapter(self.path / name, rank=4 + seed % 4, seed=SEED * 100 + seed)
        revision = read_adapter(self.path, name, self._places, MAX_RANK).revision
        ref = self.refs[name] = AdapterRef(name, name, revision)
        return ref

    def request(self, number: int, name: str, tokens: int = TOKENS) -> GenerateRequest:
        ref = self.refs[name]
        prompt = tuple(self._tokenizer.encode(f"Tell me about number {number} and what comes after it.").ids)
        root = ROOT if ref is None else ref.revision
        return GenerateRequest(
            f"{name}{number}-{tokens}",
            prompt,
            SamplingParams(tokens),
            prefix_root=root,
            prefix_digests=chain_digests(root, prompt, BLOCK_SIZE),
            adapter=ref,
        )

    def requests(self, count: int, names: Sequence[str] = ("", *NAMES), tokens: int = TOKENS) -> list[GenerateRequest]:
        return [self.request(number, names[number % len(names)], tokens) for number in range(count)]

    def workers(self, max_loaded: int = 2, decode: int = 2) -> list[WorkerSettings]:
        adapters = AdapterSettings(str(self.path), max_loaded=max_loaded, max_rank=MAX_RANK, host_bytes=1 << 19)
        prefill, first = VARIANT.workers(EMBEDDED_MODEL)
        every = [prefill, *(replace(first, worker_id=f"decode-{number}") for number in range(decode))]
        return [replace(worker, adapters=adapters) for worker in every]

    def truth(self, requests: Sequence[GenerateRequest]) -> dict[str, Tokens]:
        """What each says on a worker that nothing disturbs, with a place for every adapter."""

        async def ask() -> dict[str, Tokens]:
            adapters = AdapterSettings(str(self.path), max_loaded=len(NAMES), max_rank=MAX_RANK)
            (worker,) = replace(VARIANT, split=False).workers(EMBEDDED_MODEL)
            async with ThreadedCluster([replace(worker, adapters=adapters)], VARIANT.router) as cluster:
                answers = await cluster.generate(requests)
            return {r.request_id: tuple(answer.tokens) for r, answer in zip(requests, answers, strict=True)}

        return asyncio.run(ask())


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Requests for adapters in `must` all end in the typed error until the files are back; for
    those in `may` they may."""

    name: str
    outside: Outside | None = None
    faults: tuple[Fault, ...] = ()
    must: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    names: tuple[str, ...] = ("", *NAMES)  # asked for from the start
    late: tuple[str, ...] = ()  # asked for once the fault is there
    max_loaded: int = 2
    moved: bool = False  # some request must have gone on at another worker


async def kill(home: Home, court: Court) -> None:
    await court.streams.until_tokens(200)
    court.cluster.kill(D)


async def take_away(home: Home, court: Court) -> None:
    """While streams with it run, and before anybody asks for `c`, both folders vanish."""
    await court.streams.until_tokens(100)
    for name in ("a", "c"):
        rmtree(home.path / name)


async def cut_short(home: Home, court: Court) -> None:
    await court.streams.until_tokens(100)
    path = home.path / "c" / WEIGHTS_FILE
    os.truncate(path, path.stat().st_size // 2)


async def empty(home: Home, court: Court) -> None:
    await court.streams.until_tokens(100)
    os.truncate(home.path / "c" / CONFIG_FILE, 0)


async def exchange(home: Home, court: Court) -> None:
    """Workers are held before they read (the plan's delay): what they find is another adapter of the same shape."""
    await court.streams.until_tokens(100)
    other = make_adapter(home.path.parent / "other", rank=6, seed=77)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        replace_file(home.path / "c" / name, (other / name).read_bytes())


WITHOUT_C = ("", "a", "b")
ONCE = Fault(Point.ADAPTER_READ, Action.RAISE, error="OSError", times=2)
HELD = Fault(Point.ADAPTER_READ, Action.DELAY, seconds=0.2, after=3, times=6)
C, A = frozenset("c"), frozenset("a")
ROWS = [
    Row("F38 files vanish, some in use", take_away, must=C, may=A, late=("c", "a"), names=WITHOUT_C),
    Row("F38 the weights are cut short", cut_short, must=C, late=("c",), names=WITHOUT_C),
    Row("F38 the configuration is emptied", empty, must=C, late=("c",), names=WITHOUT_C),
    Row("F38 files change while loaded", exchange, (HELD,), must=C, late=("c",), names=WITHOUT_C),
    Row("F38 three in use share one place", max_loaded=1),
    Row("F38 two reads fail", faults=(ONCE,)),
    Row("F3 decode killed under adapters", kill, moved=True),
]


@pytest.mark.parametrize("row", every(7, ROWS), ids=lambda row: row.name.replace(" ", "-"))
def test_row(row: Row, tmp_path: Path) -> None:
    home = Home(tmp_path / "adapters")
    early = home.requests(24, row.names)
    late = [home.request(100 + number, row.late[number % len(row.late)]) for number in range(8 if row.late else 0)]
    again = [home.request(200, name) for name in sorted(row.must)]
    truth = home.truth(early + late + again)
    same = home.truth([home.request(7, name) for name in row.names])
    assert len(set(same.values())) == len(same), "adapters change nothing"
    asyncio.run(run_row(row, home, (early, late, again), truth, tmp_path))


async def run_row(
    row: Row, home: Home, asked: Sequence[list[GenerateRequest]], truth: dict[str, Tokens], tmp_path: Path
) -> None:
    early, late, again = asked
    plan = FaultPlan(row.faults, SEED, tmp_path / "proof") if row.faults else None
    workers, log = home.workers(row.max_loaded), tmp_path / "log"
    async with lawful(
        workers, VARIANT.router, plan=plan, log_file=log, expected=lambda request: truth[request.request_id]
    ) as court:
        running = asyncio.ensure_future(court.run(early))
        if row.outside is not None:
            await row.outside(home, court)
        await court.run(late)
        await running
        for request in again:  # files that are what they were are served as they were
            home.write(request.request_id[0], NAMES.index(request.request_id[0]))
            await court.run([request])
        placed = {status.id: status.totals.adapters for status in court.cluster.fleet.workers()}
    print(f"{court.row(row.name)} | {dict(court.streams.tally.failed)} | {placed[P]}")
    ends = {entry.request_id: entry for entry in court.entries}
    for request in early + late + again:
        entry, name = ends[request.request_id], request.adapter.name if request.adapter else ""
        completed = entry.terminal.value == "completed"
        assert completed or (entry.code == FailureCode.ADAPTER and request in late and name in row.must | row.may)
        assert not completed or request not in late or name not in row.must
    assert court.streams.tally.wrong == []
    assert any(report.migrations for report in court.reports) or not row.moved
    wanted = len(set(row.names) - {""})
    assert row.moved or placed[P].placed >= wanted, "the prefill worker computed without them"
