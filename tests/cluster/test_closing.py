"""An ingress process that is told to end, over real workers: its readers are served, or told that it is over."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import grpc
import httpx
import pytest
from fakes.observed_cluster import MIXED, MODEL, ObservedCluster
from fakes.served_cluster import ServedCluster

from penstock.cluster.closing import close_fronts
from penstock.cluster.grpc_front import penstock_pb2 as pb
from penstock.cluster.grpc_front.rpcs import GenerationStub
from penstock.cluster.grpc_front.server import GrpcServer
from penstock.cluster.grpc_front.servicer import GenerationServicer
from penstock.cluster.ingress.listener import Listener
from penstock.cluster.settings import LimitSettings

DRAIN_S = 1.5
SHORT, ENDLESS = 20, 900  # tokens of 10 ms


async def events(client: httpx.AsyncClient, tokens: int, begun: asyncio.Event) -> list[str]:
    """The stream's data lines to its end, however that comes."""
    body = {"prompt": [1, 2, 3], "max_tokens": tokens, "stream": True}
    lines: list[str] = []
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                begun.set()
                lines += [line.removeprefix("data: ")] * line.startswith("data: ")
    except httpx.RemoteProtocolError:
        pass  # a stream that failed is broken off after its error
    return lines


async def grpc_stream(stub: GenerationStub, tokens: int, begun: asyncio.Event) -> grpc.StatusCode:
    prompt = pb.Prompt(tokens=pb.TokenIds(ids=[1, 2, 3]))
    call = stub.Stream(pb.GenerateRequest(prompt=prompt, sampling=pb.Sampling(max_tokens=tokens)))
    try:
        async for _ in call:
            begun.set()
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.timeout(60)
def test_streams_end_within_the_limit_or_with_a_typed_error() -> None:
    async def scenario() -> None:
        async with ObservedCluster([MIXED], step_s=0.01) as observed:
            cluster = observed.cluster
            listener = Listener(observed.app, "127.0.0.1", 0, shared=False, drain_s=DRAIN_S)
            server = GrpcServer(
                GenerationServicer(observed.app.service, cluster.fleet), LimitSettings(), "127.0.0.1", 0, shared=False
            )
            listener.start()
            await server.start()
            url = f"http://127.0.0.1:{listener.port}"
            begun = [asyncio.Event() for _ in range(4)]
            async with (
                httpx.AsyncClient(base_url=url, trust_env=False, timeout=30.0) as client,
                grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
            ):
                stub = GenerationStub(channel)
                streams = [
                    asyncio.ensure_future(events(client, SHORT * 4, begun[0])),
                    asyncio.ensure_future(events(client, ENDLESS, begun[1])),
                ]
                calls = [
                    asyncio.ensure_future(grpc_stream(stub, SHORT * 4, begun[2])),
                    asyncio.ensure_future(grpc_stream(stub, ENDLESS, begun[3])),
                ]
                whole = asyncio.ensure_future(
                    client.post("/v1/completions", json={"prompt": [4], "max_tokens": ENDLESS, "model": MODEL})
                )
                await asyncio.gather(*(each.wait() for each in begun))
                began = time.monotonic()
                closing = asyncio.ensure_future(
                    close_fronts(cluster.fleet, cluster.generator, [listener], server, DRAIN_S)
                )
                await asyncio.sleep(0.05)
                ready = await observed.http.get("/ready")  # as by a connection that was there before
                assert (ready.status_code, ready.json()["error"]["message"]) == (503, "this server is shutting down")
                with pytest.raises(httpx.ConnectError):
                    await httpx.AsyncClient(base_url=url, trust_env=False).get("/ready")
                short, cut = await asyncio.gather(*streams)
                assert short[-1] == "[DONE]"
                assert "[DONE]" not in cut
                error = json.loads(cut[-1])["error"]
                assert (error["code"], error["type"]) == ("draining", "service_unavailable")
                assert await asyncio.gather(*calls) == [grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE]
                answer = await whole
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
                await closing
                took = time.monotonic() - began
                assert DRAIN_S <= took < DRAIN_S + 3.0
            terminal = {
                line.split()[-1] for line in (await observed.scrape()).splitlines() if 'state="draining"' in line
            }
            assert terminal == {"3.0"}
            assert cluster.generator.open_generations == 0

    asyncio.run(scenario())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(150)
def test_penstock_serve_that_is_terminated_tells_its_readers(tmp_path: Path) -> None:
    """Over Ray: the command's own limit is 5 s."""
    configuration = {
        "pools": {"prefill": 0, "decode": 0, "mixed": 1},
        "runner": {"kind": "oracle", "oracle_vocab": 1000, "oracle_step_s": 0.02},
        "kv": {"num_blocks": 512},
    }
    cluster = ServedCluster(tmp_path, [], configuration)

    async def scenario() -> tuple[list[str], list[str]]:
        begun = [asyncio.Event() for _ in range(2)]
        async with httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=60.0) as client:
            running = [asyncio.ensure_future(events(client, n, b)) for n, b in zip((100, 1500), begun, strict=True)]
            await asyncio.gather(*(each.wait() for each in begun))
            cluster.process.send_signal(signal.SIGTERM)
            short, cut = await asyncio.gather(*running)
            return short, cut

    try:
        cluster.wait_ready()
        cluster.until(lambda: "Start-up took" in cluster.log.read_text(), 30.0)  # before that it just gives up
        short, cut = asyncio.run(scenario())
        assert cluster.process.wait(40) == 0
    finally:
        cluster.end()
    assert short[-1] == "[DONE]"
    assert "[DONE]" not in cut
    assert json.loads(cut[-1])["error"]["code"] == "draining"
