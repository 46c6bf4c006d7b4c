"""The held-out figures: additions of pairs never shown, lists and records never shown, and perplexity.

Answers are greedy, in float32, through the same chat markers that the chat template writes.
"""

import math
from collections.abc import Callable
from functools import partial
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from deploy.train_model import addition, records
from deploy.train_model.conversation import ASSISTANT, END, END_OF_TEXT, USER, Document, any_scene, rendered
from deploy.train_model.exchange import Exchange
from deploy.train_model.lists import LISTS, list_exchange
from deploy.train_model.vocabulary import id_of

ADDITIONS = 400
OTHERS = 200
TEXTS = 400
BATCH = 50


def replies(model: torch.nn.Module, tokenizer: Tokenizer, questions: list[str], limit: int = 64) -> list[str]:
    """The greedy answer to each question."""
    prompts = [tokenizer.encode(f"{USER}{question}{END}{ASSISTANT}").ids for question in questions]
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        for index, ids in zip(chosen, greedy(model, tokenizer, [prompts[i] for i in chosen], limit), strict=True):
            answers[index] = tokenizer.decode(ids)
    return answers


@torch.inference_mode()
def greedy(model: torch.nn.Module, tokenizer: Tokenizer, prompts: list[list[int]], limit: int) -> list[list[int]]:
    """The most likely tokens after each prompt, up to the end of the answer; padding stands to the right."""
    stops = {id_of(tokenizer, END), id_of(tokenizer, END_OF_TEXT)}
    out: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    while going and max(len(out[index]) for index in going) < limit:
        texts = [prompts[index] + out[index] for index in going]
        longest = max(map(len, texts))
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        logits = model(input_ids=ids, use_cache=False).logits
        last = [int(logits[row, len(text) - 1].argmax()) for row, text in enumerate(texts)]
        for index, token in zip(going, last, strict=True):
            if token not in stops:
                out[index].append(token)
        going = [index for index, token in zip(going, last, strict=True) if token not in stops]
    return out


def held_out(draw: Callable[[], Exchange], count: int) -> list[Exchange]:
    """Exchanges of which training has seen none."""
    found: list[Exchange] = []
    while len(found) < count:
        exchange = draw()
        if exchange.held_out:
            found.append(exchange)
    return found


def share_right(model: torch.nn.Module, tokenizer: Tokenizer, asked: list[Exchange], limit: int = 64) -> float:
    """The share of answers that are right letter by letter."""
    given = replies(model, tokenizer, [exchange.question for exchange in asked], limit)
    return sum(reply == exchange.answer for reply, exchange in zip(given, asked, strict=True)) / len(asked)


def addition_accuracy(model: torch.nn.Module, tokenizer: Tokenizer, rng: Random) -> float:
    """The share of right sums over held-out pairs, each asked in one of the ways people ask."""
    pairs = rng.sample(addition.held_out_pairs(), ADDITIONS)
    given = replies(model, tokenizer, [addition.phrased(rng, a, b) for a, b in pairs], 16)
    return sum(addition.is_right(reply, a, b) for reply, (a, b) in zip(given, pairs, strict=True)) / len(pairs)


@torch.inference_mode()
def perplexity(model: torch.nn.Module, tokenizer: Tokenizer, texts: list[Document]) -> float:
    """The perplexity per token of the weighted-one pieces, which are the answers."""
    total, count = 0.0, 0
    for document in texts:
        encoded = [(tokenizer.encode(piece.text).ids, piece.weight) for piece in document]
        ids = torch.tensor([token for piece_ids, _ in encoded for token in piece_ids])[None]
        wanted = torch.tensor([weight == 1.0 for piece_ids, weight in encoded for _ in piece_ids])[1:]
        losses = F.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
        total += float(losses[wanted].sum())
        count += int(wanted.sum())
    return math.exp(total / count)


def held_out_texts(rng: Random) -> list[Document]:
    """Conversations of one scene each, with an exchange that training has not seen."""
    texts: list[Document] = []
    while len(texts) < TEXTS:
        scene = any_scene(rng)
        if any(exchange.held_out for exchange in scene):
            texts.append(rendered(scene))
    return texts


def figures(model: torch.nn.Module, tokenizer: Tokenizer, seed: int) -> dict[str, float]:
    """All held-out figures, by name."""
    model.eval()
    rng = Random(f"evaluation {seed}")
    out = {"addition_accuracy": addition_accuracy(model, tokenizer, rng)}
    for task in LISTS:
        asked = held_out(partial(list_exchange, rng, task), OTHERS)
        out[f"list_{task}_accuracy"] = share_right(model, tokenizer, asked)
    asked = held_out(lambda: records.to_record(rng)[0], OTHERS)
    given = replies(model, tokenizer, [exchange.question for exchange in asked])
    right = [records.is_right(reply, exchange.answer) for reply, exchange in zip(given, asked, strict=True)]
    out["json_valid"] = sum(records.is_json(reply) for reply in given) / len(given)
    out["json_right"] = sum(right) / len(right)
    out["perplexity"] = perplexity(model, tokenizer, held_out_texts(rng))
    return {name: round(value, 4) for name, value in out.items()}
