"""Whether adding up ranks' terms while the next rows are multiplied saves time: two ranks, one thread each, one host.

A projection of `--tokens` rows, cut by input, and the sum of its terms: alone, one after the other, and with the rows
in chunks, where another thread adds up one chunk while the next is multiplied (NanoFlow and T3 overlap so, on devices
where moving bytes takes no core). Steps run at real-time priority, so that other work does not count. Prints one JSON
object; microseconds, median of `--repeat` runs of eight.

    python tests/benchmarks/reduce_overlap.py [--tokens 512] [--inputs 1024] [--outputs 768]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from provenance import provenance

from penstock.kernels import ops
from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.process_group import GroupPlace, join_store, open_group, serve_store

_TIMEOUT_S = 60.0
_RUNS = 8


def timed(group: Collectives, work: Callable[[], object], repeat: int) -> float:
    """Median microseconds of one `work`, both ranks' ends awaited."""
    taken = []
    work()
    for _ in range(repeat):
        group.barrier()
        began = time.perf_counter()
        for _ in range(_RUNS):
            work()
        group.barrier()
        taken.append((time.perf_counter() - began) / _RUNS * 1e6)
    return round(statistics.median(taken), 1)


def measure(group: Collectives, arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """All ways for one dtype."""
    weight = ops.pack_weight(torch.randn(arguments.outputs, arguments.inputs).to(dtype))
    x = torch.randn(arguments.tokens, arguments.inputs).to(dtype)
    helper = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
    realtime = (0, os.SCHED_RR, os.sched_param(5))

    def chunked(count: int) -> None:
        sums = [helper.submit(group.all_reduce, ops.linear(rows, weight)) for rows in torch.chunk(x, count)]
        for each in sums:
            each.result()

    helper.submit(os.sched_setscheduler, *realtime).result()
    os.sched_setscheduler(*realtime)
    found = {
        "product": timed(group, lambda: ops.linear(x, weight), arguments.repeat),
        "product, then sum": timed(group, lambda: group.all_reduce(ops.linear(x, weight)), arguments.repeat),
    }
    for count in (2, 4):
        found[f"overlapped in {count} chunks"] = timed(group, lambda count=count: chunked(count), arguments.repeat)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    helper.shutdown()
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 512), ("inputs", 1024), ("outputs", 768), ("repeat", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    partner = None
    if arguments.address:
        store = join_store(arguments.address, _TIMEOUT_S)
    else:
        store, address = serve_store("127.0.0.1", _TIMEOUT_S)
        partner = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--address", address])
    try:
        group = open_group(GroupPlace("overlap", int(partner is None), 2, timeout_s=_TIMEOUT_S), store)
        results = {str(dtype)[6:]: measure(group, arguments, dtype) for dtype in (torch.float32, torch.bfloat16)}
        group.barrier()
        group.close()
    finally:
        if partner is not None:
            partner.wait(_TIMEOUT_S)
    if partner is not None:
        print(json.dumps({**provenance(), "microseconds": results}, indent=1))


if __name__ == "__main__":
    main()
