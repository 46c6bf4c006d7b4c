"""`POST /v1/embeddings`: the last token's hidden state of every input, scaled to length 1.

Used by `service.py`. Inputs take the four forms of a completions prompt. A model whose workers make no embeddings
refuses the requests; that is the caller's 400.
"""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.cluster.ingress.call import Call, OutputOptions
from penstock.cluster.ingress.choices import Tally
from penstock.cluster.ingress.completion_request import read_ids, read_prompts
from penstock.cluster.ingress.fields import Fields, shown
from penstock.cluster.ingress.generator import Generator
from penstock.cluster.ingress.sampling_fields import (
    fit,
    read_model,
    read_salt,
    read_truncation,
    refuse_unsupported,
)
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import FailureCode, GenerateRequest, SamplingParams

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EmbeddingAnswer:
    """Vectors in the order of the inputs, float32 [hidden size], of Euclidean length 1."""

    model: str
    vectors: tuple[Vector, ...] = field(repr=False)
    prompt_tokens: int
    base64: bool

    def as_json(self) -> dict[str, Any]:
        """OpenAI's list of embeddings."""
        data = [
            {"object": "embedding", "index": index, "embedding": _packed(vector) if self.base64 else vector.tolist()}
            for index, vector in enumerate(self.vectors)
        ]
        usage = {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}
        return {"object": "list", "model": self.model, "data": data, "usage": usage}


def parse_embedding(body: dict[str, Any], settings: IngressSettings, text: TextCodec) -> Call:
    """Raises RequestError or HttpProblem naming the field."""
    fields = Fields(body)
    model = read_model(fields, settings)
    refuse_unsupported(fields, settings)
    wants_base64(body)
    if fields.raw("dimensions") is not None:
        raise fields.refuse("dimensions", "vectors have the model's width; it cannot be changed", "unsupported_value")
    keep = read_truncation(fields, settings, 1)
    add_special = fields.boolean("add_special_tokens", default=True)
    salt = read_salt(fields)
    stated = read_prompts(fields, "input", settings)
    prompts = tuple(read_ids(prompt, "input", settings, text, keep, add_special) for prompt in stated)
    limits = tuple(fit(1, None, prompt, settings, "input") for prompt in prompts)
    sampling, output = SamplingParams(max_tokens=1), OutputOptions()
    return Call(model.name, prompts, limits, 1, sampling, output, salt, embed=True, adapter=model.adapter)


def wants_base64(body: dict[str, Any]) -> bool:
    """`encoding_format`. Raises RequestError."""
    fields = Fields(body)
    stated = fields.raw("encoding_format")
    if stated not in (None, "float", "base64"):
        raise fields.refuse("encoding_format", f"must be 'float' or 'base64', not {shown(stated)}")
    return bool(stated == "base64")


async def run_embeddings(
    requests: tuple[GenerateRequest, ...], generator: Generator, tally: Tally
) -> tuple[Vector, ...]:
    """The vectors, computed together. The first failure cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_one(request, generator, tally)) for request in requests]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return tuple(task.result() for task in tasks)


async def _one(request: GenerateRequest, generator: Generator, tally: Tally) -> Vector:
    generation = generator.submit(request)
    try:
        async for _ in generation:
            continue  # the token that ends the request is not used
        tally.cached += generation.cached_tokens
        values = generation.embedding
    finally:
        generation.cancel()
    if values is None:
        raise RefusedError(FailureCode.BAD_REQUEST, "this model's workers make no embeddings")
    length = float(np.linalg.norm(values.astype(np.float64)))
    if not np.isfinite(length):
        raise RefusedError(FailureCode.INTERNAL, "the embedding is not finite")
    return (values / max(length, 1e-30)).astype(np.float32)


def _packed(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
