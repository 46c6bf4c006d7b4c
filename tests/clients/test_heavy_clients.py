"""Clients with environments of their own, unchanged, against a running split cluster: minutes, gigabytes of disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fakes.client_venv import client_bin, run_client

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]
PROGRAMS = Path(__file__).resolve().parent
MODEL_DIR = str(PROGRAMS.parents[1] / "cluster" / "embedded_model")
ANSWER = "17 + 25 = 42."
LM_EVAL_DOCUMENTS = [
    {"context": "12+34=", "target": "46"},
    {"context": "Once upon a time there was a", "target": " little fox named Ana."},
    {"context": "What is 17 + 25?", "target": " 42."},
    {"context": "The capital of France is", "target": " Paris"},
    {"context": "naïve café ☃", "target": " ünïcödé"},
    {"context": "", "target": "Hello"},
    {"context": "The quick brown fox jumps over the lazy dog. " * 40, "target": "The quick brown fox."},
]
LM_EVAL_TASK = """
task: penstock_small
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def last_line(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def test_langchain(cluster: Any, tmp_path: Path) -> None:
    program = [client_bin("langchain") / "python", PROGRAMS / "langchain_program.py"]
    said = last_line(run_client([*program, cluster.base_url, cluster.key, cluster.model], tmp_path))
    assert (said["invoke"], said["stream"], said["batch"][1]) == (ANSWER, ANSWER, ANSWER)
    assert said["finish"] == "stop"
    assert "42" in said["ainvoke"]
    counts = ("input_tokens", "output_tokens", "total_tokens")
    assert [said["usage"][name] for name in counts] == [said["stream_usage"][name] for name in counts]
    assert said["usage"]["output_tokens"] == 12
    assert "maximum context length" in said["overflow"]
    assert said["called"] in ([["look_up", 17]], [["look_up", 25]])


def test_litellm(cluster: Any, tmp_path: Path) -> None:
    program = [client_bin("litellm") / "python", PROGRAMS / "litellm_program.py"]
    arguments = [*program, cluster.base_url, cluster.key, cluster.model]
    said = last_line(run_client(arguments, tmp_path, LITELLM_LOCAL_MODEL_COST_MAP="True"))
    assert {said[way] for way in ("completion", "stream", "routed", "fallback")} == {ANSWER}
    assert said["usage"] == [13, 12]
    assert 1 <= said["text_tokens"] <= 3
    assert said["overflow"] == said["far_overflow"] == "ContextWindowExceededError"
    assert "maximum context length" in said["routed_overflow"]
    assert (said["bad"], said["unknown"], said["key"]) == ("BadRequestError", "NotFoundError", "AuthenticationError")


def test_lm_eval_log_likelihoods_equal_those_of_its_transformers_backend(cluster: Any, tmp_path: Path) -> None:
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps(document) + "\n" for document in LM_EVAL_DOCUMENTS))
    (tmp_path / "penstock_small.yaml").write_text(LM_EVAL_TASK.format(documents=documents))
    served = f"base_url={cluster.base_url}/completions,model={cluster.model},tokenizer={MODEL_DIR}"
    served += ",tokenizer_backend=huggingface,num_concurrent=2,tokenized_requests="
    hf = lm_eval(tmp_path, "hf", f"pretrained={MODEL_DIR},dtype=float32", "", "--device", "cpu")
    assert len(hf) == len(LM_EVAL_DOCUMENTS)
    assert {greedy for _, greedy in hf} == {True, False}
    for tokenized in ("True", "False"):
        ours = lm_eval(tmp_path, "local-completions", served + tokenized, cluster.key)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in hf]
        assert max(abs(a - b) for (a, _), (b, _) in zip(ours, hf, strict=True)) <= 1e-4


def lm_eval(folder: Path, model: str, arguments: str, key: str, *options: str) -> list[tuple[float, bool]]:
    """(log-likelihood, whether it is the greedy answer) of every document."""
    out = folder / f"{model}-{len(list(folder.iterdir()))}"
    command = [client_bin("lm_eval") / "lm_eval", "run", "--model", model, "--model_args", arguments, *options]
    command += ["--tasks", "penstock_small", "--include_path", folder, "--output_path", out, "--log_samples"]
    run_client(command, folder, OPENAI_API_KEY=key)
    (samples,) = out.rglob("samples_*.jsonl")
    lines = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    responses = [line["filtered_resps"][0] for line in lines]
    return [(float(logprob), str(greedy) == "True") for logprob, greedy in responses]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(cluster: Any, tmp_path: Path, path: str) -> None:
    backend = f"kind=openai_http,target={cluster.url},model={cluster.model},api_key={cluster.key},request_format={path}"
    command = [client_bin("guidellm") / "guidellm", "run", "--backend", backend, "--disable-progress"]
    command += ["--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={MODEL_DIR}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"]
    run_client([*command, "--output", f"kind=json,path={tmp_path / 'report.json'}"], tmp_path)
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    assert benchmark["metrics"]["request_totals"] == {"successful": 12, "errored": 0, "incomplete": 0, "total": 12}
    requests = benchmark["requests"]["successful"]
    assert {request["output_metrics"]["text_tokens"] for request in requests} == {16}
    assert all(request["output"] for request in requests)
    first = benchmark["metrics"]["time_to_first_token_ms"]["successful"]["mean"]
    whole = benchmark["metrics"]["request_latency"]["successful"]["mean"]
    assert 0 < first < 1000 * whole


@pytest.mark.parametrize(("backend", "path"), [("openai-chat", "/v1/chat/completions"), ("openai", "/v1/completions")])
def test_vllm_bench_serve(cluster: Any, tmp_path: Path, backend: str, path: str) -> None:
    command = [client_bin("vllm_bench") / "python", PROGRAMS / "vllm_bench_program.py", "--backend", backend]
    command += ["--base-url", cluster.url, "--endpoint", path, "--model", cluster.model, "--tokenizer", MODEL_DIR]
    command += ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16", "--ignore-eos"]
    command += ["--num-prompts", "12", "--save-result", "--save-detailed", "--result-dir", tmp_path]
    run_client([*command, "--result-filename", "report.json"], tmp_path, OPENAI_API_KEY=cluster.key)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["completed"], report["failed"]) == (12, 0)
    assert report["output_lens"] == [16] * 12
    assert report["total_output_tokens"] == 192
    assert all(0 < ttft < 30 for ttft in report["ttfts"])
    assert math.isfinite(report["mean_tpot_ms"])
    assert report["errors"] == [""] * 12
