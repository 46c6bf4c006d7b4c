"""Step plans of random content, every column of which is used, and their comparison bit by bit."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from penstock.workers.scheduler.plan import LogitEdits, SamplingBatch, ScoredPrompt, StepPlan


def i32(rng: np.random.Generator, *shape: int, high: int = 2**31 - 1) -> np.ndarray:
    return rng.integers(0, high, shape).astype(np.int32)


def make_plan(seed: int, rows: int, *, edits: bool = False, scored: bool = False) -> StepPlan:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, rows)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    sample_rows = np.flatnonzero(rng.random(rows) < 0.7).astype(np.int32)
    sampled = len(sample_rows)
    logit_edits = None
    if edits:
        columns = {}
        for field in fields(LogitEdits):
            real = field.name in ("presence", "frequency", "repetition", "bias_values")
            length = int(rng.integers(0, 9))
            columns[field.name] = rng.random(length).astype(np.float32) if real else i32(rng, length)
        masked = np.flatnonzero(rng.random(sampled) < 0.5).astype(np.int32)
        words = int(rng.integers(1, 9)) if len(masked) else 0
        columns |= {"masked_rows": masked, "masks": i32(rng, len(masked), words)}
        logit_edits = LogitEdits(**columns)
    sampling = SamplingBatch(
        temperature=rng.random(sampled).astype(np.float32),
        top_k=i32(rng, sampled),
        top_p=rng.random(sampled).astype(np.float32),
        min_p=rng.random(sampled).astype(np.float32),
        seed=rng.integers(0, 2**64 - 1, sampled, np.uint64),
        choice=i32(rng, sampled),
        position=i32(rng, sampled),
        logprobs=rng.integers(-1, 20, sampled).astype(np.int32),
        edits=logit_edits,
    )
    kept = i32(rng, rows, 40, high=4096)
    return StepPlan(
        step=int(rng.integers(0, 2**40)),
        slots=i32(rng, rows),
        starts=i32(rng, rows),
        offsets=offsets,
        token_ids=i32(rng, int(offsets[-1])),
        block_tables=kept[:, : int(rng.integers(1, 41))],  # a view with gaps, as the scheduler's is
        sample_rows=sample_rows,
        sampling=sampling,
        num_decode=int(rng.integers(0, rows + 1)),
        copies=i32(rng, int(rng.integers(0, 3)), 2),
        scored=ScoredPrompt(i32(rng, 3), i32(rng, 3), i32(rng, 3)) if scored else None,
        embed_rows=sample_rows[:1],
        follows=seed % 2 == 1,
        num_continued=int(rng.integers(0, rows + 1)),
    )


def assert_equal(one: object, other: object) -> None:
    for field in fields(one):  # type: ignore[arg-type]
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            assert left.shape == right.shape, field.name
            assert left.tobytes() == right.tobytes(), field.name
        elif hasattr(left, "__dataclass_fields__"):
            assert_equal(left, right)
        else:
            assert left == right, field.name
