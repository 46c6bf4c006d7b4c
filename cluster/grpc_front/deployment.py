"""The rpcs as methods of the Serve deployment, for Serve's own gRPC proxy (`grpc_options` of a Serve configuration).

`serve_app.IngressReplica` inherits from `GrpcMethods`; Serve calls the method that has the rpc's name. A failure is
told through Serve's context and an empty answer, not raised: only so its code, text and metadata arrive (an exception
keeps the code alone), and callers' mistakes leave no tracebacks in Serve's log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from penstock.cluster.grpc_front.penstock_pb2 import (
    DetokenizeRequest,
    DetokenizeResponse,
    EmbedRequest,
    EmbedResponse,
    GenerateRequest,
    GenerateResponse,
    HealthRequest,
    HealthResponse,
    ListModelsRequest,
    ListModelsResponse,
    StreamResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from penstock.cluster.grpc_front.proxy_watch import ProxyWatch
from penstock.cluster.grpc_front.servicer import GenerationServicer, RpcFailed

# ruff: noqa: N802 - Serve's proxy calls methods by the rpcs' names


class GrpcMethods:
    """Base class of the deployment, which sets `grpc_servicer` and `grpc_proxies` before it serves."""

    grpc_servicer: GenerationServicer
    grpc_proxies: ProxyWatch

    async def Generate(self, request: GenerateRequest, grpc_context: Any) -> GenerateResponse:
        """See `penstock.proto`."""
        answer: GenerateResponse = await self._answer("Generate", request, grpc_context, GenerateResponse())
        return answer

    async def Stream(self, request: GenerateRequest, grpc_context: Any) -> AsyncIterator[StreamResponse]:
        """See `penstock.proto`."""
        metadata = grpc_context.invocation_metadata()
        call = self.grpc_servicer.open("Stream", metadata)
        grpc_context.set_trailing_metadata(list(call.trailing))
        messages = self.grpc_servicer.stream(call, request, metadata)
        try:
            with self.grpc_proxies.over(metadata):
                async for message in messages:
                    yield message
        except RpcFailed as failed:
            _tell(grpc_context, failed)
            yield StreamResponse()
        finally:
            await messages.aclose()  # ends the work at once

    async def Embed(self, request: EmbedRequest, grpc_context: Any) -> EmbedResponse:
        """See `penstock.proto`."""
        answer: EmbedResponse = await self._answer("Embed", request, grpc_context, EmbedResponse())
        return answer

    async def Tokenize(self, request: TokenizeRequest, grpc_context: Any) -> TokenizeResponse:
        """See `penstock.proto`."""
        answer: TokenizeResponse = await self._answer("Tokenize", request, grpc_context, TokenizeResponse())
        return answer

    async def Detokenize(self, request: DetokenizeRequest, grpc_context: Any) -> DetokenizeResponse:
        """See `penstock.proto`."""
        answer: DetokenizeResponse = await self._answer("Detokenize", request, grpc_context, DetokenizeResponse())
        return answer

    async def ListModels(self, request: ListModelsRequest, grpc_context: Any) -> ListModelsResponse:
        """See `penstock.proto`."""
        answer: ListModelsResponse = await self._answer("ListModels", request, grpc_context, ListModelsResponse())
        return answer

    async def Health(self, request: HealthRequest, grpc_context: Any) -> HealthResponse:
        """See `penstock.proto`."""
        answer: HealthResponse = await self._answer("Health", request, grpc_context, HealthResponse())
        return answer

    async def _answer(self, rpc: str, request: Any, context: Any, empty: Any) -> Any:
        metadata = context.invocation_metadata()
        call = self.grpc_servicer.open(rpc, metadata)
        context.set_trailing_metadata(list(call.trailing))
        try:
            with self.grpc_proxies.over(metadata):
                return await self.grpc_servicer.answer(call, request, metadata)
        except RpcFailed as failed:
            _tell(context, failed)
            return empty


def _tell(context: Any, failed: RpcFailed) -> None:
    context.set_code(failed.status.code)
    context.set_details(failed.status.message)
    context.set_trailing_metadata(list(failed.status.metadata))
