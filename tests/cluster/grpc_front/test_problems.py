"""Errors as gRPC says them, and as tools read them."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import status_pb2

from penstock.cluster.grpc_front.penstock_pb2 import ErrorDetail
from penstock.cluster.grpc_front.problems import status_of
from penstock.cluster.ingress.errors import HttpProblem, model_not_found
from penstock.workers.errors import RefusedError, RequestError
from penstock.workers.protocol import FailureCode


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("bad", field="top_p", code="out_of_range"), grpc.StatusCode.INVALID_ARGUMENT),
        (HttpProblem(401, "authentication_error", "no", code="invalid_api_key"), grpc.StatusCode.UNAUTHENTICATED),
        (HttpProblem(403, "permission_error", "no"), grpc.StatusCode.PERMISSION_DENIED),
        (model_not_found("x"), grpc.StatusCode.NOT_FOUND),
        (HttpProblem(413, "request_too_large", "big"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (RefusedError(FailureCode.TENANT_LIMIT, "slow down", 7.0), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (RefusedError(FailureCode.QUEUE_FULL, "full"), grpc.StatusCode.UNAVAILABLE),
        (RefusedError(FailureCode.DEADLINE, "late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (RefusedError(FailureCode.CANCELLED, "gone"), grpc.StatusCode.CANCELLED),
        (RefusedError(FailureCode.POISONED, "no"), grpc.StatusCode.INTERNAL),
        (ZeroDivisionError("a secret of ours"), grpc.StatusCode.INTERNAL),
    ],
)
def test_codes(error: Exception, code: grpc.StatusCode) -> None:
    assert status_of(error).code is code
    assert "secret" not in status_of(error).message


def test_every_failure_code_has_one() -> None:
    assert all(status_of(RefusedError(code, "x")).code is not grpc.StatusCode.OK for code in FailureCode)


def test_details_are_the_rich_error_model() -> None:
    status = status_of(RefusedError(FailureCode.TENANT_LIMIT, "slow down", 6.6))
    metadata = dict(status.metadata)
    assert metadata["retry-after"] == "7"
    rich = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert (rich.code, rich.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], "slow down")
    detail = ErrorDetail()
    assert rich.details[0].Unpack(detail)
    assert (detail.type, detail.code, detail.retry_after_s) == ("rate_limit_exceeded", "tenant_limit", 7)


def test_a_long_message_is_cut_where_a_character_ends() -> None:
    assert len(status_of(RequestError("ä" * 5000)).message.encode()) <= 2048
