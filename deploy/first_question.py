"""Wait for a server that quickstart.sh started, ask it one streamed question, print the answer and its timings.

Called by quickstart.sh only. With `--expect-gone PID` it checks instead that neither the server nor anything it
started is left. Knows Penstock through its Python handle alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import httpx
import psutil

from penstock.cluster.client import connect

MARK = "PENSTOCK_QUICKSTART"  # in the environment of everything the script starts
QUESTION = "Tell me a story about a toaster."


def address_of(arguments: list[str]) -> str:
    """URL of a `penstock serve` with these arguments."""
    chosen = {"--host": "127.0.0.1", "--port": "8000"}
    for position, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if name in chosen:
            chosen[name] = value or arguments[position + 1]
    host = "127.0.0.1" if chosen["--host"] in ("0.0.0.0", "::") else chosen["--host"]
    return f"http://{host}:{chosen['--port']}"


def wait_until_ready(url: str, server_pid: int, limit_s: float) -> None:
    """Raises SystemExit when the server died or the time is up."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if not psutil.pid_exists(server_pid) or psutil.Process(server_pid).status() == psutil.STATUS_ZOMBIE:
            raise SystemExit("the server ended before it was ready; its messages are above")
        try:
            if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready within {limit_s:.0f} s")


def ask(url: str) -> None:
    """Stream one answer to the terminal."""
    print(f"\n> {QUESTION}\n")
    begin = time.perf_counter()
    first = last = 0.0
    tokens = 0
    for piece in connect(url).stream([{"role": "user", "content": QUESTION}], max_tokens=200, temperature=0):
        now = time.perf_counter()
        first = first or now
        last = now
        tokens += len(piece.token_ids)
        print(piece.text, end="", flush=True)
    if tokens == 0:
        raise SystemExit("the stream ended without a token")
    rate = (tokens - 1) / (last - first) if tokens > 1 else 0.0
    print(f"\n\nfirst token after {1e3 * (first - begin):.0f} ms, {tokens} tokens, then {rate:.0f} tokens/s")


def expect_gone(server_pid: int, limit_s: float = 15.0) -> None:
    """Raises SystemExit when the server or one of this user's Penstock or Ray processes below it is still there."""
    end = time.monotonic() + limit_s
    while True:
        left = [
            f"{process.pid} {' '.join(process.cmdline())[:100]}"
            for process in psutil.process_iter()
            if process.pid != os.getpid() and belongs_to(process, server_pid)
        ]
        if not left:
            return
        if time.monotonic() > end:
            raise SystemExit("still running after the stop:\n" + "\n".join(left))
        time.sleep(0.2)


def belongs_to(process: psutil.Process, server_pid: int) -> bool:
    """Whether the process is the server or carries the mark of this quickstart in its environment."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.pid == server_pid or process.environ().get(MARK, "") == os.environ[MARK]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server-pid", type=int)
    parser.add_argument("--expect-gone", type=int)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds to wait for the server")
    parser.add_argument("serve_arguments", nargs="*")
    arguments = parser.parse_args()
    if arguments.expect_gone:
        expect_gone(arguments.expect_gone)
        return
    url = address_of(arguments.serve_arguments)
    wait_until_ready(url, arguments.server_pid, arguments.limit)
    ask(url)


if __name__ == "__main__":
    sys.exit(main())
