"""The rpcs of `penstock.v1.Generation` for grpcio: what the published service's names are bound to.

`add_GenerationServicer_to_server` is what `grpc_options.grpc_servicer_functions` of a Serve configuration names;
Serve's proxy keeps the names and the request types and sends the calls to the deployment's methods. `GenerationStub`
is for callers in Python. Both read the descriptor, so that they cannot differ from `penstock.proto`. Light to import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from penstock.cluster.grpc_front.penstock_pb2 import DESCRIPTOR
from penstock.cluster.grpc_front.relay import ServiceHandlers
from penstock.cluster.grpc_front.request_bodies import lenient

SERVICE = DESCRIPTOR.services_by_name["Generation"]


def add_GenerationServicer_to_server(servicer: Any, server: Any) -> None:  # noqa: N802 - as generated code names it
    """Register the servicer's methods, named as the rpcs, with a grpcio server."""
    handlers = {method.name: _handler(method, getattr(servicer, method.name)) for method in SERVICE.methods}
    server.add_generic_rpc_handlers((ServiceHandlers(SERVICE.full_name, handlers),))


class GenerationStub:
    """Calls of one channel, blocking or on asyncio as the channel is. Each takes and gives messages of the `.proto`."""

    def __init__(self, channel: Any) -> None:
        self.Generate = _call(channel, "Generate")
        self.Stream = _call(channel, "Stream")
        self.Embed = _call(channel, "Embed")
        self.Tokenize = _call(channel, "Tokenize")
        self.Detokenize = _call(channel, "Detokenize")
        self.ListModels = _call(channel, "ListModels")
        self.Health = _call(channel, "Health")


def _handler(method: MethodDescriptor, serve: Callable[..., Any]) -> Any:
    make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    request, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    return make(serve, request_deserializer=lenient(request.FromString), response_serializer=answer.SerializeToString)


def _call(channel: Any, name: str) -> Any:
    method = SERVICE.methods_by_name[name]
    make = channel.unary_stream if method.server_streaming else channel.unary_unary
    request, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    path = f"/{SERVICE.full_name}/{name}"
    return make(path, request_serializer=request.SerializeToString, response_deserializer=answer.FromString)
