"""Serve's proxy dies on a real Ray cluster: what its callers asked for ends with it, and nobody else's requests do."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import grpc
import httpx
import pytest
from fakes.ports import free_port
from fakes.serve_application import ServeApplication

from penstock.cluster.grpc_front import penstock_pb2 as pb
from penstock.cluster.grpc_front.rpcs import GenerationStub

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(180)]
PROMPT = list(range(1, 60))
ENDLESS = pb.GenerateRequest(
    prompt=pb.Prompt(tokens=pb.TokenIds(ids=PROMPT)), sampling=pb.Sampling(max_tokens=1900, ignore_eos=True)
)


def read(stream: Iterator[pb.StreamResponse]) -> None:
    with suppress(grpc.RpcError):
        for _ in stream:
            pass


def test_what_came_by_a_proxy_ends_with_it() -> None:
    own, own_grpc = free_port(), free_port()
    cluster = ServeApplication(
        {
            "runner": {"kind": "oracle", "oracle_step_s": 0.05},
            "kv": {"num_blocks": 512},
            "scheduler": {"max_model_len": 2048},
            "front": {"port": own, "grpc_port": own_grpc},
        }
    )

    def running() -> int:
        workers = httpx.get(f"http://127.0.0.1:{own}/status", trust_env=False).json()["workers"]
        return sum(worker["running"] + worker["waiting"] for worker in workers)

    try:
        cluster.wait_ready()
        with (
            grpc.insecure_channel(f"127.0.0.1:{cluster.proxy_port}") as proxy,
            grpc.insecure_channel(f"127.0.0.1:{own_grpc}") as direct,
            socket.create_connection(("127.0.0.1", cluster.port)) as caller,
        ):
            by_proxy = GenerationStub(proxy).Stream(ENDLESS)
            whole = GenerationStub(proxy).Generate.future(ENDLESS)
            stays = GenerationStub(direct).Stream(ENDLESS)
            body = json.dumps({"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": True})
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            caller.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            threading.Thread(target=read, args=(stays,), daemon=True).start()
            next(by_proxy)
            cluster.until(lambda: running() == 4, 10.0)
            cluster.actor("ProxyActor").kill()
            with pytest.raises(grpc.RpcError):
                list(by_proxy)
            assert whole.exception(10) is not None
            cluster.until(lambda: running() == 1, 15.0)
            assert stays.is_active()
            stays.cancel()
            cluster.until(lambda: running() == 0, 10.0)
    finally:
        cluster.end()
