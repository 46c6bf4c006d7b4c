"""The training loop: documents packed into rows without cutting any, and one pass over rows that are never repeated.

It does not know what the text says. The run ends when its share of processor time is used up (or after a fixed number
of steps, when the run is to be repeated bit by bit), and the learning rate follows that progress.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from deploy.train_model.conversation import END_OF_TEXT, Document, documents
from deploy.train_model.vocabulary import id_of

CORES = 2
LONG_PHASE = 0.7
POOL_DOCUMENTS = 512


@dataclass(frozen=True)
class Plan:
    """What one run does: the budget in minutes of two cores or in steps, and the sizes of its batches."""

    seed: int
    minutes: float
    steps: int | None = None
    short_row_tokens: int = 256
    long_row_tokens: int = 2048
    batch_tokens: int = 4096
    matrix_rate: float = 0.02
    vector_rate: float = 4e-3
    warm_up: float = 0.02


@dataclass
class Outcome:
    """What a run used."""

    steps: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    loss: float = math.nan


def encoded(tokenizer: Tokenizer, batch: list[Document]) -> list[tuple[list[int], list[float]]]:
    """Ids and loss weights of each document."""
    pieces = tokenizer.encode_batch([piece.text for document in batch for piece in document])
    rest = iter(pieces)
    out = []
    for document in batch:
        ids: list[int] = []
        weights: list[float] = []
        for piece in document:
            piece_ids = next(rest).ids
            ids += piece_ids
            weights += [piece.weight] * len(piece_ids)
        out.append((ids, weights))
    return out


def rows(rng: Random, tokenizer: Tokenizer, row_tokens: int, long_share: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of ids and weights: whole documents, the longest first into the first row with room, the rest padding."""
    source = documents(rng, long_share)
    padding = id_of(tokenizer, END_OF_TEXT)
    while True:
        pool = encoded(tokenizer, [next(source) for _ in range(POOL_DOCUMENTS)])
        bins: list[list[tuple[list[int], list[float]]]] = []
        room: list[int] = []
        for document in sorted(pool, key=lambda one: -len(one[0])):
            size = len(document[0])
            if size > row_tokens:
                continue
            place = next((index for index, left in enumerate(room) if left >= size), len(bins))
            if place == len(bins):
                bins.append([])
                room.append(row_tokens)
            bins[place].append(document)
            room[place] -= size
        rng.shuffle(bins)
        for packed in bins:
            rng.shuffle(packed)
            ids = [token for document, _ in packed for token in document]
            weights = [weight for _, document in packed for weight in document]
            missing = row_tokens - len(ids)
            yield torch.tensor(ids + [padding] * missing), torch.tensor(weights + [0.0] * missing)


def loss_of(model: torch.nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the next-token losses."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def optimizers(model: torch.nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    matrix = torch.optim.Muon(inner, lr=plan.matrix_rate, weight_decay=0.01, momentum=0.95)
    vector = torch.optim.AdamW(outer, lr=plan.vector_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for optimizer in (matrix, vector):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [matrix, vector]


def rate_share(progress: float, warm_up: float) -> float:
    """The share of the peak learning rate: a short rise, a plateau, then straight down to zero."""
    return min(progress / warm_up, 1.0, max(0.0, (1.0 - progress) / 0.5))


def fit(model: torch.nn.Module, tokenizer: Tokenizer, plan: Plan) -> Outcome:
    """Trains the model until the budget of the plan is used up."""
    rng = Random(plan.seed)
    short = rows(rng, tokenizer, plan.short_row_tokens, 0.0)
    long = rows(rng, tokenizer, plan.long_row_tokens, 0.5)
    stepping = optimizers(model, plan)
    outcome = Outcome()
    begin_wall, begin_cpu = time.monotonic(), time.process_time()
    model.train()
    while True:
        used_s = time.process_time() - begin_cpu
        progress = outcome.steps / plan.steps if plan.steps else used_s / (plan.minutes * 60 * CORES)
        if progress >= 1.0:
            break
        lengthy = outcome.steps % 3 == 0 if progress > LONG_PHASE else outcome.steps % 16 == 15
        source, row_tokens = (long, plan.long_row_tokens) if lengthy else (short, plan.short_row_tokens)
        batch = [next(source) for _ in range(plan.batch_tokens // row_tokens)]
        ids, weights = (torch.stack(parts) for parts in zip(*batch, strict=True))
        loss = loss_of(model, ids, weights)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in stepping:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_share(progress, plan.warm_up)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        outcome.steps += 1
        outcome.tokens += ids.numel()
        outcome.loss = loss.item()
        if outcome.steps % 50 == 0:
            print(f"step {outcome.steps}  {progress:.0%}  loss {outcome.loss:.3f}  {outcome.tokens} tokens", flush=True)
    outcome.wall_s, outcome.cpu_s = time.monotonic() - begin_wall, time.process_time() - begin_cpu
    return outcome
