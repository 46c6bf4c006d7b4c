"""The load generator: seeded plans, traces, streams read exactly, and figures by vLLM's definitions."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator, deltas
from fakes.http_server import HttpServer
from fakes.tiny_model import CONTEXT

from penstock.cluster.bench.event_stream import Outcome, stream_completion
from penstock.cluster.bench.record import write_record
from penstock.cluster.bench.report import Edges, figures, meets, parse_slos
from penstock.cluster.bench.runner import Target, run_load
from penstock.cluster.bench.sessions import SessionShape, with_turns
from penstock.cluster.bench.workload import Planned, fixed_plan, prompt_tokens
from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import FailureCode

pytestmark = pytest.mark.timeout(60)


def test_figures_leave_the_edges_out() -> None:
    outcomes = [Outcome(scheduled=float(i), sent=i + 0.5, chunks=[i + 1.0], output_tokens=1) for i in range(11)]
    inner = Edges(0.1).inner(outcomes)
    assert [o.scheduled for o in inner] == [float(i) for i in range(1, 10)]
    assert Edges().inner(outcomes) == outcomes
    steady_s = Edges(0.1).inner_duration(outcomes, 14.0)  # 10 s of schedule, 4 s until the last answer
    assert (steady_s, Edges().inner_duration(outcomes, 14.0)) == (pytest.approx(8.0), 14.0)
    assert figures(inner, steady_s, {})["median_send_lag_ms"] == pytest.approx(500.0)


def test_prompts_are_seeded_ids_of_the_vocabulary() -> None:
    plan = fixed_plan(2, 50, 4, [0.0, 0.1])
    tokens = prompt_tokens(plan[0], 0, 400, 1)
    assert len(tokens) == 50
    assert all(0 <= t < 400 for t in tokens)
    assert tokens == prompt_tokens(plan[0], 0, 400, 1)
    assert tokens != prompt_tokens(plan[1], 1, 400, 1)


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
        run = asyncio.run(run_load(target, fixed_plan(9, 30, 5, [0.0] * 9), done.append))
        refused = asyncio.run(stream_completion(server.url, "k", {"prompt": [], "stream": True}, 5.0))
        locked = asyncio.run(stream_completion(server.url, "", {"prompt": [5]}, 5.0))
    outcomes = run.outcomes
    assert [(o.input_tokens, o.output_tokens, o.cached_tokens, len(o.chunks)) for o in outcomes] == [(30, 5, 4, 5)] * 9
    assert len(done) == 9
    assert run.duration_s > 0.01
    assert all(0 < o.ttft_s <= o.latency_s for o in outcomes)
    assert refused.error.startswith("HTTP 400")
    assert locked.error.startswith("HTTP 401")


def test_a_turn_carries_what_was_said_and_waits_for_it(codec: TextCodec, tmp_path: Path) -> None:
    generator = FakeGenerator(lambda request: [0.02, *deltas([7, 8, 9][: request.sampling.max_tokens])])
    plan = with_turns(fixed_plan(2, 10, 3, [0.0, 0.05]), SessionShape(turns=3, think_s=0.01), seed=1)
    with HttpServer(build_app(IngressSettings(("tiny",), CONTEXT), codec, generator, Metrics(), FakeFleet())) as server:
        run = asyncio.run(run_load(Target(server.url, "tiny", 400), plan, lambda o: None))
    assert [o.error for o in run.outcomes] == [""] * 6
    assert [o.input_tokens for o in run.outcomes] == [10, 23, 36] * 2
    assert run.prompts[1][:13] == [*run.prompts[0], 7, 8, 9]
    assert run.prompts[2][:23] == run.prompts[1]
    assert all(run.outcomes[i + 1].sent > run.outcomes[i].chunks[-1] for i in (0, 1, 3, 4))
    write_record(tmp_path / "r.jsonl", run.outcomes)
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [line["output_tokens"] for line in lines] == [3] * 6
    assert all(line["sent_s"] >= line["scheduled_s"] >= 0 for line in lines)


def test_an_open_loop_sends_on_time_while_the_server_stalls(codec: TextCodec) -> None:
    generator = FakeGenerator(lambda request: [1.0, *deltas([7])])
    plan = fixed_plan(40, 5, 1, [i * 0.01 for i in range(40)])
    with HttpServer(build_app(IngressSettings(("tiny",), CONTEXT), codec, generator, Metrics(), FakeFleet())) as server:
        run = asyncio.run(run_load(Target(server.url, "tiny", 400), plan, lambda o: None))
    assert run.outcomes[-1].sent < run.outcomes[0].chunks[0]  # all out before the first answer
    assert (
        figures(run.outcomes, run.duration_s, {})["median_send_lag_ms"] < 500
    )  # a server that stalls for 1 s held none back


def test_failures_are_outcomes(codec: TextCodec) -> None:
    steps = [deltas([5, 6])[0], RefusedError(FailureCode.WORKER_LOST, "gone")]
    app = build_app(
        IngressSettings(("tiny",), CONTEXT), codec, FakeGenerator(lambda request: steps), Metrics(), FakeFleet()
    )
    with HttpServer(app) as server:
        plan = [Planned(0.0, 5, 2)]
        run = asyncio.run(run_load(Target(server.url, "tiny", 400), plan, lambda o: None))
    assert "gone" in run.outcomes[0].error
    lost = asyncio.run(stream_completion("http://127.0.0.1:1", "", {}, 5.0))
    assert lost.error.startswith("ConnectionRefusedError")
