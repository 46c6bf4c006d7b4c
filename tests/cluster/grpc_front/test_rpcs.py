"""The published `.proto` and the generated module say the same; stub and servicer have its rpcs."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from penstock.cluster.grpc_front import penstock_pb2
from penstock.cluster.grpc_front.deployment import GrpcMethods
from penstock.cluster.grpc_front.rpcs import SERVICE, GenerationStub

PROTO = Path(str(resources.files("penstock.cluster.grpc_front").joinpath("penstock.proto")))
TYPES = {
    value: name.removeprefix("TYPE_").lower() for name, value in vars(FieldDescriptor).items() if name[:5] == "TYPE_"
}


def blocks(kind: str) -> dict[str, str]:
    """Name to body of every `kind Name { … }` of the file, without comments; a body may hold one level of braces."""
    text = re.sub(r"//[^\n]*", "", PROTO.read_text())
    return dict(re.findall(kind + r" (\w+) \{((?:[^{}]|\{[^{}]*\})*)\}", text))


def declared_fields(body: str) -> set[tuple[str, str, int]]:
    """(type as written, name, number)."""
    inner = re.sub(r"oneof \w+ \{([^}]*)\}", r"\1", body)
    pattern = r"((?:optional |repeated )?(?:map<[^>]*>|[\w.]+)) (\w+) = (\d+);"
    return {(kind, name, int(number)) for kind, name, number in re.findall(pattern, inner)}


def written(field: FieldDescriptor) -> str:
    """The type of a field as the `.proto` spells it."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return f"map<{written(key)}, {written(value)}>"
    named = field.message_type or field.enum_type
    plain = TYPES[field.type] if named is None else named.full_name.removeprefix("penstock.v1.")
    if field.is_repeated:
        return f"repeated {plain}"
    alone = field.containing_oneof is not None and field.containing_oneof.name == f"_{field.name}"
    return f"optional {plain}" if alone else plain


def test_generated_messages_are_those_of_the_file() -> None:
    declared = {name: declared_fields(body) for name, body in blocks("message").items()}
    generated: dict[str, Descriptor] = penstock_pb2.DESCRIPTOR.message_types_by_name
    found = {
        name: {(written(field), field.name, field.number) for field in message.fields}
        for name, message in generated.items()
    }
    assert found == declared
    assert len(found) > 20


def test_generated_enums_and_rpcs_are_those_of_the_file() -> None:
    enums = {
        name: {(value, int(number)) for value, number in re.findall(r"(\w+) = (\d+);", body)}
        for name, body in blocks("enum").items()
    }
    generated = penstock_pb2.DESCRIPTOR.enum_types_by_name
    assert {name: {(v.name, v.number) for v in enum.values} for name, enum in generated.items()} == enums
    pattern = r"rpc (\w+)\((\w+)\) returns \((stream )?(\w+)\);"
    declared = {
        (name, asked, bool(stream), told)
        for name, asked, stream, told in re.findall(pattern, blocks("service")["Generation"])
    }
    assert declared == {(m.name, m.input_type.name, m.server_streaming, m.output_type.name) for m in SERVICE.methods}
    assert penstock_pb2.DESCRIPTOR.package == "penstock.v1"


def test_a_changed_field_would_be_seen() -> None:
    changed = declared_fields(blocks("message")["Usage"].replace("cached_tokens = 3", "cached_tokens = 4"))
    assert changed != declared_fields(blocks("message")["Usage"])


@pytest.mark.parametrize("rpc", [method.name for method in SERVICE.methods])
def test_every_rpc_is_served_and_callable(rpc: str) -> None:
    assert callable(getattr(GrpcMethods, rpc))
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        assert callable(getattr(GenerationStub(channel), rpc))
