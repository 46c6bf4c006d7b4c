"""What the fleet can do at once, by its own figures: places in its batches, KV room, prompt tokens per second.

Asked by the gate (`admission.py`) and its forecast. Every worker tells in its heartbeat the line it has fitted to its
steps (`workers/step_time.py`); from it follow how fast it computes prompts, and how many sequences it can decode
together before a token takes longer than it may. Pure; knows workers only as views.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.router.fleet import Fleet, WorkerView
from penstock.workers.protocol import Role

DECODING = (Role.DECODE, Role.MIXED)
_UNMEASURED_STEPS = 8  # steps' worth of prompts to have in flight while a worker's rate is unknown
_MEASURED_STEPS = 2  # and at least, once it is known


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of all workers together, for this router: what other routers hold there is left out."""

    workers: int  # that decode
    places: float  # sequences that can decode at once, each as fast as it should
    spare: float  # of the places, those of workers that may get more work than they have places for
    kv_tokens: float
    prefill_per_s: float | None  # prompt tokens; None while nobody has computed any
    base_s: float  # of a step that decodes, the workers' mean; 0 while unknown
    row_s: float  # and for every sequence in it


def prefill_limit(view: WorkerView, backlog_s: float) -> float:
    """Prompt tokens worth having in flight at a worker."""
    budget = view.welcome.max_num_batched_tokens
    rates = [rate for rate in (view.prefill_per_s, view.tokens_per_s) if rate is not None]
    return max(_MEASURED_STEPS * budget, max(rates) * backlog_s) if rates else float(_UNMEASURED_STEPS * budget)


def batch_limit(view: WorkerView, tpot_target_s: float) -> int:
    """Sequences that a worker can decode together with a step within the target; 0 = no target.

    Where prompts are computed between the decodes, each sequence also brings its share of prompt tokens to a step.
    """
    most, load = view.welcome.max_num_seqs, view.load
    if not tpot_target_s or load is None or load.step_token_s <= 0:
        return most
    totals = load.totals
    prompt_share = (totals.prompt_tokens - totals.cached_tokens) / max(1, totals.generated_tokens)
    row_s = load.step_token_s * (1.0 + max(0.0, prompt_share))
    return max(1, min(most, int((tpot_target_s - load.step_base_s) / row_s)))


def capacity_of(fleet: Fleet, tpot_target_s: float) -> Capacity:
    """The living workers' figures, added up."""
    decoding = fleet.alive(DECODING)
    places = spare = kv_tokens = base_s = row_s = 0.0
    for view in decoding:
        limit = batch_limit(view, tpot_target_s)
        free = max(0, limit - view.others_sequences)
        places += free
        spare += free if limit == view.welcome.max_num_seqs else 0
        if view.load is not None:
            base_s += view.load.step_base_s / len(decoding)
            row_s += view.load.step_token_s / len(decoding)
        kv_tokens += max(0, view.welcome.num_blocks - view.others_blocks) * view.welcome.block_size
    rates = [view.prefill_per_s for view in prefilling(fleet)]
    known = [rate for rate in rates if rate is not None]
    # A worker that has computed nothing yet is taken for an average one.
    per_s = sum(known) / len(known) * len(rates) if known else None
    return Capacity(len(decoding), places, spare, kv_tokens, per_s, base_s, row_s)


def prefilling(fleet: Fleet) -> list[WorkerView]:
    """Who computes prompts: decode workers where nobody else is left."""
    return fleet.alive((Role.PREFILL, Role.MIXED)) or fleet.alive((Role.DECODE,))
