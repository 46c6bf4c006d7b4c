"""A cluster as `penstock serve` launches it, with TLS everywhere: both listeners, the gRPC front, workers, KV."""

from __future__ import annotations

from pathlib import Path

import grpc
import httpx
import pytest
from fakes.certificates import Authority
from fakes.launched_cluster import LaunchedCluster, tokens_of
from fakes.ports import free_port

from penstock.cluster.client import connect
from penstock.cluster.commands.status import fetch_status
from penstock.cluster.grpc_front import penstock_pb2 as pb
from penstock.cluster.grpc_front.rpcs import GenerationStub
from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(150)]
PROMPT = list(range(1, 60))


def test_everything_is_encrypted_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls, grpc_port = Authority(tmp_path).settings(), free_port()
    values = {
        "runner.kind": "oracle",
        "kv.num_blocks": 512,
        "scheduler.max_model_len": 2048,
        "transfer.transport": "tcp",
        "front.admin": "apart",
        "front.admin_port": free_port(),
        "front.grpc_port": grpc_port,
        **{f"tls.{name}": getattr(tls, name) for name in ("cert_file", "key_file", "ca_file", "internal")},
    }
    cluster = LaunchedCluster(tmp_path, values)
    try:
        cluster.wait_ready()
        wanted = list(expected_tokens(PROMPT, SamplingParams(max_tokens=40), 32000))
        stream = cluster.stream(model="oracle", prompt=PROMPT, max_tokens=40, temperature=0)
        assert tokens_of(list(stream)) == wanted
        handle = connect(cluster.url, ca_file=tls.ca_file)
        answer = handle.generate(PROMPT, max_tokens=40, temperature=0, ignore_eos=True)
        assert list(answer.token_ids) == wanted
        handle.close()
        monkeypatch.setenv("PENSTOCK_CA_FILE", tls.ca_file)
        status = fetch_status(cluster.admin_url, None)
        assert {worker["state"] for worker in status["workers"]} == {"ready"}
        credentials = grpc.ssl_channel_credentials(Path(tls.ca_file).read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{grpc_port}", credentials) as channel:
            assert GenerationStub(channel).ListModels(pb.ListModelsRequest(), timeout=10).models
        for url in (cluster.url, cluster.admin_url):
            with pytest.raises(httpx.TransportError):
                httpx.get(url.replace("https", "http") + "/health", trust_env=False)
        cluster.until(lambda: f"Ready: {cluster.url}" in cluster.log.read_text(), 20.0)
        assert cluster.terminate() == 0
        assert Path(tls.key_file).read_text().splitlines()[1] not in cluster.log.read_text()
        assert cluster.survivors(10.0) == []
    finally:
        cluster.end()
