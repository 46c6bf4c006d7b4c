"""Whether a request can ever be served here, checked before anything is kept for it. Pure.

Called by `Scheduler.submit`; whether it can be served *now* is the queue's and the memory's question.
"""

from __future__ import annotations

from penstock.workers.kv.layout import KVLayout
from penstock.workers.protocol import FailureCode, GenerateRequest
from penstock.workers.scheduler.events import PREFILL_WORK, Work

MAX_STOP_IDS = 128  # bound of one request's stop ids: all rows are compared with all of their ids at every step

Refusal = tuple[FailureCode, str]


def growth_of(work: Work, remaining: int) -> int:
    """Tokens beyond the context whose KV this worker will hold at most. The last token's KV is never computed."""
    return 0 if work is PREFILL_WORK or remaining < 1 else remaining - 1


def refusal(
    request: GenerateRequest, work: Work, max_model_len: int, layout: KVLayout, num_blocks: int
) -> Refusal | None:
    """Why this request can never be served by a worker with these limits; None if it can."""
    context, remaining = request.context_length, request.remaining
    if not request.prompt:
        return FailureCode.BAD_REQUEST, "prompt: is empty"
    if remaining < 1:
        emitted, most = len(request.emitted), request.sampling.max_tokens
        return FailureCode.BAD_REQUEST, f"max_tokens: {most} is not above the {emitted} tokens already emitted"
    if len(request.sampling.stop_token_ids) > MAX_STOP_IDS:
        count = len(request.sampling.stop_token_ids)
        return FailureCode.BAD_REQUEST, f"stop_token_ids: {count} ids, at most {MAX_STOP_IDS} are possible"
    if context + remaining > max_model_len:
        return (
            FailureCode.TOO_LARGE,
            f"{context} context tokens and {remaining} to generate exceed the model length of {max_model_len}",
        )
    blocks = layout.blocks_for(context + growth_of(work, remaining))
    if blocks > num_blocks:
        return FailureCode.TOO_LARGE, f"the request needs {blocks} KV blocks, this worker has {num_blocks}"
    return None


def refusal_of_prefill(request: GenerateRequest, sends_kv: bool, first_block: int, layout: KVLayout) -> Refusal | None:
    """The same for what only a prefill can get wrong."""
    if not sends_kv and request.remaining > 1:
        return FailureCode.BAD_REQUEST, "a prefill without a grant must end at its first token"
    if not 0 <= first_block <= layout.blocks_for(request.context_length):
        return FailureCode.BAD_REQUEST, f"grant.first_block: {first_block} lies outside the context"
    return None
