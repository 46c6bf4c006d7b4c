"""A gRPC server of our own in an ingress process, for `penstock serve --grpc-port`.

Serve's gRPC proxy listens on every interface, whatever it is told, cannot be had on a Ray cluster whose Serve runs
already, and relays every message between processes. This one listens where the HTTP server does. Started and stopped
by `serve_app.py`. Belongs to one asyncio loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection

from penstock.cluster.grpc_front.penstock_pb2 import GenerateRequest
from penstock.cluster.grpc_front.problems import status_of
from penstock.cluster.grpc_front.rpcs import SERVICE, add_GenerationServicer_to_server
from penstock.cluster.grpc_front.servicer import GenerationServicer, RpcFailed
from penstock.cluster.settings import LimitSettings
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import FailureCode
from penstock.workers.tls import KeyPair

PROTOBUF_SLACK_BYTES = 1 << 20  # beyond the limit of a body, so that our own words refuse what is a little too large


class GrpcServer:
    """Serves `penstock.v1.Generation` and reflection on one port."""

    def __init__(
        self,
        servicer: GenerationServicer,
        limits: LimitSettings,
        host: str,
        port: int,
        shared: bool,
        tls: KeyPair | None = None,
    ) -> None:
        """Binds at once; OSError when the port is taken. `shared`: other replicas of this machine listen there too."""
        options = [
            ("grpc.so_reuseport", int(shared)),
            ("grpc.max_receive_message_length", limits.max_body_bytes + PROTOBUF_SLACK_BYTES),
            ("grpc.max_metadata_size", limits.max_header_bytes),
        ]
        self._server = grpc.aio.server(options=options)
        add_GenerationServicer_to_server(_Rpcs(servicer, limits.write_timeout_s), self._server)
        reflection.enable_server_reflection((SERVICE.full_name, reflection.SERVICE_NAME), self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self.port = int(self._server.add_insecure_port(address))
            else:
                self.port = int(
                    self._server.add_secure_port(address, grpc.ssl_server_credentials([(tls.key, tls.certificate)]))
                )
        except RuntimeError as error:
            raise OSError(f"cannot listen for gRPC at {address}: {error}") from error

    async def start(self) -> None:
        """Serve on the running loop."""
        await self._server.start()

    async def stop(self, drain_s: float) -> None:
        """Accept no more, let calls end within the drain time, cut the others."""
        await self._server.stop(drain_s)


class _Rpcs:
    """The methods that grpcio calls, named as the rpcs."""

    def __init__(self, servicer: GenerationServicer, write_timeout_s: float) -> None:
        self._servicer = servicer
        self._write_timeout_s = write_timeout_s
        self.Generate = self._answering("Generate")
        self.Embed = self._answering("Embed")
        self.Tokenize = self._answering("Tokenize")
        self.Detokenize = self._answering("Detokenize")
        self.ListModels = self._answering("ListModels")
        self.Health = self._answering("Health")

    def _answering(self, rpc: str) -> Callable[[Any, Any], Any]:
        async def answer(request: Any, context: Any) -> Any:
            call = self._servicer.open(rpc, _metadata(context))
            context.set_trailing_metadata(call.trailing)
            try:
                return await self._servicer.answer(call, request, _metadata(context))
            except RpcFailed as failed:
                await context.abort(failed.status.code, failed.status.message, failed.status.metadata)

        return answer

    async def Stream(self, request: GenerateRequest, context: Any) -> None:  # noqa: N802 - the rpc's name
        """Write the messages; a reader that takes nothing for long is cut off."""
        call = self._servicer.open("Stream", _metadata(context))
        context.set_trailing_metadata(call.trailing)
        messages = self._servicer.stream(call, request, _metadata(context))
        try:
            async for message in messages:
                async with asyncio.timeout(self._write_timeout_s):
                    await context.write(message)
        except RpcFailed as failed:
            await context.abort(failed.status.code, failed.status.message, failed.status.metadata)
        except TimeoutError:
            slow = status_of(RefusedError(FailureCode.DEADLINE, "the stream was not read for too long"))
            await context.abort(slow.code, slow.message, slow.metadata)
        finally:
            await messages.aclose()  # ends the work at once


def _metadata(context: Any) -> tuple[tuple[str, str | bytes], ...]:
    return tuple((key, value) for key, value in context.invocation_metadata() or ())
