"""The one table from Penstock's errors to gRPC: status code, message, trailing metadata.

Used by the two ways a call reaches us. Stands on the HTTP table (`ingress/errors.py`), so that both say the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage

from penstock.cluster.grpc_front.penstock_pb2 import ErrorDetail, RichStatus
from penstock.cluster.ingress.errors import HttpProblem, problem_of

Metadata = tuple[tuple[str, str | bytes], ...]
MAX_MESSAGE_BYTES = 2048  # trailers share HTTP/2's 8 KiB of headers
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    431: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """How a call ends that does not end well."""

    code: grpc.StatusCode
    message: str
    metadata: Metadata


def status_of(error: BaseException) -> RpcStatus:
    """The status for any exception; those that Penstock did not raise on purpose are INTERNAL without details."""
    problem = problem_of(error)
    code = _CODES.get(problem.status, grpc.StatusCode.INTERNAL)
    message = problem.message.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")
    retry_after_s = None if problem.retry_after_s is None else max(1, math.ceil(problem.retry_after_s))
    metadata: Metadata = (("grpc-status-details-bin", _details(problem, code, message, retry_after_s)),)
    if retry_after_s is not None:
        metadata += (("retry-after", str(retry_after_s)),)
    return RpcStatus(code, message, metadata)


def _details(problem: HttpProblem, code: grpc.StatusCode, message: str, retry_after_s: int | None) -> bytes:
    detail = ErrorDetail(type=problem.kind, code=problem.code or "", param=problem.param or "")
    if retry_after_s is not None:
        detail.retry_after_s = retry_after_s
    packed = AnyMessage()
    packed.Pack(detail)
    rich: bytes = RichStatus(code=code.value[0], message=message, details=[packed]).SerializeToString()
    return rich
