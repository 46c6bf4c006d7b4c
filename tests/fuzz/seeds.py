"""Valid messages of every protocol between processes, drawn at random: what the fuzzers start from."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any, get_args

import numpy as np

from penstock.workers import protocol as p
from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec
from penstock.workers.parallel import group_messages as g
from penstock.workers.totals import WorkerTotals
from penstock.workers.transfer import messages as t
from penstock.workers.transfer.head_slices import HeadRange
from penstock.workers.weights import messages as w

WIRE_KINDS = (*get_args(p.ToWorker), *get_args(p.ToRouter))
ADDRESSES = ((), ("10.0.0.1:7",), ("10.0.0.1:7", "[::1]:8"))


def wire_message(kind: type, rng: Random) -> Any:
    """A message of `protocol.py`."""
    if kind is p.TokenFrame:
        return _frame(rng)
    if kind is p.PromptLogprobs:
        return _prompt_logprobs(rng)
    return _filled(kind, rng)


def group_message(kind: type, rng: Random) -> Any:
    """A message of `group_messages.py`; lists that belong together are of one length."""
    message = _filled(kind, rng)
    match message:
        case g.OfferBlocks():
            return dataclasses.replace(message, fragments=message.blocks)
        case g.BlocksRenewed():
            generations = np.arange(len(message.blocks), dtype=np.uint64)
            return g.BlocksRenewed(message.blocks, generations)
        case g.ExpectSession() | g.StartSession():
            return dataclasses.replace(message, generations=tuple(range(len(message.blocks))))
    return message


def weight_message(kind: type, rng: Random) -> Any:
    """A message of `weights/messages.py`."""
    if kind is w.Terms:
        count = 1 + rng.randrange(3)
        files = (w.ServedFile(f"m-{index}.safetensors", 8 + index, b"h" * 32, b"d" * 32) for index in range(count))
        return w.Terms("r" * 32, 900, tuple(files))
    return _filled(kind, rng)


def transfer_message(kind: type, rng: Random) -> Any:
    """A message of `transfer/messages.py`."""
    if kind is t.Offer:
        count = 1 + rng.randrange(4)
        return t.Offer(b"s" * 16, 1, rng.random() < 0.5, np.zeros(count, t.OFFER_DTYPE))
    return _filled(kind, rng)


def _filled(kind: type, rng: Random) -> Any:
    values = {field.name: _value(field.name, str(field.type), rng) for field in dataclasses.fields(kind)}
    if kind is p.Grant:
        values["generations"] = tuple(range(len(values["blocks"])))
    return kind(**values)


def _value(name: str, annotation: str, rng: Random) -> Any:
    if annotation.endswith("| None"):
        return None if rng.random() < 0.4 else _value(name, annotation.removesuffix(" | None"), rng)
    by_name = {
        "prefix_root": b"r" * 32,
        "prefix_digests": b"d" * 64,
        "stored": b"8" * 16,
        "evicted": b"8" * 8,
        "digests": b"8" * 8,
        "session_id": b"s" * 16,
        "max_tokens": 1 + rng.randrange(100),
        "logprobs": rng.randrange(21),
        "prompt_logprobs": rng.randrange(21),
        "seed": rng.getrandbits(64),
        "repetition_penalty": 1.5,
        "logit_bias": ((1, 2.0), (7, -3.5)),
        "bad_words": ((1, 2), (3,)),
    }
    if name in by_name and not annotation.startswith("NDArray"):
        return by_name[name]
    return _of_type(annotation, rng)


def _of_type(annotation: str, rng: Random) -> Any:
    nested = {"p": p.SamplingParams, "SamplingParams": p.SamplingParams, "GenerateRequest": p.GenerateRequest}
    nested |= {"Grant": p.Grant, "WorkerTotals": WorkerTotals}
    if annotation == "WorkerTotals":
        return WorkerTotals()
    if annotation in nested:
        return _filled(nested[annotation], rng)
    if annotation.startswith("NDArray[np."):
        dtype = annotation.removeprefix("NDArray[np.").removesuffix("]")
        return np.arange(rng.randrange(5)).astype(dtype)
    plain = {
        "int": lambda: rng.randrange(60_000),
        "float": lambda: rng.random(),
        "bool": lambda: rng.random() < 0.5,
        "str": lambda: rng.choice(("", "decode-1", "10.0.0.1:700", "café")),
        "bytes": lambda: b"b" * rng.randrange(9),
        "Tokens": lambda: tuple(rng.randrange(2**31) for _ in range(rng.randrange(6))),
        "tuple[int, ...]": lambda: tuple(range(rng.randrange(5))),
        "tuple[str, ...]": lambda: rng.choice(ADDRESSES),
        "Role": lambda: rng.choice(list(p.Role)),
        "FailureCode": lambda: rng.choice(list(p.FailureCode)),
        "GrammarSpec": lambda: GrammarSpec(GrammarKind.REGEX, "[0-9]+", (0, 399)),
        "AdapterRef": lambda: AdapterRef("billing", "teams/billing", b"r" * 32),
        "HeadRange": lambda: HeadRange(rng.randrange(8), 1 + rng.randrange(8)),
    }
    return plain[annotation]()


def _frame(rng: Random) -> p.TokenFrame:
    rows = rng.randrange(5)
    counts = np.array([1 + rng.randrange(3) for _ in range(rows)], np.uint16)
    total = int(counts.sum())
    ends = np.array([rng.randrange(3) for _ in range(rows)], np.uint8)
    slots, attempts = np.arange(rows, dtype=np.uint32), np.zeros(rows, np.uint16)
    plain = (rng.randrange(1000), slots, attempts, slots, counts, ends, np.arange(total, dtype=np.int32))
    if rng.random() < 0.5:
        return p.TokenFrame(*plain)
    top = np.ones(total, np.uint8)
    scored = np.zeros(total, np.float32), top, np.arange(total, dtype=np.int32), np.zeros(total, np.float32)
    return p.TokenFrame(*plain, *scored)


def _prompt_logprobs(rng: Random) -> p.PromptLogprobs:
    total = rng.randrange(6)
    scores = np.zeros(total, np.float32)
    return p.PromptLogprobs(1, 2, 3, scores, np.ones(total, np.uint8), np.arange(total, dtype=np.int32), scores)
