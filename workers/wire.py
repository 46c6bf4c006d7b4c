"""Message <-> bytes: `[wire version, tag, field, ...]` in msgpack, checked field by field on the way in.

Called by `rpc.py` and `service.py` on both ends of a stream. Knows the shape of every message of `protocol.py` (one
schema table, derived from the dataclasses' annotations) and nothing of who sends it or what it means.

Token tuples travel as little-endian int32 bytes, generations as uint64, numpy columns as their raw bytes. Sizes are
checked before anything is allocated for the value (`field_codecs.py`); every refusal is a `WireError` that names
message and field.

Two versions are spoken, this one and the one before, so that a cluster can be upgraded worker by worker. A router says
hello in its newest version and, where that is refused, in the older one; both then keep to it. What versions added,
each with defaults that mean what the older one means:

    version  added
    5        GenerateRequest.adapter, which no older peer can be asked for; WorkerTotals.adapters
             FailureCode.ADAPTER, which the older one calls INTERNAL

Add fields at a dataclass's end, and name them in `_SINCE`; a message's tag never changes.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, get_args

import msgpack

from penstock.workers import protocol
from penstock.workers.adapter_ref import REVISION_BYTES, AdapterRef
from penstock.workers.errors import WireError
from penstock.workers.field_codecs import (
    Codec,
    addresses,
    biases,
    choice,
    column,
    exactly,
    integer,
    integers,
    octets,
    optional,
    real,
    sequences,
    tokens,
    unchanged,
    unpack_text,
)
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec
from penstock.workers.protocol import OLDEST_WIRE_VERSION, WIRE_VERSION, FailureCode, Role, ToRouter, ToWorker
from penstock.workers.totals import AdapterTotals, GrammarTotals, TierFigures, TierTotals, WorkerTotals

MAX_MESSAGE_BYTES = 64 << 20
_MAX_ARRAY_LEN = 32  # no message has more fields; nested lists only hold nested messages

Message = ToWorker | ToRouter


_ANY_SIZE = integer(0, 2**63 - 1)
_ANY_TIME = real(0.0, 1e9)
_BY_ANNOTATION: dict[str, Codec] = {
    "int": _ANY_SIZE,
    "float": _ANY_TIME,
    "float | None": optional(_ANY_TIME),
    "bool": Codec(unchanged, lambda value: exactly(bool, value)),
    "str": Codec(unchanged, unpack_text),
    "bytes": octets(1),
    "Tokens": integers("i", "tokens"),
    "Tokens | None": optional(integers("i", "tokens")),
    "tuple[Tokens, ...]": sequences(),
    "tuple[tuple[int, float], ...]": biases(),
    "tuple[int, ...]": integers("Q", "generations"),
    "tuple[str, ...]": addresses(),
    "Role": choice(Role),
    "GrammarKind": choice(GrammarKind),
} | {f"NDArray[np.{name}]": column(name) for name in ("uint8", "uint16", "uint32", "int32", "float32")}

# Fields whose honest range is narrower or wider than their type's.
_BY_FIELD: dict[tuple[str, str], Codec] = {
    ("SamplingParams", "max_tokens"): integer(1, 2**31 - 1),
    ("SamplingParams", "temperature"): real(0.0, 1e6),
    ("SamplingParams", "top_k"): integer(0, 2**31 - 1),
    ("SamplingParams", "top_p"): real(0.0, 1.0),
    ("SamplingParams", "min_p"): real(0.0, 1.0),
    ("SamplingParams", "seed"): integer(0, 2**64 - 1),
    ("SamplingParams", "choice"): integer(0, 2**31 - 1),
    ("SamplingParams", "logprobs"): optional(integer(0, 20)),
    ("SamplingParams", "presence_penalty"): real(-1e6, 1e6),
    ("SamplingParams", "frequency_penalty"): real(-1e6, 1e6),
    ("SamplingParams", "repetition_penalty"): real(1e-6, 1e6),
    ("SamplingParams", "min_tokens"): integer(0, 2**31 - 1),
    ("SamplingParams", "prompt_logprobs"): optional(integer(0, 20)),
    ("GenerateRequest", "prompt"): tokens(),
    ("GenerateRequest", "prefix_root"): octets(1, exact=protocol.DIGEST_BYTES),
    ("GenerateRequest", "prefix_digests"): octets(protocol.DIGEST_BYTES),
    ("GenerateRequest", "priority"): integer(-(2**31), 2**31 - 1),
    ("GrammarSpec", "end_token_ids"): integers("i", "tokens"),
    ("AdapterRef", "revision"): octets(1, exact=REVISION_BYTES),
    ("Grant", "session_id"): octets(1, exact=16),
    ("WorkerTotals", "step_s"): real(0.0, 1e12),
    ("WorkerTotals", "transfer_s"): real(0.0, 1e12),
    ("WorkerTotals", "expert_skew"): real(0.0, 1e12),
    ("WorkerTotals", "weights_load_s"): real(0.0, 1e12),
    ("KVEvents", "stored"): octets(8),
    ("KVEvents", "evicted"): octets(8),
    ("KVSnapshot", "digests"): octets(8),
}
_UINT32 = integer(0, 2**32 - 1)
_UINT16 = integer(0, 2**16 - 1)


def _check_grant(grant: protocol.Grant) -> None:
    if len(grant.blocks) != len(grant.generations):
        raise WireError("Grant.generations: not one per block")


def _check_token_frame(frame: protocol.TokenFrame) -> None:
    rows, tokens = len(frame.slots), len(frame.tokens)
    for name in ("attempts", "starts", "counts", "ends"):
        if len(getattr(frame, name)) != rows:
            raise WireError(f"TokenFrame.{name}: not one per row")
    if int(frame.counts.sum()) != tokens:
        raise WireError("TokenFrame.counts: do not add up to the tokens")
    if rows and int(frame.ends.max()) > protocol.EndReason.LENGTH:
        raise WireError("TokenFrame.ends: unknown end reason")
    if len(frame.logprobs) not in (0, tokens):
        raise WireError("TokenFrame.logprobs: neither empty nor one per token")
    if len(frame.top_counts) not in (0, tokens):
        raise WireError("TokenFrame.top_counts: neither empty nor one per token")
    alternatives = int(frame.top_counts.sum())
    if len(frame.top_ids) != alternatives or len(frame.top_logprobs) != alternatives:
        raise WireError("TokenFrame.top_ids: do not match top_counts")


def _check_prompt_logprobs(message: protocol.PromptLogprobs) -> None:
    if len(message.top_counts) != len(message.logprobs):
        raise WireError("PromptLogprobs.top_counts: not one per token")
    alternatives = int(message.top_counts.sum())
    if len(message.top_ids) != alternatives or len(message.top_logprobs) != alternatives:
        raise WireError("PromptLogprobs.top_ids: do not match top_counts")


_CHECKS: dict[type, Callable[[Any], None]] = {
    protocol.Grant: _check_grant,
    protocol.TokenFrame: _check_token_frame,
    protocol.PromptLogprobs: _check_prompt_logprobs,
}


def _fields_getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """All fields of a message at once; `attrgetter` of fewer than two names returns no tuple."""
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda value: tuple(getattr(value, name) for name in names)


def _failure_code(version: int) -> Codec:
    """Codes that a version does not know travel as what is closest."""
    codec = choice(FailureCode)
    older = {code: other for code, (since, other) in _CODES_SINCE.items() if since > version}
    return Codec(lambda code: codec.pack(older.get(code, code)), codec.unpack) if older else codec


class _Schema:
    """The fields of one dataclass in order, as one wire version has them, each with its codec."""

    def __init__(self, kind: type, nested: dict[str, _Schema], version: int) -> None:
        self.kind = kind
        self._version = version
        self.check = _CHECKS.get(kind)
        fields = [field for field in dataclasses.fields(kind) if _since(kind, field.name) <= version]
        self.names = tuple(field.name for field in fields)
        self._untold = tuple(name for owner, name in _VITAL if owner is kind and name not in self.names)
        self.codecs = tuple(self._codec(field, nested) for field in fields)
        self.fields: Callable[[Any], tuple[Any, ...]] = _fields_getter(self.names)
        packs = [(index, codec.pack) for index, codec in enumerate(self.codecs)]
        self.packs = tuple((index, pack) for index, pack in packs if pack is not unchanged)

    def _codec(self, field: dataclasses.Field[Any], nested: dict[str, _Schema]) -> Codec:
        annotation = str(field.type)  # annotations are strings: every module defers their evaluation
        special = _BY_FIELD.get((self.kind.__name__, field.name))
        if special is not None:
            return special
        if annotation == "int" and field.name in ("slot", "attempt"):
            return _UINT32 if field.name == "slot" else _UINT16
        if annotation == "FailureCode":
            return _failure_code(self._version)
        schema = nested.get(annotation.removesuffix(" | None"))
        if schema is None:
            return _BY_ANNOTATION[annotation]
        codec = Codec(schema.pack, schema.unpack)
        return optional(codec) if annotation.endswith("| None") else codec

    def pack(self, value: Any) -> list[Any]:
        for name in self._untold:
            if getattr(value, name) is not None:
                raise WireError(f"wire version {self._version} has no {self.kind.__name__}.{name}")
        fields = list(self.fields(value))
        for index, pack in self.packs:
            fields[index] = pack(fields[index])
        return fields

    def unpack(self, values: Any) -> Any:
        if type(values) is not list or len(values) != len(self.codecs):
            raise WireError(f"{self.kind.__name__}: expected a list of {len(self.codecs)} fields")
        fields = []
        for name, codec, value in zip(self.names, self.codecs, values, strict=True):
            try:
                fields.append(codec.unpack(value))
            except ValueError as error:
                raise WireError(f"{self.kind.__name__}.{name}: {error!s:.200}") from error
        message = self.kind(*fields)
        if self.check is not None:
            self.check(message)
        return message


# Message or (dataclass, field) -> the wire version that added it; what is not named was in the first. Messages
# stay named also when no older version is spoken any more: their tags follow from it.
_FIRST = 3
_SINCE: dict[type | tuple[type, str], int] = {
    protocol.Move: 4,
    protocol.Stays: 4,
    (protocol.GenerateRequest, "adapter"): 5,
    (WorkerTotals, "adapters"): 5,
}

# Optional fields without which an older peer would do something else than it is asked for.
_VITAL: tuple[tuple[type, str], ...] = ((protocol.GenerateRequest, "adapter"),)
_CODES_SINCE = {FailureCode.ADAPTER: (5, FailureCode.INTERNAL)}


def _since(kind: type, field: str = "") -> int:
    return _SINCE.get((kind, field) if field else kind, _FIRST)


class _Version:
    """Every message of one wire version. A message's tag is its place among all, the newer ones behind the older."""

    def __init__(self, number: int) -> None:
        nested: dict[str, _Schema] = {}
        requests = (GrammarSpec, AdapterRef, protocol.SamplingParams, protocol.GenerateRequest, protocol.Grant)
        for part in (*requests, GrammarTotals, AdapterTotals, TierFigures, TierTotals, WorkerTotals):
            nested[part.__name__] = _Schema(part, nested, number)
        self.number = number
        self.by_tag = tuple(_Schema(kind, nested, number) for kind in _KINDS if _since(kind) <= number)

    def pack(self, message: Message) -> list[Any]:
        """Tag and fields. Raises WireError for a message that this version does not have."""
        tag = _TAGS[type(message)]
        if tag >= len(self.by_tag):
            raise WireError(f"wire version {self.number} has no {type(message).__name__}")
        return [tag, *self.by_tag[tag].pack(message)]


_KINDS: tuple[type, ...] = tuple(sorted((*get_args(ToWorker), *get_args(ToRouter)), key=_since))
_TAGS = {kind: tag for tag, kind in enumerate(_KINDS)}
_VERSIONS = {number: _Version(number) for number in range(OLDEST_WIRE_VERSION, WIRE_VERSION + 1)}
_TO_WORKER = frozenset(_TAGS[kind] for kind in get_args(ToWorker))


def encode(message: Message, version: int = WIRE_VERSION) -> bytes:
    """The message as bytes. Raises WireError when it would be larger than a peer accepts, or unknown to it."""
    data: bytes = msgpack.packb([version, *_VERSIONS[version].pack(message)])
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"{type(message).__name__}: {len(data)} bytes are more than {MAX_MESSAGE_BYTES}")
    return data


def decode_to_worker(data: bytes) -> ToWorker:
    """The router's message in `data`. Raises WireError."""
    message: ToWorker = _decode(data, to_worker=True)
    return message


def decode_to_router(data: bytes) -> ToRouter:
    """The worker's message in `data`. Raises WireError."""
    message: ToRouter = _decode(data, to_worker=False)
    return message


def _decode(data: bytes, *, to_worker: bool) -> Any:
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"message of {len(data)} bytes is larger than {MAX_MESSAGE_BYTES}")
    try:
        values = msgpack.unpackb(data, max_array_len=_MAX_ARRAY_LEN, max_map_len=0, max_ext_len=0, strict_map_key=True)
    except (ValueError, TypeError) as error:  # msgpack's own errors are ValueErrors
        raise WireError(f"not a message: {error}") from error
    if type(values) is not list or len(values) < 2:
        raise WireError("not a message: expected a list of version, tag and fields")
    version, tag = values[0], values[1]
    spoken = _VERSIONS.get(version) if type(version) is int else None
    if spoken is None:
        raise WireError(f"wire version {version!r:.40}; this side speaks {OLDEST_WIRE_VERSION} to {WIRE_VERSION}")
    if type(tag) is not int or not 0 <= tag < len(spoken.by_tag) or (tag in _TO_WORKER) is not to_worker:
        raise WireError(f"unknown message tag {tag!r:.40}")
    return spoken.by_tag[tag].unpack(values[2:])
