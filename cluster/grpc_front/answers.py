"""From what the service gives (pieces, whole choices, vectors) to the messages of `penstock.proto`.

Used by `servicer.py`. Logprobs keep token ids, where the JSON answers spell tokens; values that are not finite become
the same floor as there.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.cluster.grpc_front.penstock_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_TOOL_CALLS,
    FINISH_REASON_UNSPECIFIED,
    Alternative,
    Choice,
    EmbedResponse,
    FinishReason,
    GenerateResponse,
    StreamResponse,
    TokenLogprob,
    ToolCall,
    Usage,
    Vector,
)
from penstock.cluster.ingress.choice_text import Piece
from penstock.cluster.ingress.choices import Tally
from penstock.cluster.ingress.embeddings import EmbeddingAnswer
from penstock.cluster.ingress.logprob_format import finite
from penstock.cluster.ingress.results import ChoiceResult
from penstock.cluster.ingress.service import Job
from penstock.router import logprobs as router_logprobs
from penstock.workers.protocol import Tokens

_REASONS = {
    None: FINISH_REASON_UNSPECIFIED,
    "stop": FINISH_REASON_STOP,
    "length": FINISH_REASON_LENGTH,
    "tool_calls": FINISH_REASON_TOOL_CALLS,
}


def whole_answer(job: Job, results: Sequence[ChoiceResult], with_prompt: bool) -> GenerateResponse:
    """All choices of a job that has run."""
    echoed, wanted = _echoed(job), job.call.output.logprobs
    choices = [
        Choice(
            index=index,
            text=echoed + "".join(result.text),
            token_ids=result.tokens,
            finish_reason=_reason(result.finish_reason),
            logprobs=[_logprob(*pair) for pair in zip(result.tokens, result.logprobs, strict=True)] if wanted else (),
            tool_calls=[
                ToolCall(index=number, id=call.id, name=call.name, arguments="".join(call.arguments))
                for number, call in enumerate(result.calls)
            ],
        )
        for index, result in enumerate(results)
    ]
    return GenerateResponse(
        id=job.id,
        model=job.call.model,
        choices=choices,
        usage=usage_of(job.tally),
        prompt_token_ids=job.call.prompts[0] if with_prompt else (),
        prompt_logprobs=_prompt_logprobs(job),
    )


def first_message(job: Job, with_prompt: bool) -> StreamResponse:
    """What is told once, before the first piece's choice is added to it."""
    prompt: Tokens = job.call.prompts[0] if with_prompt else ()
    return StreamResponse(
        id=job.id, model=job.call.model, prompt_token_ids=prompt, prompt_logprobs=_prompt_logprobs(job)
    )


def piece_of_choice(job: Job, piece: Piece, first: bool) -> Choice:
    """The next piece of one choice; `first`: of its choice, so that an echo stands before it."""
    logprobs = piece.logprobs if job.call.output.logprobs else None
    return Choice(
        index=piece.index,
        text=(_echoed(job) if first else "") + piece.text,
        token_ids=piece.tokens,
        finish_reason=_reason(piece.finish_reason),
        logprobs=[_logprob(*pair) for pair in zip(piece.tokens, logprobs, strict=True)] if logprobs else (),
        tool_calls=[
            ToolCall(index=call.index, id=call.id, name=call.name, arguments=call.arguments)
            for call in piece.calls
            if not call.dropped
        ],
    )


def usage_of(tally: Tally) -> Usage:
    """Tokens of one call."""
    return Usage(prompt_tokens=tally.prompt, completion_tokens=tally.completion, cached_tokens=tally.cached)


def vectors_of(answer: EmbeddingAnswer) -> EmbedResponse:
    """The vectors in the order of the inputs."""
    vectors = [Vector(index=index, values=vector.tolist()) for index, vector in enumerate(answer.vectors)]
    return EmbedResponse(model=answer.model, vectors=vectors, usage=Usage(prompt_tokens=answer.prompt_tokens))


def _echoed(job: Job) -> str:
    return job.call.texts[0] if job.call.output.echo else ""


def _reason(reason: str | None) -> FinishReason:
    return _REASONS[reason]


def _logprob(token: int, entry: router_logprobs.TokenLogprob) -> TokenLogprob:
    top = [Alternative(token_id=other, logprob=finite(value)) for other, value in entry.top]
    return TokenLogprob(token_id=token, logprob=finite(entry.logprob), top=top)


def _prompt_logprobs(job: Job) -> list[TokenLogprob]:
    scores = job.runner.scores.get(0, ())
    pairs = zip(job.call.prompts[0], scores, strict=True) if scores else ()
    return [_logprob(token, entry) for token, entry in pairs if entry is not None]
