"""Peak memory of loading one rank's part of a model, beside the bytes of that part.

Every rank is loaded by a process of its own, as a worker loads it. The peak is of the process's resident memory, mapped
pages of the checkpoint included (VmHWM, reset just before), less what it had before. "Own bytes" are those of the
tensors that the rank keeps, each once. Prints one JSON object; `ratio` is peak over own bytes, of the worst rank.

    python tests/benchmarks/sharded_load.py MODEL_DIR [--width 1,2,4] [--dtype float32,bfloat16]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from provenance import provenance
from safetensors.torch import save_file

from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.config import read_config
from penstock.workers.model.loading import load_decoder
from penstock.workers.parallel.collectives import Alone


class Rank(Alone):
    """A rank that loads and never computes."""

    def __init__(self, rank: int, width: int) -> None:
        self.rank, self.width = rank, width


def status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) << 10


def kept(value: object, seen: dict[int, int]) -> dict[int, int]:
    """Address and bytes of all tensors in a tree of dataclasses and tuples."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, tuple):
        for each in value:
            kept(each, seen)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            kept(getattr(value, field.name), seen)
    return seen


def _load_toy(dtype: str) -> None:
    """A model of a few kilobytes, so that code used for the first time is not counted as weights."""
    size = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "vocab_size": 64, **size}
    config |= {"max_position_embeddings": 512, "torch_dtype": "float32", "tie_word_embeddings": False}
    square = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    names = [f"model.layers.0.{name}.weight" for name in square] + ["model.embed_tokens.weight", "lm_head.weight"]
    norms = ["model.norm.weight"] + [f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")]
    tensors = {name: torch.zeros(64, 64) for name in names} | {name: torch.zeros(64) for name in norms}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(folder, "model.safetensors"))
        load_decoder(read_config(Path(folder)), Checkpoint(Path(folder)), dtype, 64, group=Rank(1, 2))


def load(model_dir: Path, rank: int, width: int, dtype: str) -> dict[str, int]:
    """Load one rank here."""
    torch.set_num_threads(1)
    _load_toy(dtype)
    config = read_config(model_dir)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    decoder = load_decoder(config, Checkpoint(model_dir), dtype, 512, group=Rank(rank, width))
    peak = status("VmHWM") - before
    return {"peak_bytes": peak, "own_bytes": sum(kept(decoder._weights, {}).values())}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--width", default="1,2,4")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(load(arguments.model_dir, arguments.rank, int(arguments.width), arguments.dtype)))
        return
    results = []
    for dtype in arguments.dtype.split(","):
        for width in map(int, arguments.width.split(",")):
            found = []
            for rank in range(width):
                command = [sys.executable, __file__, str(arguments.model_dir), "--dtype", dtype]
                command += ["--width", str(width), "--rank", str(rank)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
                found.append(json.loads(done.stdout))
            worst = max(each["peak_bytes"] / each["own_bytes"] for each in found)
            results.append({"dtype": dtype, "width": width, "ratio": round(worst, 3), "ranks": found})
    print(json.dumps({**provenance(), "model": arguments.model_dir.name, "results": results}, indent=1))


if __name__ == "__main__":
    main()
