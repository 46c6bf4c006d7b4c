"""The command line: every flag reaches its key, mistakes end in one line that names them, status prints the fleet."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator
from fakes.http_server import HttpServer
from fakes.tiny_model import CONTEXT, write_tiny_model

from penstock.cluster import cli
from penstock.cluster.commands.flags import SERVE_FLAGS, flag_values
from penstock.cluster.commands.serve import configure
from penstock.cluster.config import known_keys
from penstock.cluster.ingress.adapters import Adapters
from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.settings import ClusterConfig
from penstock.cluster.text import TextCodec
from penstock.workers.settings import AdapterSettings

pytestmark = pytest.mark.timeout(60)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of `penstock ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["penstock", *arguments])
    monkeypatch.delenv("PENSTOCK_API_KEY", raising=False)
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ClusterConfig]:
    """Configurations that `penstock serve` would have started."""
    seen: list[ClusterConfig] = []

    class Launch:
        serve = staticmethod(seen.append)

    monkeypatch.setitem(sys.modules, "penstock.cluster.launch", Launch)  # type: ignore[arg-type]
    return seen


@pytest.fixture
def url(codec: TextCodec) -> Iterator[str]:
    app = build_app(IngressSettings(("tiny",), CONTEXT), codec, FakeGenerator(), Metrics(), FakeFleet())
    with HttpServer(app) as server:
        yield server.url


def test_every_flag_has_a_key() -> None:
    assert {flag.key for flag in SERVE_FLAGS} <= set(known_keys())
    assert [flag.spelling for flag in SERVE_FLAGS] == [
        "--prefill",
        "--decode",
        "--mixed",
        "--host",
        "--port",
        "--admin-host",
        "--admin-port",
        "--admin",
        "--grpc-port",
        "--served-model-name",
        "--dtype",
        "--device",
        "--model-impl",
        "--generation-config",
        "--tool-call-parser",
        "--enable-auto-tool-choice/--no-enable-auto-tool-choice",
        "--max-model-len",
        "--block-size",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--long-prefill-token-threshold",
        "--kv-cache-memory-bytes",
        "--gpu-memory-utilization",
        "--num-gpu-blocks-override",
        "--enable-prefix-caching/--no-enable-prefix-caching",
        "--kv-offloading-size",
        "--kv-disk-path",
        "--kv-disk-bytes",
        "--skip-tokenizer-init",
        "--tensor-parallel-size",
        "--prefill-tensor-parallel-size",
        "--decode-tensor-parallel-size",
        "--expert-parallel-size",
        "--context-parallel-size",
        "--lora-dir",
        "--lora-modules",
        "--max-loras",
        "--max-lora-rank",
        "--address",
        "--api-key",
        "--api-keys",
        "--ssl-certfile",
        "--ssl-keyfile",
        "--ssl-ca-certs",
        "--metrics-aliases",
        "--otlp-traces-endpoint",
        "--otlp-traces-sample-ratio",
        "--log-format",
        "--log-level",
        "--access-log/--no-access-log",
        "--enable-tokenizer-info-endpoint",
    ]


def test_serve_with_everything(
    monkeypatch: pytest.MonkeyPatch, started: list[ClusterConfig], model_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("pools: {decode: 5}\nscheduler: {max_waiting: 9}\n")
    arguments = f"serve {model_dir} --config {file} --prefill 2 --decode 3 --mixed 1 --host 127.0.0.2 --port 0"
    arguments += " --served-model-name a --served-model-name b --dtype float32 --max-model-len 256 --block-size 8"
    arguments += " --max-num-seqs 4 --max-num-batched-tokens 64 --long-prefill-token-threshold 32"
    arguments += " --kv-cache-memory-bytes 64M --num-gpu-blocks-override 100 --no-enable-prefix-caching"
    arguments += " --skip-tokenizer-init --tensor-parallel-size 1 --address 127.0.0.1:6379 --api-key k"
    assert run(monkeypatch, *arguments.split()) == 0
    (config,) = started
    assert (config.pools.prefill, config.pools.decode, config.pools.mixed) == (2, 3, 1)
    assert (config.front.host, config.front.port, config.front.api_key) == ("127.0.0.2", 0, "k")
    assert config.front.served_model_name == ("a", "b")
    assert (config.runner.model_dir, config.runner.dtype) == (str(model_dir), "float32")
    assert (config.scheduler.max_model_len, config.scheduler.max_num_seqs) == (256, 4)
    assert (config.scheduler.max_num_batched_tokens, config.scheduler.long_prefill_token_threshold) == (64, 32)
    assert (config.kv.block_size, config.kv.memory_bytes, config.kv.num_blocks) == (8, 64 << 20, 100)
    assert config.kv.prefix_caching is False
    assert config.front.skip_tokenizer_init is True
    assert config.ray.address == "127.0.0.1:6379"
    assert config.scheduler.max_waiting == 9
    assert config.sources["pools.decode"] == "--decode"
    assert config.sources["scheduler.max_waiting"] == str(file)
    assert config.sources["runner.model_dir"] == "MODEL_DIR"


def test_serve_with_nothing_but_a_model(
    monkeypatch: pytest.MonkeyPatch, started: list[ClusterConfig], model_dir: Path
) -> None:
    assert run(monkeypatch, "serve", str(model_dir)) == 0
    (config,) = started
    assert (config.pools.prefill, config.pools.decode, config.pools.mixed) == (1, 1, 0)
    assert config.kv.prefix_caching is True
    assert "kv.prefix_caching" not in config.sources


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("serve --prefil 2", "--prefill"),
        ("serve --max-num-batched-token 2", "--max-num-batched-tokens"),
        ("serve /nowhere/at/all", "/nowhere/at/all: no such model directory"),
        ("serve --tensor-parallel-size 3", "--tensor-parallel-size"),
        ("serve --prefill two", "--prefill"),
        ("serve --port 70000", "--port"),
        ("serve --dtype float8", "float8"),
        ("serve --config /nowhere.yaml", "/nowhere.yaml"),
        ("bench --num-prompts 0 --url http://127.0.0.1:1", "--num-prompts"),
        ("bench --goodput speed:3", "speed:3"),
        ("bench --goodput ttft:-3", "ttft:-3"),
        ("bench --trace /nowhere.csv", "/nowhere.csv"),
        ("bench --request-rat 4", "--request-rate"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    started: list[ClusterConfig],
    arguments: str,
    says: str,
) -> None:
    assert run(monkeypatch, *arguments.split()) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert "Traceback" not in printed
    assert not started


def test_a_model_without_a_tokenizer_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], started: list[ClusterConfig], tmp_path: Path
) -> None:
    bare = write_tiny_model(tmp_path / "bare", tokenizer=False)
    assert run(monkeypatch, "serve", str(bare)) == 2
    assert "tokenizer.json: missing; serve with --skip-tokenizer-init" in capsys.readouterr().err
    assert run(monkeypatch, "serve", str(bare), "--skip-tokenizer-init") == 0
    raw = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**raw, "architectures": ["MambaForCausalLM"], "state_size": 16}))
    assert run(monkeypatch, "serve", str(bare), "--skip-tokenizer-init") == 2
    assert "MambaForCausalLM has recurrent layers" in capsys.readouterr().err
    assert len(started) == 1


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "status", "--url", "http://127.0.0.1:1") == 1
    assert "cannot reach http://127.0.0.1:1" in capsys.readouterr().err


def test_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str) -> None:
    assert run(monkeypatch, "status", "--json", "--url", url) == 0
    found = json.loads(capsys.readouterr().out)
    assert [w["id"] for w in found["workers"]] == ["prefill-0", "decode-0"]
    for name in ("role", "width", "pids", "state", "running", "waiting", "kv_use"):
        assert name in found["workers"][0]
    assert run(monkeypatch, "status", "--url", url) == 0
    printed = capsys.readouterr().out
    assert "prefill-0" in printed
    assert "25% of 100" in printed
    assert "tiny: ready" in printed


def test_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    arguments = f"bench --url {url} --num-prompts 12 --input-len 20 --output-len 6 --max-concurrency 4"
    arguments += f" --request-rate 500 --goodput ttft:10000 --goodput tpot:10000 --json {out}"
    assert run(monkeypatch, *arguments.split()) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    assert (found["completed"], found["failed"]) == (12, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (240, 72)
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert "median_ttft_ms" in capsys.readouterr().out


def test_status_shows_adapters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], codec: TextCodec, tmp_path: Path
) -> None:
    adapters = Adapters(AdapterSettings(directory=str(tmp_path), modules={"mine": "[gone]", "other": "gone"}))
    adapters.look()
    settings = IngressSettings(("tiny",), CONTEXT, adapters=adapters)
    with HttpServer(build_app(settings, codec, FakeGenerator(), Metrics(), FakeFleet())) as server:
        assert run(monkeypatch, "status", "--url", server.url) == 0
    assert "other: gone: no such folder" in " ".join(capsys.readouterr().out.split())


def test_flags_that_were_not_typed_leave_no_trace() -> None:
    assert flag_values({"prefill": None, "served_model_name": [], "skip_tokenizer_init": None}) == {}
    values = flag_values({"enable_prefix_caching": False, "port": "1", "kv_offloading_size": "0.5"})
    assert values["kv.host_bytes"].value == "0.5G"
    assert values["kv.prefix_caching"].value is False
    assert values["front.port"].source == "--port"


def test_configure_reads_the_key_from_the_environment(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.setenv("PENSTOCK_API_KEY", "secret")
    assert configure(str(model_dir), None, {}).front.api_key == "secret"
