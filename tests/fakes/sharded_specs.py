"""Checkpoints of every family whose heads four ranks can share; other sizes are such that nothing divides them."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from fakes.exactness import CheckpointSpec, expert_specs, family_specs
from fakes.latent_specs import latent_specs

WIDTHS = (1, 2, 4)
CHUNKS = (16, 64, 0)  # prompt tokens per step; 0 = all


@dataclass(frozen=True)
class Layout:
    """How a model is run."""

    width: int
    chunk: int
    caching: bool
    preempt: bool

    def __str__(self) -> str:
        words = [f"width{self.width}", f"chunk{self.chunk or '-none'}"]
        return "-".join(words + ["cache"] * self.caching + ["preempt"] * self.preempt)

    @property
    def factors(self) -> tuple[int, int, bool, bool]:
        return self.width, self.chunk, self.caching, self.preempt


def sharded_specs() -> list[CheckpointSpec]:
    """One of each family and two of Llama: key and value heads kept whole, cut and repeated."""
    mistral, qwen2, gemma2, gemma3 = family_specs()[0], family_specs()[3], family_specs()[7], family_specs()[9]
    qwen3_moe, mixtral, qwen2_moe = expert_specs()[1], expert_specs()[2], expert_specs()[4]
    shapes = [
        (CheckpointSpec("llama", attention_bias=True, head_dim=48, seed=1), (4, 2)),
        (
            CheckpointSpec("llama", tied=True, head_dim=32, llama3_rope=True, changes='{"mlp_bias": true}', seed=2),
            (8, 8),
        ),
        (CheckpointSpec("qwen3", tied=True, head_dim=64, seed=3), (8, 4)),
        (mistral, (4, 2)),
        (qwen2, (8, 2)),
        (gemma2, (4, 4)),
        (gemma3, (4, 1)),
        (qwen3_moe, (4, 1)),
        (mixtral, (4, 4)),
        (qwen2_moe, (4, 2)),
    ]
    cut = [
        dataclasses.replace(spec, heads=heads, kv_heads=kv_heads, vocab=1021 - number, intermediate=250 + number)
        for number, (spec, (heads, kv_heads)) in enumerate(shapes)
    ]
    return [*cut, latent_specs()[1], latent_specs()[2]]


def all_layouts() -> list[Layout]:
    """The full product."""
    return [Layout(*row) for row in itertools.product(WIDTHS, CHUNKS, (True, False), (True, False))]


def covering_layouts() -> list[Layout]:
    """Twelve, one for each checkpoint: every pair of values of two factors, widths above 1 more often."""
    rows = [
        (2, 16, True, True),
        (1, 16, True, False),
        (4, 64, True, False),
        (1, 0, True, True),
        (1, 64, False, True),
        (4, 16, False, True),
        (2, 0, False, False),
        (2, 64, False, True),
        (4, 0, True, True),
        (4, 16, False, False),
        (2, 64, True, False),
        (4, 0, False, False),
    ]
    return [Layout(*row) for row in rows]
