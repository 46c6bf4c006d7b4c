"""Latent attention over a chunk of a prompt: in the latent, and over keys and values made anew, at DeepSeek's sizes.

    python tests/benchmarks/latent_prefill.py [--heads 16] [--dtype bfloat16] [--threads 1] [--repeats 7] [--json FILE]

One layer between projections, from rotated queries to values (latent 512, rotated 64, heads of 128 and values of 128),
on the CPU. The two results are compared before anything is timed. Prints one JSON object: of every (stored, new) the
least milliseconds of both in turns, their ratio, and which of them the decoder would choose.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from provenance import provenance

from penstock.kernels import ops
from penstock.kernels.ragged import RaggedBatch
from penstock.workers.model.latent_fields import LatentShape
from penstock.workers.model.latent_prefill import LatentPrefill, rows_to_expand

SHAPE = LatentShape(None, 512, 128, 64, 128, True)
SLOTS = 16
CHUNKS = [(0, 64), (0, 256), (0, 1024), (0, 2048), (1024, 128), (1024, 256), (3072, 512), (3072, 1024), (7168, 1024)]


def forms(stored: int, new: int, heads: int, dtype: torch.dtype) -> tuple[dict[str, Callable[[], torch.Tensor]], bool]:
    """Both ways to compute one chunk, and whether the decoder would make keys and values anew."""
    blocks, scale = -(-(stored + new) // SLOTS), SHAPE.query_dim**-0.5
    kv = torch.randn(blocks, 1, 1, 1, SLOTS, SHAPE.stored_dim).to(dtype)
    table = np.arange(blocks, dtype=np.int32)[None]
    batch = RaggedBatch(np.array([stored], np.int32), np.array([0, new], np.int32), table)
    key_up = (torch.randn(heads, SHAPE.plain_dim, SHAPE.kv_rank) * SHAPE.kv_rank**-0.5).to(dtype)
    value_up = (torch.randn(heads, SHAPE.kv_rank, SHAPE.value_dim) * SHAPE.kv_rank**-0.5).to(dtype)
    query = torch.randn(new, heads, SHAPE.query_dim).to(dtype)
    plan, chosen = ops.plan_attention(kv, batch), rows_to_expand(batch, SHAPE)

    def latent() -> torch.Tensor:
        plain = query[..., : SHAPE.plain_dim].transpose(0, 1).contiguous()
        brought = torch.cat((torch.bmm(plain, key_up).transpose(0, 1), query[..., SHAPE.plain_dim :]), dim=-1)
        attended = ops.latent_attention(brought, kv, 0, plan, scale, SHAPE.kv_rank)
        return torch.bmm(attended.transpose(0, 1).contiguous(), value_up).transpose(0, 1)

    def anew() -> torch.Tensor:
        prefill = LatentPrefill(kv, batch, np.array([True]), SHAPE, heads)
        return prefill.attend(query, kv, 0, key_up, value_up, scale)

    return {"latent": latent, "anew": anew}, bool(chosen[0])


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for stored, new in CHUNKS:
        ways, chosen = forms(stored, new, args.heads, getattr(torch, args.dtype))
        error = float((ways["latent"]().float() - ways["anew"]().float()).abs().max())
        if error > (1e-4 if args.dtype == "float32" else 0.05):
            raise SystemExit(f"{stored} + {new}: the two forms differ by {error}")
        least = dict.fromkeys(ways, float("inf"))
        for _ in range(args.repeats):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                least[name] = min(least[name], time.perf_counter() - began)
        row = {"stored": stored, "new": new, **{f"{name}_ms": round(1e3 * took, 2) for name, took in least.items()}}
        ratio = round(least["latent"] / least["anew"], 2)
        rows.append({**row, "ratio": ratio, "chosen": "anew" if chosen else "latent"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = measure(args)
    facts = {"what": "latent prefill", "heads": args.heads, "dtype": args.dtype, "threads": args.threads}
    text = json.dumps({**facts, **provenance(), "rows": rows}, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
