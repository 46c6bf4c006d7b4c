"""What each way of Ray Serve to reach an ASGI app costs: default proxy, direct ingress, HAProxy, own listener, none.

Run by hand (`python tests/benchmarks/serve_paths.py --json`). A stub app streams one server-sent event per tick to
every open stream, as an ingress does for one engine step; nothing of Penstock runs. Each path gets a fresh Ray in a
fresh process, because Serve reads its switches at import. Reported per path: median time to the first chunk at
concurrency 1, chunks per second delivered at concurrency 32, the median gap between chunks, and processor time of all
server processes per thousand chunks (the figure that survives a noisy machine).

`replica` is what Penstock does: the Serve replica listens itself. `bare` is uvicorn without Ray.
The measuring client is a bare asyncio socket reader, the same for all paths.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil

EVENT = b'data: {"id":"cmpl-0","object":"text_completion","choices":[{"index":0,"text":" word"}]}\n\n'
PATHS = ("bare", "proxy", "direct", "haproxy", "replica")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
THROUGHPUT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}


@dataclass(frozen=True, slots=True)
class PathFigures:
    """One path's figures; times in milliseconds."""

    path: str
    start_up_s: float
    ttft_ms: float
    chunks_per_s: float
    wanted_chunks_per_s: float
    gap_ms: float
    cpu_s_per_1000_chunks: float


class Ticker:
    """One event per `interval_s` for every open stream, like one token frame per engine step."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._waiters: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def tick(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter


def build_stub(interval_s: float, chunks: int) -> Any:
    """An ASGI app whose every POST answers with `chunks` events, the first at once."""
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import StreamingResponse

    app = FastAPI()
    ticker = Ticker(interval_s)

    async def events() -> AsyncIterator[bytes]:
        yield EVENT
        for _ in range(chunks - 1):
            await ticker.tick()
            yield EVENT

    async def stream(request: Request) -> StreamingResponse:
        await request.body()
        return StreamingResponse(events(), media_type="text/event-stream")

    app.add_route("/stream", stream, methods=["POST"])
    return app


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_bare(port: int, interval_s: float, chunks: int) -> None:
    import uvicorn

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    uvicorn.run(build_stub(interval_s, chunks), host="127.0.0.1", port=port, log_level="error", access_log=False)


def serve_on_ray(path: str, port: int, interval_s: float, chunks: int) -> None:
    """Blocks until stdin closes. `path` decided the environment before this process started."""
    import ray
    from ray import serve

    ray.init(
        num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False, logging_level="error"
    )
    if path == "replica":
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
        serve.run(own_listener(port, interval_s, chunks), name="stub", route_prefix=None)
        wait_for_end()
        return
    host_port = free_port() if path == "direct" else port
    serve.start(http_options={"host": "127.0.0.1", "port": host_port}, logging_config={"enable_access_log": False})

    def build() -> Any:
        return build_stub(interval_s, chunks)

    @serve.deployment(num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
    @serve.ingress(build)
    class Stub:
        """The stub app as a Serve deployment; built in the replica, so that nothing is pickled but two numbers."""

    serve.run(Stub.bind(), name="stub", route_prefix="/")
    wait_for_end()


def wait_for_end() -> None:
    import ray
    from ray import serve

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


def own_listener(port: int, interval_s: float, chunks: int) -> Any:
    """A Serve application whose replica listens on `port` itself, as `cluster/serve_app.py` does."""
    from ray import serve

    @serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0.1})
    class Listening:
        async def __init__(self) -> None:
            from penstock.cluster.ingress.listener import Listener

            self.listener = Listener(build_stub(interval_s, chunks), "127.0.0.1", port, shared=False, drain_s=1.0)
            self.listener.start()

    return Listening.bind()


async def read_stream(port: int) -> tuple[float, list[float]]:
    """(start, arrival time of every event) of one streamed answer, seconds on the monotonic clock."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": "x " * 200}).encode()
    writer.write(
        b"POST /stream HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )
    arrivals: list[float] = []
    while True:
        data = await reader.read(65536)
        if not data:
            break
        now = time.perf_counter()
        arrivals.extend([now] * data.count(b"data: "))
    writer.close()
    return start, arrivals


def server_processes(root: psutil.Process) -> dict[int, float]:
    """Processor seconds so far of the server process and all below it."""
    seconds: dict[int, float] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
            seconds[process.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return seconds


async def measure(path: str, port: int, root: psutil.Process, args: argparse.Namespace, started: float) -> PathFigures:
    for _ in range(3):
        await read_stream(port)
    ttfts = []
    for _ in range(args.singles):
        start, arrivals = await read_stream(port)
        ttfts.append(arrivals[0] - start)
    before = server_processes(root)
    begin = time.perf_counter()
    results = await asyncio.gather(*(read_stream(port) for _ in range(args.concurrency)))
    wall = time.perf_counter() - begin
    after = server_processes(root)
    total = sum(len(arrivals) for _, arrivals in results)
    if total != args.concurrency * args.chunks:
        raise RuntimeError(f"{path}: {total} of {args.concurrency * args.chunks} events arrived")
    gaps = [b - a for _, times in results for a, b in itertools.pairwise(times)]
    cpu = sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())
    return PathFigures(
        path=path,
        start_up_s=round(started, 2),
        ttft_ms=round(statistics.median(ttfts) * 1e3, 2),
        chunks_per_s=round(total / wall, 1),
        wanted_chunks_per_s=round(args.concurrency / args.interval, 1),
        gap_ms=round(statistics.median(gaps) * 1e3, 2),
        cpu_s_per_1000_chunks=round(cpu / total * 1000, 4),
    )


def environment(path: str, port: int) -> dict[str, str]:
    extra = dict(QUIET)
    if path in ("direct", "haproxy"):
        extra |= THROUGHPUT
        extra |= {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0"}
    if path == "direct":
        extra |= {
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),
        }
    if path == "haproxy":
        extra |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_NBTHREAD": "1"}
    return dict(os.environ) | extra


def run_path(path: str, args: argparse.Namespace) -> PathFigures:
    port = free_port()
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--serve", path, "--port", str(port)]
    command += ["--interval", str(args.interval), "--chunks", str(args.chunks)]
    server = subprocess.Popen(
        command,
        env=environment(path, port),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if args.verbose else subprocess.DEVNULL,
    )
    try:
        assert server.stdout is not None
        while (line := server.stdout.readline()) not in (b"ready\n", b""):
            pass
        if not line:
            raise RuntimeError(f"{path}: the server did not start")
        wait_for_port(port)
        started = time.perf_counter() - begin
        return asyncio.run(measure(path, port, psutil.Process(server.pid), args, started))
    finally:
        assert server.stdin is not None
        server.stdin.close()
        if path == "bare":
            server.terminate()
        server.wait(60)


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"nothing listens on port {port}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    parser.add_argument("--interval", type=float, default=0.025, help="seconds between two events of a stream")
    parser.add_argument("--chunks", type=int, default=100, help="events per stream")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--singles", type=int, default=10, help="streams measured alone for the first chunk")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--serve", choices=PATHS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if args.serve == "bare":
        serve_bare(args.port, args.interval, args.chunks)
    elif args.serve:
        serve_on_ray(args.serve, args.port, args.interval, args.chunks)
    else:
        for path in args.paths:
            figures = asdict(run_path(path, args))
            print(json.dumps(figures) if args.json else "  ".join(f"{k}={v}" for k, v in figures.items()), flush=True)


if __name__ == "__main__":
    main()
