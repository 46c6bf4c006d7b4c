"""The load generator: seeded plans, traces, streams read exactly, and figures by vLLM's definitions."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator, deltas
from fakes.http_server import HttpServer
from fakes.tiny_model import CONTEXT

from penstock.cluster.bench.event_stream import Outcome, stream_completion
from penstock.cluster.bench.report import figures, meets, parse_slos
from penstock.cluster.bench.runner import Target, run_load
from penstock.cluster.bench.workload import Planned, Scaling, arrival_times, fixed_plan, prompt_tokens, read_trace
from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec
from penstock.workers.errors import ConfigError, RefusedError
from penstock.workers.protocol import FailureCode

pytestmark = pytest.mark.timeout(60)


def test_arrivals_end_at_n_over_rate() -> None:
    times = arrival_times(50, 10.0, 1.0, seed=3)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(5.0)
    assert times == arrival_times(50, 10.0, 1.0, seed=3)
    assert times != arrival_times(50, 10.0, 1.0, seed=4)
    assert arrival_times(3, float("inf"), 1.0, seed=3) == [0.0, 0.0, 0.0]


def test_traces(tmp_path: Path) -> None:
    mooncake = tmp_path / "t.jsonl"
    mooncake.write_text(
        '{"timestamp": 1000, "input_length": 1024, "output_length": 8, "hash_ids": [0, 1]}\n'
        '{"timestamp": 3000, "input_length": 600, "output_length": 9, "hash_ids": [0, 2]}\n'
    )
    scaling = Scaling(length_divisor=8, time_stretch=2)
    plan = read_trace(mooncake, 10, scaling)
    assert [(p.at_s, p.input_tokens, p.output_tokens) for p in plan] == [(0.0, 128, 1), (4.0, 75, 1)]
    first, second = (prompt_tokens(p, i, 400, 0, scaling) for i, p in enumerate(plan))
    assert len(first) == 128
    assert len(second) == 75
    assert first[:64] == second[:64]
    assert first[64:75] != second[64:75]
    azure = tmp_path / "t.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    plan = read_trace(azure, 10, Scaling())
    assert [(p.input_tokens, p.output_tokens) for p in plan] == [(374, 44), (396, 109)]
    assert plan[1].at_s == pytest.approx(4.314579, abs=1e-5)
    azure.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"t\.csv"):
        read_trace(azure, 10, Scaling())


def test_prompts_are_seeded_ids_of_the_vocabulary() -> None:
    plan = fixed_plan(2, 50, 4, [0.0, 0.1])
    tokens = prompt_tokens(plan[0], 0, 400, 1, Scaling())
    assert len(tokens) == 50
    assert all(0 <= t < 400 for t in tokens)
    assert tokens == prompt_tokens(plan[0], 0, 400, 1, Scaling())
    assert tokens != prompt_tokens(plan[1], 1, 400, 1, Scaling())


def test_figures_by_hand() -> None:
    good = Outcome(input_tokens=10, output_tokens=5, sent=1.0, chunks=[1.1, 1.2, 1.4])
    single = Outcome(input_tokens=10, output_tokens=1, sent=1.0, chunks=[1.5])
    bad = Outcome(error="HTTP 503")
    found = figures([good, single, bad], 2.0, parse_slos(["ttft:200", "tpot:80"]))
    assert (found["completed"], found["failed"], found["errors"]) == (2, 1, ["HTTP 503"])
    assert found["output_throughput"] == 3.0
    assert found["request_goodput"] == 0.5
    assert found["mean_ttft_ms"] == pytest.approx(300)
    assert found["median_tpot_ms"] == pytest.approx(75)
    assert found["mean_itl_ms"] == pytest.approx(150)
    assert found["mean_e2el_ms"] == pytest.approx(450)
    assert meets(single, {"tpot": 0.0})


def test_a_run_against_a_server(codec: TextCodec) -> None:
    generator = FakeGenerator(lambda request: [0.005, *deltas([5] * request.sampling.max_tokens)], cached=4)
    settings = IngressSettings(("tiny",), CONTEXT, api_key="k")
    with HttpServer(build_app(settings, codec, generator, Metrics(), FakeFleet())) as server:
        target = Target(server.url, "tiny", 400, api_key="k", max_concurrency=3)
        done: list[Outcome] = []
        outcomes, duration_s = asyncio.run(run_load(target, fixed_plan(9, 30, 5, [0.0] * 9), done.append))
        refused = asyncio.run(stream_completion(server.url, "k", {"prompt": [], "stream": True}, 5.0))
        locked = asyncio.run(stream_completion(server.url, "", {"prompt": [5]}, 5.0))
    assert [(o.input_tokens, o.output_tokens, o.cached_tokens, len(o.chunks)) for o in outcomes] == [(30, 5, 4, 5)] * 9
    assert len(done) == 9
    assert duration_s > 0.01
    assert all(0 < o.ttft_s <= o.latency_s for o in outcomes)
    assert refused.error.startswith("HTTP 400")
    assert locked.error.startswith("HTTP 401")


def test_failures_are_outcomes(codec: TextCodec) -> None:
    steps = [deltas([5, 6])[0], RefusedError(FailureCode.WORKER_LOST, "gone")]
    app = build_app(
        IngressSettings(("tiny",), CONTEXT), codec, FakeGenerator(lambda request: steps), Metrics(), FakeFleet()
    )
    with HttpServer(app) as server:
        plan = [Planned(0.0, 5, 2)]
        (outcome,), _ = asyncio.run(run_load(Target(server.url, "tiny", 400), plan, lambda o: None))
    assert "gone" in outcome.error
    lost = asyncio.run(stream_completion("http://127.0.0.1:1", "", {}, 5.0))
    assert lost.error.startswith("ConnectionRefusedError")
