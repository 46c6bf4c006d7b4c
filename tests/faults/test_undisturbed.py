"""What must not be felt by streams beside it: readers that stall, a trace collector that is dead or silent.

Real worker processes, and the HTTP listener over them for the readers. `-s` prints the rows of the fault table.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fakes.lawful import Court, lawful
from fakes.oracle_cluster import PATIENT, Pace, oracle_request, oracle_workers

from penstock.cluster.config import load_config
from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.listener import Listener
from penstock.cluster.ingress.settings import IngressSettings, ingress_settings
from penstock.cluster.metrics import Metrics
from penstock.cluster.model_directory import describe
from penstock.cluster.settings import LimitSettings
from penstock.cluster.text import TextCodec, load_text
from penstock.router.settings import PlacementSettings, RouterSettings
from penstock.workers.settings import TracingSettings
from penstock.workers.trace_context import TraceContext

PACE = Pace(step_s=0.01)
LIMITS = LimitSettings(write_timeout_s=3.0)
READERS = 8  # half of them take nothing, half a byte a second
UNREAD = {"model": "oracle", "prompt": [7] * 40, "max_tokens": 600, "n": 8, "stream": True}
IN_TURN = RouterSettings(PlacementSettings(balance=100.0), PATIENT)  # whatever a worker is taken for, it gets its share
GROWTH_BYTES = 16 << 20  # of this process and the workers together, measured: 4 MiB


async def gap(court: Court, first: int, *, traced: bool = False, streams: int = 8, tokens: int = 150) -> float:
    """Seconds between two tokens of a stream, the median over all of some."""
    requests = [oracle_request(first + number, 40, tokens, PACE) for number in range(streams)]
    if traced:
        requests = [replace(r, traceparent=TraceContext(n + 1, n + 1).header()) for n, r in enumerate(requests)]
    court.expect(requests)
    gaps: list[float] = []

    async def read(number: int) -> None:
        last = 0.0
        async for _ in court.streams.recorder.submit(requests[number]):
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    await asyncio.gather(*map(read, range(streams)))
    return statistics.median(gaps)


def resident(court: Court) -> int:
    """Bytes of this process, in which the ingress is, and of the workers."""
    pids = [pid for entry in court.cluster.supervisor.roster.entries for pid in entry.pids]
    return sum(psutil.Process(pid).memory_info().rss for pid in [psutil.Process().pid, *pids])


def front() -> tuple[IngressSettings, TextCodec]:
    """What an ingress has at its start."""
    config = load_config(values={"runner.kind": "oracle", "kv.num_blocks": 4096, "kv.block_size": 4}, environment={})
    model = describe(config.runner)
    text = load_text(model, True, config.scheduler.max_model_len)
    return replace(ingress_settings(config, model), limits=LIMITS), text


@contextlib.asynccontextmanager
async def ingress(court: Court, parts: tuple[IngressSettings, TextCodec], metrics: Metrics) -> AsyncIterator[int]:
    """Its port."""
    app = build_app(*parts, court.cluster.generator, metrics, court.cluster.fleet)
    listener = Listener(app, "127.0.0.1", 0, shared=False, drain_s=1, limits=LIMITS)
    listener.start()
    try:
        yield listener.port
    finally:
        await listener.stop()


async def stalled_reader(port: int, *, drips: bool) -> None:
    """Asks for megabytes, and takes a byte a second or nothing, until it is cut."""
    loop = asyncio.get_running_loop()
    body = json.dumps(UNREAD | {"temperature": 0}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    )
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await loop.sock_connect(connection, ("127.0.0.1", port))
        await loop.sock_sendall(connection, f"{head}\r\n\r\n".encode() + body)
        with contextlib.suppress(ConnectionError):
            while not drips or await loop.sock_recv(connection, 1):  # noqa: ASYNC110
                await asyncio.sleep(1.0)


@pytest.mark.timeout(90)
def test_stalled_readers_over_http(tmp_path: Path) -> None:
    async def scenario() -> None:
        metrics, parts = Metrics(), front()
        async with (
            lawful(oracle_workers(1, 2, PACE), log_file=tmp_path / "log") as court,
            ingress(court, parts, metrics) as port,
        ):
            alone = await gap(court, 0)
            before = resident(court)
            readers = [asyncio.ensure_future(stalled_reader(port, drips=n % 2 == 1)) for n in range(READERS)]
            await asyncio.sleep(0.5)
            assert court.cluster.generator.open_generations >= READERS, "they were not let in"
            beside = await gap(court, 100)
            grown = resident(court) - before
            async with asyncio.timeout(20.0):
                while court.cluster.generator.open_generations:  # noqa: ASYNC110 - cut from within the server
                    await asyncio.sleep(0.05)
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        cut = metrics.slow_readers._value.get()
        print(
            f"{court.row('F12 readers that stop or take 1 B/s')} | readers cut {cut:.0f} | "
            f"a token each {alone * 1e3:.1f} ms, beside them {beside * 1e3:.1f} ms | memory {grown >> 20:+d} MiB"
        )
        assert cut == READERS
        assert beside < 1.5 * alone + 0.005
        assert grown < GROWTH_BYTES

    asyncio.run(scenario())


@pytest.mark.slow  # cluster/test_tracing.py has the quick edition
@pytest.mark.timeout(90)
def test_a_dead_and_a_silent_trace_collector(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            collectors = [f"http://127.0.0.1:{each.getsockname()[1]}" for each in (silent, nobody)]
            workers = [
                replace(worker, tracing=TracingSettings(collectors[n], max_queue=32, export_interval_s=0.05))
                for n, worker in enumerate(oracle_workers(0, 2, PACE))
            ]
            async with lawful(workers, IN_TURN, log_file=log) as court:
                untraced = await gap(court, 0)
                traced = [await gap(court, 100 * number, traced=True) for number in (1, 2, 3)]
                async with asyncio.timeout(20.0):
                    while log.read_text().count("spans cannot be sent") < 2:  # noqa: ASYNC110 - said by the workers
                        await asyncio.sleep(0.1)
                    while not all(w.totals.spans_dropped for w in court.cluster.fleet.workers()):  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
        said = [line.rpartition("; ")[2] for line in log.read_text().splitlines() if "spans cannot be sent" in line]
        print(
            f"{court.row('F42 trace collectors dead and silent')} | said {said} | "
            f"a token each {untraced * 1e3:.1f} ms, traced {statistics.median(traced) * 1e3:.1f} ms"
        )
        assert len(said) == 2
        assert statistics.median(traced) < 1.2 * untraced + 0.005

    asyncio.run(scenario())
