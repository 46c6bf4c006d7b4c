"""The board and the alerts ask for series that a running cluster has; so do boards made for vLLM."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes.observed_cluster import DECODE, PREFILL, ObservedCluster
from fakes.promql import Series, problems, read_expression, series_of
from fakes.served_cluster import ServedCluster, complete

DASHBOARDS = Path(__file__).parents[2] / "deploy" / "dashboards"
FILLED_IN = {"$__rate_interval": "5m", "$model": ".*", "$worker": ".*"}

# Of vLLM's names that boards and alerts use, those with a meaning here.
THEIRS = {
    "vllm:num_requests_running": "engine",
    "vllm:num_requests_waiting": "engine",
    "vllm:num_requests_waiting_by_reason": "reason",
    "vllm:kv_cache_usage_perc": "engine",
    "vllm:cache_config_info": "block_size",
    "vllm:prompt_tokens_total": "engine",
    "vllm:generation_tokens_total": "engine",
    "vllm:prompt_tokens_cached_total": "engine",
    "vllm:prompt_tokens_by_source_total": "source",
    "vllm:prefix_cache_queries_total": "engine",
    "vllm:prefix_cache_hits_total": "engine",
    "vllm:num_preemptions_total": "engine",
    "vllm:request_success_total": "finished_reason",
    "vllm:admission_rejections_total": "reason",
    "vllm:time_to_first_token_seconds_bucket": "le",
    "vllm:inter_token_latency_seconds_bucket": "le",
    "vllm:request_time_per_output_token_seconds_bucket": "le",
    "vllm:e2e_request_latency_seconds_bucket": "le",
    "vllm:e2e_request_latency_seconds_sum": "engine",
    "vllm:e2e_request_latency_seconds_count": "engine",
    "vllm:request_queue_time_seconds_sum": "engine",
    "vllm:request_prefill_time_seconds_sum": "engine",
    "vllm:request_decode_time_seconds_sum": "engine",
    "vllm:request_inference_time_seconds_sum": "engine",
    "vllm:request_prompt_tokens_bucket": "le",
    "vllm:request_generation_tokens_bucket": "le",
    "vllm:iteration_tokens_total_bucket": "le",
    "vllm:request_params_n_bucket": "le",
    "vllm:request_params_max_tokens_bucket": "le",
    "http_requests_total": "handler",
    "http_request_duration_seconds_bucket": "le",
}


@pytest.fixture(scope="module")
def page() -> str:
    """What `/metrics` of a split cluster says after some traffic."""

    async def run() -> str:
        async with ObservedCluster([PREFILL, DECODE]) as observed:
            prompts = [list(range(start, start + 300)) for start in range(1, 900, 300)]
            for stream in (False, True):
                answers = await asyncio.gather(*(observed.complete(p, max_tokens=20, stream=stream) for p in prompts))
                assert {answer.status_code for answer in answers} == {200}
            assert (await observed.complete([1], nonsense_model=1, model="nobody")).status_code == 404
            await asyncio.sleep(0.4)  # the workers' next heartbeats
            return await observed.scrape()

    return asyncio.run(run())


@pytest.fixture(scope="module")
def series(page: str) -> Series:
    return series_of(page)


def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DASHBOARDS / "penstock.json").read_text())
    return found


def filled(query: str) -> str:
    for name, value in FILLED_IN.items():
        query = query.replace(name, value)
    assert "$" not in query, query
    return query


def queries() -> list[str]:
    panels = [target["expr"] for panel in board()["panels"] for target in panel.get("targets", ())]
    variables = [each["query"]["query"] for each in board()["templating"]["list"] if each["type"] == "query"]
    labels = [re.fullmatch(r"label_values\((.*), (\w+)\)", query) for query in variables]
    return panels + [f"max by ({found[2]}) ({found[1]})" for found in labels if found is not None]


def alerts() -> list[dict[str, Any]]:
    rules = yaml.safe_load((DASHBOARDS / "alerts.yaml").read_text())
    return [rule for group in rules["groups"] for rule in group["rules"]]


def require_all_found(series: Series) -> None:
    asked = queries()
    assert len(asked) > 80
    assert [problem for query in asked for problem in problems(filled(query), series)] == []
    assert len(alerts()) > 8
    assert [problem for rule in alerts() for problem in problems(rule["expr"], series)] == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(120)
def test_every_query_finds_its_series_in_a_scrape_of_penstock_serve(tmp_path: Path) -> None:
    """The embedded model behind Ray and HTTP, one request of either kind and one refusal."""
    cluster = ServedCluster(tmp_path, ["--prefill", "1", "--decode", "1", "--kv-cache-memory-bytes", "64M"])
    try:
        cluster.wait_ready()
        body = {"prompt": "17 + 25 = ", "max_tokens": 8}
        asyncio.run(complete(cluster.url, [body, {**body, "stream": True}]))
        assert cluster.http.post("/v1/completions", json={**body, "model": "nobody", "nonsense": 1}).status_code == 404
        time.sleep(1.0)  # the workers' next heartbeats
        require_all_found(series_of(cluster.http.get("/metrics").text))
    finally:
        cluster.end()


def test_every_query_and_alert_finds_its_series(series: Series) -> None:
    require_all_found(series)


def test_alerts_name_labels_that_they_group_by() -> None:
    for rule in alerts():
        named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert named <= read_expression(rule["expr"]).grouped_by


def test_boards_made_for_vllm_find_theirs(series: Series) -> None:
    for name, label in THEIRS.items():
        model = "" if name.startswith("http") else '{model_name="oracle-model"}'
        assert problems(f"sum by ({label}) (rate({name}{model}[5m]))", series) == []


def test_aliases_carry_the_values_of_ours(page: str) -> None:
    figures = dict(re.findall(r"^(\S+?\{\S*\}) (\S+)$", page, re.MULTILINE))
    for name in ("time_to_first_token_seconds_count", "generation_tokens_total", "request_prompt_tokens_sum"):
        ours = figures[f'penstock_{name}{{model_name="oracle-model"}}']
        assert ours == figures[f'vllm:{name}{{engine="0",model_name="oracle-model"}}']
        assert float(ours) > 0
    hits = 'prefix_cache_hits_total{model_name="oracle-model",role="decode",worker="decode-1"}'
    assert float(figures[f"penstock_{hits}"]) > 0
    steps = figures['vllm:iteration_tokens_total_count{engine="prefill-0",model_name="oracle-model"}']
    assert float(steps) >= 3
    sent = figures['penstock_kv_transfer_seconds_count{model_name="oracle-model",role="prefill",worker="prefill-0"}']
    assert float(sent) == 3
    choices = sum(float(value) for name, value in figures.items() if name.startswith("penstock_router_choice_total"))
    assert choices == 6


def test_the_board_can_be_imported() -> None:
    found = board()
    assert found["uid"]
    assert found["schemaVersion"] >= 36
    ids = [panel["id"] for panel in found["panels"]]
    assert len(set(ids)) == len(ids)
    assert {each["name"] for each in found["templating"]["list"]} == {"datasource", "model", "worker"}
    for panel in found["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
    cells = [
        (x, y)
        for panel in found["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)  # no panel lies on another


@pytest.mark.parametrize(
    "query",
    [
        "rate(penstock_nothing_total[5m])",
        'sum(penstock_worker_up{nobody="x"})',
        "sum by (shoe_size) (penstock_worker_up)",
        'rate(penstock_request_terminal_total{state=~"completed|vanished"}[5m])',
        'penstock_worker_up{worker="prefill-9"}',
    ],
)
def test_a_wrong_query_is_noticed(series: Series, query: str) -> None:
    assert problems(query, series)
