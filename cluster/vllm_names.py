"""vLLM's metric names for the figures of our page, so that its boards and alerts work here unchanged.

Used by `metrics.py` when the page is asked for: samples of our own instruments are copied under the other name, with
vLLM's labels `model_name` and `engine` (a worker's id where the figure is a worker's, "0" where it is the ingress's).
Nothing is counted twice. Names without a meaning here (LoRA, sleep, speculation, offload) are absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from penstock.workers.protocol import FailureCode

_SAME = (
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
    "request_params_n",
    "request_params_max_tokens",
    "cache_config_info",
)
_LABELS = {"num_blocks": "num_gpu_blocks", "worker": "engine"}
_REJECTIONS = frozenset(
    {
        FailureCode.QUEUE_FULL,
        FailureCode.OVERLOADED,
        FailureCode.TENANT_LIMIT,
        FailureCode.NO_WORKER,
        FailureCode.DRAINING,
        FailureCode.DEADLINE,
    }
)
_INGRESS = "0"


def aliases_of(ours: Iterable[Metric], model_name: str) -> Iterator[Metric]:
    """The metrics that vLLM's users know, out of our own of this moment."""
    found = {metric.name.removeprefix("penstock_"): metric for metric in ours}
    for name in _SAME:
        if name in found:
            yield _renamed(found[name], f"vllm:{name}", model_name)
    for name in ("http_requests", "http_request_duration_seconds"):
        if name in found:
            yield _http(found[name], name)
    yield from _by_source(found, model_name)
    if "request_terminal" in found:
        yield _rejections(found["request_terminal"], model_name)


def _renamed(metric: Metric, name: str, model_name: str) -> Metric:
    copy = Metric(name, metric.documentation, metric.type)
    for sample in metric.samples:
        if not sample.name.endswith("_created"):
            labels = _vllm_labels(sample.labels, model_name)
            copy.samples.append(Sample(name + sample.name.removeprefix(metric.name), labels, sample.value))
    return copy


def _http(metric: Metric, name: str) -> Metric:
    """As FastAPI's instrumentator has them: statuses by class, and `none` for paths that do not exist."""
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in metric.samples:
        if sample.name.endswith("_created"):
            continue
        labels = dict(sample.labels)
        if labels["handler"] == "other":
            labels["handler"] = "none"
        if "status" in labels:
            labels["status"] = labels["status"][:1] + "xx"
        key = (name + sample.name.removeprefix(metric.name), tuple(labels.items()))
        sums[key] = sums.get(key, 0.0) + sample.value
    copy = Metric(name, metric.documentation, metric.type)
    copy.samples.extend(Sample(name, dict(labels), value) for (name, labels), value in sums.items())
    return copy


def _vllm_labels(labels: Mapping[str, str], model_name: str) -> dict[str, str]:
    kept = {_LABELS.get(label, label): value for label, value in labels.items() if label != "role"}
    return {"model_name": model_name, "engine": _INGRESS, **kept}


def _by_source(found: Mapping[str, Metric], model_name: str) -> Iterator[Metric]:
    """Where prompt tokens came from, out of the two counters that know."""
    totals = {}
    for name in ("prompt_tokens", "prompt_tokens_cached"):
        if name not in found:
            return
        totals[name] = next(s.value for s in found[name].samples if s.name.endswith("_total"))
    metric = Metric("vllm:prompt_tokens_by_source", "Prompt tokens by where their KV came from", "counter")
    cached = totals["prompt_tokens_cached"]
    for source, value in (("local_compute", totals["prompt_tokens"] - cached), ("local_cache_hit", cached)):
        labels = {"model_name": model_name, "engine": _INGRESS, "source": source}
        metric.samples.append(Sample("vllm:prompt_tokens_by_source_total", labels, value))
    yield metric


def _rejections(terminal: Metric, model_name: str) -> Metric:
    metric = Metric("vllm:admission_rejections", "Requests turned away, by reason", "counter")
    for sample in terminal.samples:
        state = sample.labels.get("state")
        if sample.name.endswith("_total") and state in _REJECTIONS:
            labels = {"model_name": model_name, "reason": state}
            metric.samples.append(Sample("vllm:admission_rejections_total", labels, sample.value))
    return metric
