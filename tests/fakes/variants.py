"""The ways to run one model that must all give the same tokens, as worker settings and as a cluster's configuration.

Prompts are `exactness.mixed_prompts` (at most 150 tokens) with at most 64 more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.router.settings import AdmissionSettings, PlacementSettings, RouterSettings
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.protocol import GenerateRequest, Role, SamplingParams, Tokens
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings, TransferSettings, WorkerSettings

MAX_MODEL_LEN = 256
BLOCK_SIZE = 16
CHUNKS = (16, 64, 0)
WHOLE_PROMPT_BUDGET = 8192  # tokens per step where prompts are not cut: more than all of them together
ROOMY_BLOCKS, SCARCE_BLOCKS = 1024, 22
KEY = "5c" * 32
ROOT = b"\7" * 32


@dataclass(frozen=True)
class Variant:
    """`chunk`: most tokens of one prompt in one step, 0 = all. `preempt`: a pool so small that sequences give way.

    `ahead`: every step is planned before the tokens of the one before are known.
    """

    split: bool
    chunk: int
    caching: bool
    preempt: bool
    transport: str = "auto"
    ahead: bool = False

    def __str__(self) -> str:
        words = ["split" if self.split else "mixed", f"chunk{self.chunk or '-none'}"]
        return "-".join(words + ["cache"] * self.caching + ["preempt"] * self.preempt + ["ahead"] * self.ahead)

    @property
    def factors(self) -> tuple[bool, int, bool, bool]:
        return self.split, self.chunk, self.caching, self.preempt

    @property
    def step_tokens(self) -> int:
        """Room for several chunks beside decodes."""
        return self.chunk * 2 + 64 if self.chunk else WHOLE_PROMPT_BUDGET

    @property
    def scheduler(self) -> SchedulerSettings:
        return SchedulerSettings(
            max_num_seqs=64,
            max_num_batched_tokens=self.step_tokens,
            long_prefill_token_threshold=self.chunk,
            max_model_len=MAX_MODEL_LEN,
            reserve_tokens=0 if self.preempt else MAX_MODEL_LEN,
            watermark=0.0 if self.preempt else 0.01,
            plan_ahead="always" if self.ahead else "auto",
        )

    @property
    def kv(self) -> KVSettings:
        blocks = SCARCE_BLOCKS if self.preempt else ROOMY_BLOCKS
        return KVSettings(block_size=BLOCK_SIZE, num_blocks=blocks, prefix_caching=self.caching)

    @property
    def router(self) -> RouterSettings:
        """Every prompt is computed by the prefill worker, however short, where there is one."""
        return RouterSettings(PlacementSettings(local_prefill_tokens=0), AdmissionSettings(ttft_target_s=120.0))

    def workers(self, model_dir: Path) -> list[WorkerSettings]:
        roles = (Role.PREFILL, Role.DECODE) if self.split else (Role.MIXED,)
        return [
            WorkerSettings(
                worker_id=f"{role.value}-0",
                role=role,
                cluster_key=KEY,
                scheduler=self.scheduler,
                kv=self.kv,
                transfer=TransferSettings(transport=self.transport),
                runner=RunnerSettings(model_dir=str(model_dir), dtype="float32"),
            )
            for role in roles
        ]

    def configuration(self) -> dict[str, Any]:
        """The same as the sections of a configuration file."""
        scheduler, kv = self.scheduler, self.kv
        return {
            "pools": {"prefill": int(self.split), "decode": int(self.split), "mixed": int(not self.split)},
            "runner": {"dtype": "float32", "threads": 1},
            "scheduler": {
                "max_num_seqs": scheduler.max_num_seqs,
                "max_num_batched_tokens": scheduler.max_num_batched_tokens,
                "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
                "max_model_len": scheduler.max_model_len,
                "reserve_tokens": scheduler.reserve_tokens,
                "watermark": scheduler.watermark,
                "plan_ahead": scheduler.plan_ahead,
            },
            "kv": {"num_blocks": kv.num_blocks, "block_size": kv.block_size, "prefix_caching": kv.prefix_caching},
            "transfer": {"transport": self.transport},
            "router": {"placement": {"local_prefill_tokens": 0}, "admission": {"ttft_target_s": 120}},
            "front": {"skip_tokenizer_init": True, "served_model_name": ["tested"]},
        }


def all_variants() -> list[Variant]:
    """The full product; transports alternate."""
    rows = itertools.product((True, False), CHUNKS, (True, False), (True, False))
    return [Variant(*row, ("shared_memory", "tcp")[number % 2]) for number, row in enumerate(rows)]


def covering_variants() -> list[Variant]:
    """Twelve rows: every combination of chunk, cache and preemption, and every pair with split or mixed; also in each
    half of the list every pair, since one half of the checkpoints is of one family."""
    rows = list(itertools.product(range(3), (True, False), (True, False)))
    chosen = [rows[number * 5 % 12] for number in range(12)]
    return [
        Variant((chunk + caching + preempt) % 2 == 0, CHUNKS[chunk], caching, preempt, ("tcp", "shared_memory")[n % 2])
        for n, (chunk, caching, preempt) in enumerate(chosen)
    ]


def pairwise_variants() -> list[Variant]:
    """Six rows with every pair of factor values; the first two are a split and a mixed cluster that share none."""
    rows = [
        (True, 16, True, True),
        (False, 16, False, False),
        (False, 64, False, True),
        (True, 64, True, False),
        (False, 0, True, False),
        (True, 0, False, True),
    ]
    return [Variant(*row) for row in rows]


def uncovered_pairs(variants: list[tuple[object, ...]]) -> set[tuple[object, ...]]:
    """Pairs of values of two factors, both occurring somewhere, that no row holds together."""
    missing: set[tuple[object, ...]] = set()
    for first, second in itertools.combinations(range(len(variants[0])), 2):
        held = {(row[first], row[second]) for row in variants}
        wanted = itertools.product({row[first] for row in variants}, {row[second] for row in variants})
        missing |= {(first, second, *pair) for pair in wanted if pair not in held}
    return missing


def request(name: str, prompt: Tokens, sampling: SamplingParams, caching: bool = True) -> GenerateRequest:
    """As the HTTP front makes it."""
    digests = chain_digests(ROOT, prompt, BLOCK_SIZE) if caching else b""
    return GenerateRequest(name, prompt, sampling, prefix_root=ROOT, prefix_digests=digests, cache_prefix=caching)


def greedy(prompts: list[Tokens], count: int, logprobs: int | None = None) -> list[GenerateRequest]:
    return [request(f"g{i}", p, SamplingParams(count, logprobs=logprobs)) for i, p in enumerate(prompts)]
