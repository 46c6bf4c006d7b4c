"""gRPC and `connect()` on a real Ray cluster with Serve: through Serve's own proxy, and on the ingress's own port."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import grpc
import pytest
from fakes.launched_cluster import tokens_of
from fakes.ports import free_port
from fakes.serve_application import ServeApplication
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from penstock.cluster.grpc_front import penstock_pb2 as pb
from penstock.cluster.grpc_front.rpcs import GenerationStub
from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]
VOCAB = 32000
PROMPT = list(range(1, 60))
REQUEST = pb.GenerateRequest(
    prompt=pb.Prompt(tokens=pb.TokenIds(ids=PROMPT)), sampling=pb.Sampling(max_tokens=40, temperature=0.0)
)
ENDLESS = pb.GenerateRequest(prompt=REQUEST.prompt, sampling=pb.Sampling(max_tokens=1900, ignore_eos=True))
WAYS = ("proxy", "own port")


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    return {"own port": free_port()}


@pytest.fixture(scope="module")
def cluster(ports: dict[str, int]) -> Iterator[ServeApplication]:
    arguments = {
        "runner": {"kind": "oracle", "oracle_step_s": 0.02},
        "kv": {"num_blocks": 512},
        "scheduler": {"max_model_len": 2048},
        "front": {"port": 0, "grpc_port": ports["own port"]},
    }
    cluster = ServeApplication(arguments)
    ports["proxy"] = cluster.proxy_port
    try:
        cluster.wait_ready()
        yield cluster
    finally:
        cluster.end()


@pytest.fixture
def channel(cluster: ServeApplication, ports: dict[str, int], request: pytest.FixtureRequest) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{ports[request.param]}") as channel:
        yield channel


def busy(cluster: ServeApplication) -> int:
    return sum(worker["running"] + worker["waiting"] for worker in cluster.workers().values())


@pytest.mark.parametrize("channel", WAYS, indirect=True)
def test_the_same_tokens_as_over_http(cluster: ServeApplication, channel: grpc.Channel) -> None:
    stub = GenerationStub(channel)
    expected = list(expected_tokens(PROMPT, SamplingParams(max_tokens=40), VOCAB))
    assert tokens_of(list(cluster.stream(prompt=PROMPT, max_tokens=40, temperature=0))) == expected
    answer, call = stub.Generate.with_call(REQUEST, metadata=(("x-request-id", "mine-1"),))
    assert list(answer.choices[0].token_ids) == expected
    assert dict(call.trailing_metadata())["x-request-id"] == "mine-1"
    messages = list(stub.Stream(REQUEST))
    assert [token for message in messages for c in message.choices for token in c.token_ids] == expected
    assert len(messages) > 10
    assert messages[-1].usage.completion_tokens == 40
    assert stub.Health(pb.HealthRequest()).ready
    assert stub.ListModels(pb.ListModelsRequest()).models[0].id == "oracle"


@pytest.mark.parametrize("channel", WAYS, indirect=True)
def test_refusals_keep_code_and_details(channel: grpc.Channel) -> None:
    stub = GenerationStub(channel)
    wrong = pb.GenerateRequest(prompt=REQUEST.prompt, sampling=pb.Sampling(top_p=7.0))
    for call in (lambda: stub.Generate(wrong), lambda: list(stub.Stream(wrong))):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "top_p" in refused.value.details()
        rich = pb.RichStatus.FromString(dict(refused.value.trailing_metadata())["grpc-status-details-bin"])
        detail = pb.ErrorDetail()
        assert rich.details[0].Unpack(detail)
        assert (detail.param, detail.code) == ("top_p", "out_of_range")


@pytest.mark.parametrize("channel", WAYS, indirect=True)
def test_cancelled_and_late_calls_free_the_workers(cluster: ServeApplication, channel: grpc.Channel) -> None:
    stub = GenerationStub(channel)
    stream = stub.Stream(ENDLESS)
    next(stream)
    unary = stub.Generate.future(ENDLESS)
    cluster.until(lambda: busy(cluster) == 2, 10.0)
    stream.cancel()
    unary.cancel()
    cluster.until(lambda: busy(cluster) == 0, 10.0)
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as late:
        list(stub.Stream(ENDLESS, timeout=0.5))
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 5.0
    cluster.until(lambda: busy(cluster) == 0, 10.0)


@pytest.mark.parametrize("timeout_s", [None, 1.5])
@pytest.mark.parametrize("way", WAYS)
def test_streams_that_nobody_reads_free_the_workers(
    cluster: ServeApplication, ports: dict[str, int], way: str, timeout_s: float | None
) -> None:
    """Their caller leaves while a message is on its way: the channel takes in nothing that is not asked for."""
    narrow = [("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(f"127.0.0.1:{ports[way]}", options=narrow) as channel:
        stream = GenerationStub(channel).Stream(ENDLESS, timeout=timeout_s)
        cluster.until(lambda: busy(cluster) == 1, 10.0)
        time.sleep(0.5)
        if timeout_s is None:
            stream.cancel()
        cluster.until(lambda: busy(cluster) == 0, 10.0)
        assert not stream.is_active()


@pytest.mark.parametrize("wait_s", [0.05, 0.5])
@pytest.mark.parametrize("stream", [False, True])
def test_http_callers_who_leave_free_the_workers(cluster: ServeApplication, stream: bool, wait_s: float) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": stream}
    with socket.create_connection(("127.0.0.1", cluster.port)) as caller:
        text = json.dumps(body)
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        caller.sendall(f"{head}content-length: {len(text)}\r\n\r\n{text}".encode())
        if wait_s > 0.1:
            cluster.until(lambda: busy(cluster) == 1, 10.0)
        time.sleep(wait_s)
    time.sleep(0.2)
    cluster.until(lambda: busy(cluster) == 0, 10.0)


@pytest.mark.parametrize("channel", WAYS, indirect=True)
def test_reflection_lists_the_service(channel: grpc.Channel) -> None:
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked])))
    assert "penstock.v1.Generation" in {service.name for service in answer.list_services_response.service}


def test_our_own_port_is_on_loopback_only(cluster: ServeApplication, ports: dict[str, int]) -> None:
    listening = [c.laddr for p in cluster.see() for c in p.net_connections() if c.status == "LISTEN"]
    found = {address.ip.removeprefix("::ffff:") for address in listening if address.port == ports["own port"]}
    assert found == {"127.0.0.1"}


def test_connect_finds_the_cluster_from_drivers_tasks_and_jobs(cluster: ServeApplication) -> None:
    expected = expected_tokens([1, 2, 3], SamplingParams(max_tokens=4), VOCAB)
    assert cluster.facts["driver"] == cluster.facts["named"] == cluster.url
    assert tuple(cluster.facts["task"]) == expected
    job = "from penstock.cluster.client import connect; h = connect(); import ray; "
    job += "print(h.url, h.generate([1, 2, 3], max_tokens=4, temperature=0).token_ids, ray.is_initialized())"
    assert cluster.job(job) == f"{cluster.url} {expected} False"
    named = "from penstock.cluster.client import connect; connect(cluster='another')"
    with pytest.raises(RuntimeError, match="no cluster 'another'; running: front"):
        cluster.job(named)
    given = "from penstock.cluster.client import connect; print(connect().url)"
    assert cluster.job(given, PENSTOCK_URL="http://127.0.0.1:1/") == "http://127.0.0.1:1"
