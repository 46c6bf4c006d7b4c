"""What is fuzzed: every reader of bytes that come from outside its process, by name.

A target makes inputs (valid ones, then damaged) and feeds them to a reader. The reader may accept an input or refuse
it with the error that it documents; anything else is a defect. What it accepts must survive being written and read
again. `run.py` counts, times and bounds the memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any, get_args

import msgpack
import yaml
from fakes.adapters import make_adapter
from fakes.random_plans import make_plan
from fakes.tiny_model import byte_level_bpe
from fuzz import seeds
from fuzz.mutation import ATOMS, mutate_bytes, mutate_values, pack
from fuzz.safetensors_headers import HeaderFuzz
from google.protobuf.message import DecodeError

from penstock.cluster.grpc_front import penstock_pb2 as pb
from penstock.cluster.grpc_front.request_bodies import (
    detokenize_body,
    embed_body,
    generate_body,
    tokenize_body,
)
from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.ingress.json_body import parse_json
from penstock.cluster.key_file import read_key_file
from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers import wire
from penstock.workers.errors import AdapterError, ConfigError, GrammarError, ModelError, RequestError, WireError
from penstock.workers.grammar import CompiledGrammar, GrammarVocabulary
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec
from penstock.workers.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from penstock.workers.lora.projections import adaptable
from penstock.workers.lora.weights import host_adapter
from penstock.workers.model.config import read_config
from penstock.workers.parallel import group_messages, plan_codec
from penstock.workers.transfer import frames, messages
from penstock.workers.weights import messages as weights


@dataclass(frozen=True)
class Target:
    """`refusals`: the errors that the reader documents."""

    make: Callable[[Random], Any]
    feed: Callable[[Any], None]
    refusals: tuple[type[Exception], ...]


def _spoilt(packed: list[bytes], rng: Random) -> bytes:
    """One of these messages, mostly damaged: by its fields, by its bytes, or both."""
    data = rng.choice(packed)
    what = rng.random()
    if what < 0.7:
        data = pack(mutate_values(msgpack.unpackb(data), rng))
    if what > 0.6 and what < 0.97:
        data = mutate_bytes(data, rng)
    return data


def _wire(rng: Random) -> Target:
    packed = [wire.encode(seeds.wire_message(kind, rng)) for kind in seeds.WIRE_KINDS for _ in range(20)]

    def feed(data: bytes) -> None:
        to_worker = not data[2:3] or data[2] in wire._TO_WORKER  # the tag's place in most inputs
        read = wire.decode_to_worker if to_worker else wire.decode_to_router
        again = wire.encode(read(data))
        if wire.encode(read(again)) != again:
            raise AssertionError("a message is another one when it is read again")

    return Target(lambda chance: _spoilt(packed, chance), feed, (WireError,))


def _transfer(rng: Random) -> Target:
    made = [seeds.transfer_message(kind, rng) for kind in messages.CODES for _ in range(20)]
    packed = [(messages.CODES[type(one)], messages.encode_body(one)) for one in made]

    def make(chance: Random) -> tuple[int, bytes]:
        code, body = chance.choice(packed)
        if body and chance.random() < 0.7:
            body = pack(mutate_values(msgpack.unpackb(body), chance))
        if chance.random() < 0.35:
            body = mutate_bytes(body, chance)
        return (chance.randrange(256) if chance.random() < 0.05 else code), body

    def feed(made: tuple[int, bytes]) -> None:
        read = messages.decode_body(made[0], b"s" * 16, 1, made[1])
        messages.encode_body(read)

    return Target(make, feed, (WireError,))


def _frames(rng: Random) -> Target:
    """Headers of frames: authentic ones with wrong values, and damaged ones."""
    key = bytes(32)

    def make(chance: Random) -> bytes:
        body = chance.choice((0, 1, 33, messages.MAX_BODY_BYTES, messages.MAX_BODY_BYTES + 1, 2**32 - 1))
        payload = chance.choice((0, 1, 4096, 4097, 2**32 - 1))
        numbers = (
            chance.choice((frames.TRANSFER_VERSION, frames.TRANSFER_VERSION, 0, 255)),
            chance.randrange(256),
            chance.choice((0, 0, 7)),
            body,
            payload,
        )
        sequence = chance.choice((0, 0, 0, 1, 2**64 - 1))
        magic = chance.choice((frames.MAGIC, frames.MAGIC, b"PNSG"))
        header = frames._HEADER.pack(magic, *numbers, sequence, chance.randbytes(16), chance.getrandbits(64))
        data = header + frames.hmac.digest(key, header, "sha256")
        return mutate_bytes(data, chance) if chance.random() < 0.4 else data

    def feed(data: bytes) -> None:
        header = frames.FrameSeal(key, 4096).open_header(data)
        if header.body_bytes > messages.MAX_BODY_BYTES or header.payload_bytes > 4096:
            raise AssertionError("a frame over the limit was accepted")

    return Target(make, feed, (WireError,))


def _plans(rng: Random) -> Target:
    made = [make_plan(seed, seed % 7, edits=seed % 2 == 0, scored=seed % 3 == 0) for seed in range(60)]
    packed = [plan_codec.encode_plan(plan) for plan in made]

    def make(chance: Random) -> bytearray:
        data = bytearray(chance.choice(packed))
        for _ in range(1 + chance.randrange(3)):
            place = 4 * chance.randrange(min(40, len(data) // 4))  # the head and the sizes
            value = chance.choice((0, 1, 2, 7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, chance.randrange(64)))
            data[place : place + 4] = value.to_bytes(4, "little")
        return bytearray(mutate_bytes(bytes(data), chance)) if chance.random() < 0.3 else data

    def feed(data: bytearray) -> None:
        plan = plan_codec.decode_plan(data)
        if len(plan.offsets) != len(plan.slots) + 1 or plan.offsets[-1] != len(plan.token_ids):
            raise AssertionError("rows do not fit the tokens")
        plan_codec.decode_plan(plan_codec.encode_plan(plan))

    return Target(make, feed, (WireError,))


def _group(rng: Random) -> Target:
    kinds = get_args(group_messages.GroupMessage)
    packed = [group_messages.encode_message(seeds.group_message(kind, rng)) for kind in kinds for _ in range(15)]

    def feed(data: bytes) -> None:
        again = group_messages.encode_message(group_messages.decode_message(data))
        if group_messages.encode_message(group_messages.decode_message(again)) != again:
            raise AssertionError("a message is another one when it is read again")

    return Target(lambda chance: _spoilt(packed, chance), feed, (WireError,))


def _weights(rng: Random) -> Target:
    kinds = get_args(weights.WeightMessage)
    packed = [weights.encode(seeds.weight_message(kind, rng)) for kind in kinds for _ in range(20)]

    def make(chance: Random) -> tuple[int, bytes]:
        code, body = chance.choice(packed)
        return (chance.randrange(256) if chance.random() < 0.05 else code), _spoilt([body], chance)

    def feed(made: tuple[int, bytes]) -> None:
        read = weights.decode(*made)
        if weights.decode(*weights.encode(read)) != read:
            raise AssertionError("a message is another one when it is read again")

    return Target(make, feed, (WireError,))


def _safetensors(rng: Random) -> Target:
    fuzz = HeaderFuzz()
    return Target(fuzz.make, fuzz.feed, (ModelError,))


BODY = {
    **{"model": "tiny", "prompt": ["x", "y"], "max_tokens": 4, "n": 2, "logit_bias": {"5": -1.5}, "stop": ["a"]},
    **{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "seed": 3, "logprobs": 2},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
}


def _json_bodies(rng: Random) -> Target:
    texts = (json.dumps(BODY).encode(), b'{"a":[[1,2,{"b":"\\ud83d\\ude00"}]],"c":1e308,"d":"\\u0000"}', b"{}")
    bad = (b"NaN", b"-Infinity", b"1" * 5000, b'"\\ud800"', b"[" * 70, b'{"a":1,"a":2}', b"\xff", b"1e999", b"[" * 9999)

    def make(chance: Random) -> bytes:
        data = chance.choice(texts)
        if chance.random() < 0.4:
            at = data.find(b":", chance.randrange(len(data))) + 1
            data = data[:at] + chance.choice(bad) + data[at:]
        return mutate_bytes(data, chance)

    def feed(data: bytes) -> None:
        json.dumps(parse_json(data), allow_nan=True, ensure_ascii=False).encode()

    return Target(make, feed, (HttpProblem,))


def _grpc_bodies(rng: Random) -> Target:
    generate = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="x"), cache_salt="s", truncate_prompt_tokens=3)
    chat = pb.GenerateRequest(prompt=pb.Prompt(chat=pb.Conversation(messages=[pb.ChatMessage(role="user")])))
    kinds: dict[Any, tuple[Any, ...]] = {
        pb.GenerateRequest: (lambda one: generate_body(one, True), generate, chat),
        pb.EmbedRequest: (embed_body, pb.EmbedRequest(model="m", inputs=[pb.Prompt(text="a")])),
        pb.TokenizeRequest: (tokenize_body, pb.TokenizeRequest(prompt=pb.Prompt(text="a"), add_special_tokens=True)),
        pb.DetokenizeRequest: (detokenize_body, pb.DetokenizeRequest(token_ids=[1, 2, 2**31])),
    }
    packed = [(kind, one.SerializeToString()) for kind, (_, *ones) in kinds.items() for one in ones]

    def make(chance: Random) -> tuple[Any, bytes]:
        kind, data = chance.choice(packed)
        return kind, mutate_bytes(mutate_bytes(data, chance), chance)

    def feed(made: tuple[Any, bytes]) -> None:
        kind, data = made
        kinds[kind][0](kind.FromString(data))

    return Target(make, feed, (RequestError, DecodeError))


ENTRY = {"name": "a", "key": "sk-1", "tenant": "t", "models": ["m"], "operator": True, "tokens_per_minute": 5}


def _key_files(rng: Random) -> Target:
    place = NamedTemporaryFile(suffix=".yaml")  # noqa: SIM115
    plain = [one for one in ATOMS if not isinstance(one, tuple) and one is not None and not hasattr(one, "code")]
    safe = [one for one in plain if isinstance(one, (int, float, str, list, dict, bytes))]

    def make(chance: Random) -> bytes:
        entry: dict[str, Any] = {**ENTRY, chance.choice((*ENTRY, "key_sha256", "not_after")): chance.choice(safe)}
        text = yaml.safe_dump([entry, {"name": "b", "key_sha256": "0" * 64}]).encode()
        extra = (b"", b"&a [*a, *a]", b"!!python/object/apply:os.system [id]", b"{" * 300, b"\0", b"- " * 200)
        return mutate_bytes(text, chance) + chance.choice(extra) if chance.random() < 0.6 else text

    def feed(data: bytes) -> None:
        Path(place.name).write_bytes(data)
        read_key_file(Path(place.name))

    return Target(make, feed, (ConfigError,))


def _grammars(rng: Random) -> Target:
    vocabulary = GrammarVocabulary(byte_level_bpe().to_str(), 400)
    texts = {
        GrammarKind.REGEX: "[a-z]{1,8}(foo|bar)?\\d+",
        GrammarKind.JSON_SCHEMA: json.dumps(
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        ),
        GrammarKind.LARK: 'start: "a" b+\nb: /[0-9]+/',
    }
    kinds = tuple(texts)

    def make(chance: Random) -> GrammarSpec:
        kind = chance.choice(kinds)
        text = mutate_bytes(texts[kind].encode(), chance).decode(errors="replace")
        return GrammarSpec(kind, text, (0,))

    def feed(spec: GrammarSpec) -> None:
        CompiledGrammar(spec, vocabulary).guide()

    return Target(make, feed, (GrammarError,))


def _adapters(rng: Random) -> Target:
    config = read_config(EMBEDDED_MODEL)
    home = TemporaryDirectory()
    folder = make_adapter(Path(home.name) / "a", config, rank=2, layers=(0,), more={"alpha_pattern": {"q_proj": 3}})
    stated, data = (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()
    head, places = 8 + int.from_bytes(data[:8], "little"), adaptable(config)

    def make(chance: Random) -> tuple[bytes, bytes]:
        if chance.random() < 0.4:
            return mutate_bytes(stated, chance), data
        header = mutate_bytes(data[8:head], chance)
        length = len(header) if chance.random() < 0.8 else chance.choice((0, 2**63, len(data), head))
        return stated, length.to_bytes(8, "little") + header + data[head:]

    def feed(made: tuple[bytes, bytes]) -> None:
        (Path(home.name) / "a" / CONFIG_FILE).write_bytes(made[0])
        (Path(home.name) / "a" / WEIGHTS_FILE).write_bytes(made[1])
        found = read_adapter(Path(home.name), "a", places, 8)
        assert all(update.rank <= 8 for update in found.updates.values())
        host_adapter(found)

    return Target(make, feed, (AdapterError,))


TARGETS: dict[str, Callable[[Random], Target]] = {
    "wire": _wire,
    "safetensors": _safetensors,
    "transfer": _transfer,
    "frames": _frames,
    "plans": _plans,
    "group": _group,
    "weights": _weights,
    "json-bodies": _json_bodies,
    "grpc-bodies": _grpc_bodies,
    "key-files": _key_files,
    "grammars": _grammars,
    "adapters": _adapters,
}
