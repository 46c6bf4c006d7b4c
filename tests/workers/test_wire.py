"""Messages survive the trip unchanged; bytes that are no message are refused, never half understood."""

import contextlib
from dataclasses import fields, is_dataclass, replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers import protocol as p
from penstock.workers import wire
from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.errors import WireError
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec

u16, u32, i31 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1)
size = st.integers(0, 2**63 - 1)
seconds = st.floats(0, 1e9, allow_nan=False)
tokens = st.lists(i31, max_size=40).map(tuple)
name = st.text(max_size=20)

samplings = st.builds(
    p.SamplingParams,
    max_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 100),
    top_k=i31,
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    choice=i31,
    stop_token_ids=tokens,
    logprobs=st.none() | st.integers(0, 20),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 2),
    logit_bias=st.lists(st.tuples(i31, st.floats(-100, 100, width=32)), max_size=5).map(tuple),
    bad_words=st.lists(tokens, max_size=4).map(tuple),
    allowed_token_ids=st.none() | tokens,
    min_tokens=i31,
    prompt_logprobs=st.none() | st.integers(0, 20),
    grammar=st.none() | st.builds(GrammarSpec, st.sampled_from(GrammarKind), name, tokens),
)
requests = st.builds(
    p.GenerateRequest,
    request_id=name,
    prompt=tokens,
    sampling=samplings,
    emitted=tokens,
    tenant=name,
    prefix_root=st.binary(min_size=32, max_size=32),
    prefix_digests=st.integers(0, 3).flatmap(lambda n: st.binary(min_size=32 * n, max_size=32 * n)),
    cache_prefix=st.booleans(),
    priority=st.integers(-(2**31), 2**31 - 1),
    queue_timeout_s=seconds,
    embed=st.booleans(),
    traceparent=name,
    adapter=st.none() | st.builds(AdapterRef, name, name, st.binary(min_size=32, max_size=32)),
)


@st.composite
def grants(draw: st.DrawFn) -> p.Grant:
    blocks = draw(tokens)
    generations = tuple(draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(blocks), max_size=len(blocks))))
    return p.Grant(
        draw(st.binary(min_size=16, max_size=16)), draw(name), draw(size), draw(name), draw(name), draw(size),
        blocks, generations, draw(seconds), draw(name),
    )  # fmt: skip


@st.composite
def frames(draw: st.DrawFn) -> p.TokenFrame:
    rows = draw(st.integers(0, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = rng.integers(1, 4, rows).astype(np.uint16)
    total = int(counts.sum())
    columns: list[Any] = [
        rng.integers(0, 2**32, rows, np.uint32),
        rng.integers(0, 2**16, rows, np.uint16),
        rng.integers(0, 2**32, rows, np.uint32),
        counts,
        rng.integers(0, 3, rows, np.uint8),
        rng.integers(0, 2**31, total, np.int32),
    ]
    if draw(st.booleans()):
        top = rng.integers(0, 3, total).astype(np.uint8)
        alternatives = int(top.sum())
        columns += [
            rng.normal(size=total).astype(np.float32),
            top,
            rng.integers(0, 2**31, alternatives, np.int32),
            rng.normal(size=alternatives).astype(np.float32),
        ]
    return p.TokenFrame(draw(size), *columns)


digests8 = st.integers(0, 4).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n))
to_worker = st.one_of(
    st.builds(p.Hello, wire_version=size, router_id=name, router_epoch=size, lease_s=seconds),
    st.builds(p.KeepAlive),
    st.builds(p.Reserve, slot=u32, attempt=u16, request=requests, takes_over=st.booleans()),
    st.builds(p.Prefill, slot=u32, attempt=u16, request=requests, grant=st.none() | grants()),
    st.builds(p.Generate, slot=u32, attempt=u16, request=requests),
    st.builds(p.Cancel, slot=u32, attempt=u16),
    st.builds(p.RequestSnapshot),
    st.builds(p.Move, slot=u32, attempt=u16, grant=grants(), emitted=size),
)
to_router = st.one_of(
    st.builds(p.Queued, slot=u32, attempt=u16, position=size),
    st.builds(p.Stays, slot=u32, attempt=u16, reason=name),
    st.builds(p.Granted, slot=u32, attempt=u16, grant=grants()),
    st.builds(p.Started, slot=u32, attempt=u16, cached_tokens=size),
    st.builds(
        p.Failed,
        slot=u32,
        attempt=u16,
        code=st.sampled_from(p.FailureCode),
        message=name,
        retry_after_s=st.none() | seconds,
    ),
    frames(),
    st.builds(p.Load, step=size, step_age_s=seconds, predicted_step_s=seconds, running=size, waiting=size,
              queued_prefill_tokens=size, free_blocks=size, cached_blocks=size, quarantined_blocks=size,
              transfers=size, preemptions=size, draining=st.booleans()),
    st.builds(p.KVEvents, sequence=size, stored=digests8, evicted=digests8),
    st.builds(p.KVSnapshot, sequence=size, digests=digests8),
    st.builds(p.Welcome, wire_version=size, worker_id=name, incarnation=size, role=st.sampled_from(p.Role), pid=size,
              width=size, block_size=size, num_blocks=size, max_num_seqs=size, max_model_len=size,
              max_num_batched_tokens=size, transfer_address=name, host_id=name, compatibility=name),
)  # fmt: skip


def same(left: Any, right: Any) -> bool:
    if isinstance(left, p.PackedTokens):
        return (
            isinstance(right, tuple)
            and left == right
            and left.packed.tolist() == list(right)
            and left.largest == max(right, default=0)
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and bool(np.array_equal(left, right, equal_nan=left.dtype.kind == "f"))
    if is_dataclass(left):
        return all(same(getattr(left, field.name), getattr(right, field.name)) for field in fields(left))
    return bool(left == right)


@settings(deadline=None, max_examples=150)
@given(to_worker)
def test_round_trip_to_worker(message: p.ToWorker) -> None:
    assert same(wire.decode_to_worker(wire.encode(message)), message)


@settings(deadline=None, max_examples=150)
@given(to_router)
def test_round_trip_to_router(message: p.ToRouter) -> None:
    assert same(wire.decode_to_router(wire.encode(message)), message)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    for decode in (wire.decode_to_worker, wire.decode_to_router):
        try:
            message = decode(data)
        except WireError:
            continue
        assert same(decode(wire.encode(message)), message)  # what is taken is a message in full


@settings(deadline=None, max_examples=300)
@given(st.one_of(to_worker, to_router), st.data())
def test_damaged_messages_raise_nothing_but_wire_errors(message: Any, data: st.DataObject) -> None:
    raw = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    decode = wire.decode_to_worker if isinstance(message, p.ToWorker) else wire.decode_to_router
    with contextlib.suppress(WireError):  # anything else fails the test
        decode(bytes(raw))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=12),
    max_leaves=20,
)


@settings(deadline=None, max_examples=120)
@given(st.integers(0, 20), st.lists(values, max_size=14))
def test_well_formed_msgpack_of_wrong_types_is_refused(tag: int, wrong: list[Any]) -> None:
    data = msgpack.packb([p.WIRE_VERSION, tag, *wrong])
    for decode in (wire.decode_to_worker, wire.decode_to_router):
        try:
            message = decode(data)
        except WireError:
            continue
        assert same(decode(wire.encode(message)), message)


REQUEST = p.GenerateRequest("r", (1, 2, 3), p.SamplingParams(4))


def packed(message: Any, *path: int, to: Any) -> bytes:
    """The message with one plain value replaced: `path` leads through nested lists, counted from the first field."""
    values = msgpack.unpackb(wire.encode(message))
    at = values
    for index in (path[0] + 2, *path[1:-1])[: len(path) - 1] if len(path) > 1 else ():
        at = at[index]
    at[path[-1] + (2 if len(path) == 1 else 0)] = to
    return bytes(msgpack.packb(values))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (packed(p.Cancel(1, 1), 0, to=-1), "Cancel.slot"),
        (packed(p.Cancel(1, 1), 0, to=2**32), "Cancel.slot"),
        (packed(p.Cancel(1, 1), 1, to=2**16), "Cancel.attempt"),
        (packed(p.Cancel(1, 1), 0, to=True), "Cancel.slot"),
        (packed(p.Generate(1, 1, REQUEST), 2, 1, to=b"123"), "GenerateRequest.prompt"),
        (packed(p.Generate(1, 1, REQUEST), 2, 1, to=b"\xff\xff\xff\xff"), "negative tokens"),
        (packed(p.Generate(1, 1, REQUEST), 2, 1, to=[1, 2]), "GenerateRequest.prompt"),
        (packed(p.Generate(1, 1, REQUEST), 2, 0, to="x" * 70_000), "GenerateRequest.request_id"),
        (packed(p.Generate(1, 1, REQUEST), 2, 5, to=b"short"), "GenerateRequest.prefix_root"),
        (packed(p.Generate(1, 1, REQUEST), 2, 9, to=float("nan")), "GenerateRequest.queue_timeout_s"),
        (packed(p.Generate(1, 1, REQUEST), 2, 2, 0, to=0), "SamplingParams.max_tokens"),
        (packed(p.Generate(1, 1, REQUEST), 2, 2, 1, to=float("inf")), "SamplingParams.temperature"),
        (packed(p.Generate(1, 1, REQUEST), 2, 2, 8, to=21), "SamplingParams.logprobs"),
        (packed(p.Generate(1, 1, REQUEST), 2, to=None), "GenerateRequest"),
        (bytes(msgpack.packb([p.WIRE_VERSION + 1, 1])), f"wire version {p.WIRE_VERSION + 1}"),
        (bytes(msgpack.packb([p.WIRE_VERSION, 99])), "unknown message tag 99"),
        (bytes(msgpack.packb([p.WIRE_VERSION, 5, 1, 1, 1])), "Cancel: expected a list of 2 fields"),
        (bytes(msgpack.packb({"a": 1})), "not a message"),
        (b"", "not a message"),
        (b"\xdd\xff\xff\xff\xff", "not a message"),
        (b"\x91" * 5000, "not a message"),
    ],
)
def test_refusals_name_message_and_field(data: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        wire.decode_to_worker(data)


def frame(**changed: Any) -> p.TokenFrame:
    columns: dict[str, Any] = {
        "step": 1,
        "slots": np.array([1, 2], np.uint32),
        "attempts": np.array([1, 1], np.uint16),
        "starts": np.array([0, 5], np.uint32),
        "counts": np.array([1, 2], np.uint16),
        "ends": np.array([0, 1], np.uint8),
        "tokens": np.array([7, 8, 9], np.int32),
    }
    return p.TokenFrame(**(columns | changed))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"attempts": np.array([1], np.uint16)}, "attempts"),
        ({"counts": np.array([1, 1], np.uint16)}, "counts"),
        ({"ends": np.array([0, 3], np.uint8)}, "ends"),
        ({"logprobs": np.zeros(2, np.float32)}, "logprobs"),
        ({"top_counts": np.array([1, 0, 0], np.uint8)}, "top_ids"),
    ],
)
def test_frames_whose_columns_disagree_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(WireError, match=says):
        wire.decode_to_router(wire.encode(frame(**changed)))


def test_a_column_of_the_wrong_dtype_does_not_leave() -> None:
    with pytest.raises(ValueError, match="dtype"):
        wire.encode(frame(slots=np.array([1, 2], np.int64)))


def test_a_message_that_is_too_large_does_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 1000)
    large = p.KVSnapshot(1, bytes(1600))
    with pytest.raises(WireError, match="KVSnapshot"):
        wire.encode(large)
    monkeypatch.undo()
    data = wire.encode(large)
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 1000)
    with pytest.raises(WireError, match="larger"):
        wire.decode_to_router(data)


def test_each_direction_takes_only_its_own_messages() -> None:
    with pytest.raises(WireError, match="tag"):
        wire.decode_to_worker(wire.encode(p.Started(1, 1, 0)))
    with pytest.raises(WireError, match="tag"):
        wire.decode_to_router(wire.encode(p.KeepAlive()))


# Tag and number of fields of every message and part of version 4, as the code of that version had them.
VERSION_4 = {
    "Hello": (0, 4), "KeepAlive": (1, 0), "Reserve": (2, 4), "Prefill": (3, 4), "Generate": (4, 3), "Cancel": (5, 2),
    "RequestSnapshot": (6, 0), "Welcome": (7, 14), "Queued": (8, 3), "Granted": (9, 3), "Started": (10, 3),
    "Failed": (11, 5), "TokenFrame": (12, 11), "PromptLogprobs": (13, 7), "Embedding": (14, 3), "Load": (15, 15),
    "KVEvents": (16, 3), "KVSnapshot": (17, 2), "Move": (18, 4), "Stays": (19, 3),
}  # fmt: skip


def test_the_version_before_is_spoken_as_it_was() -> None:
    """Whoever adds a field or a message says in `wire._SINCE` which version did."""
    schemas = {schema.kind.__name__: (tag, len(schema.codecs)) for tag, schema in enumerate(wire._VERSIONS[4].by_tag)}
    assert schemas == VERSION_4


def test_an_older_peer_hears_nothing_that_it_does_not_know() -> None:
    request = p.GenerateRequest("r", (1, 2), p.SamplingParams(max_tokens=3))
    plain = p.Generate(1, 2, request)
    assert wire.decode_to_worker(wire.encode(plain, 4)) == plain
    adapted = p.Generate(1, 2, replace(request, adapter=AdapterRef("a", "folder/a", b"r" * 32)))
    assert wire.decode_to_worker(wire.encode(adapted)) == adapted
    with pytest.raises(WireError, match=r"version 4 has no GenerateRequest\.adapter"):
        wire.encode(adapted, 4)  # it would be answered by the model alone
    failed = p.Failed(1, 2, p.FailureCode.ADAPTER, "why")
    assert wire.decode_to_router(wire.encode(failed)) == failed
    assert wire.decode_to_router(wire.encode(failed, 4)) == replace(failed, code=p.FailureCode.INTERNAL)
    unknown = bytes(msgpack.packb([4, len(VERSION_4), 1, 2, "why"]))
    with pytest.raises(WireError, match="unknown message tag"):
        wire.decode_to_router(unknown)
