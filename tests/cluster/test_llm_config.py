"""Ray's own LLMConfig shape: what maps, maps; the rest is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.app_arguments import config_of
from penstock.cluster.llm_config import is_llm_config, translate
from penstock.workers.errors import ConfigError

LOADING = {"model_id": "tiny", "model_source": "/models/tiny"}


def test_one_model() -> None:
    found = translate(
        {
            "llm_configs": [
                {
                    "model_loading_config": LOADING,
                    "llm_engine": "vLLM",
                    "accelerator_type": "L4",
                    "engine_kwargs": {
                        "max_model_len": 4096,
                        "dtype": "bfloat16",
                        "enable_prefix_caching": True,
                        "kv_offloading_size": 4,
                    },
                    "deployment_config": {
                        "num_replicas": 2,
                        "max_ongoing_requests": 64,
                        "ray_actor_options": {"num_cpus": 4, "num_gpus": 1, "resources": {"fast": 1}},
                    },
                    "lora_config": None,
                    "runtime_env": {},
                }
            ]
        }
    )
    assert found == {
        "runner.model_dir": "/models/tiny",
        "front.served_model_name": "tiny",
        "ray.worker_accelerator_type": "L4",
        "scheduler.max_model_len": 4096,
        "runner.dtype": "bfloat16",
        "kv.prefix_caching": True,
        "kv.host_bytes": "4G",
        "pools.mixed": 2,
        "limits.max_open_requests": 64,
        "ray.worker_num_cpus": 4,
        "ray.worker_num_gpus": 1,
        "ray.mixed_resources": {"fast": 1},
    }


def test_it_becomes_a_configuration(model_dir: Path) -> None:
    config = config_of({"model_loading_config": {"model_id": "mine", "model_source": str(model_dir)}})
    assert (config.pools.prefill, config.pools.decode, config.pools.mixed) == (0, 0, 1)
    assert config.model_name == "mine"


def test_prefill_and_decode() -> None:
    def half(replicas: int, **engine: Any) -> dict[str, Any]:
        return {
            "model_loading_config": LOADING,
            "engine_kwargs": {"kv_transfer_config": {"kv_connector": "NixlConnector"}, **engine},
            "deployment_config": {"autoscaling_config": {"min_replicas": replicas, "max_replicas": replicas}},
        }

    found = translate({"prefill_config": half(1), "decode_config": half(3)})
    assert (found["pools.prefill"], found["pools.decode"]) == (1, 3)
    with pytest.raises(ConfigError, match="must agree"):
        translate({"prefill_config": half(1, dtype="float16"), "decode_config": half(1, dtype="bfloat16")})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine_kwargs": {"swap_space": 4}}, "engine_kwargs.swap_space"),
        ({"lora_config": {"dynamic_lora_loading_path": "s3://x"}}, "lora_config"),
        ({"placement_group_config": {"bundles": [{"GPU": 1}]}}, "placement_group_config"),
        ({"deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}}}, "autoscaling_config"),
        ({"deployment_config": {"request_router_config": {"x": 1}}}, "deployment_config.request_router_config"),
        ({"llm_engine": "other"}, "llm_engine"),
        ({"model_loading_config": {"model_id": "m", "model_source": {"bucket_uri": "s3://b"}}}, "model_source"),
        ({"model_loading_config": "m"}, "model_loading_config"),
    ],
)
def test_the_rest_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    args = {"model_loading_config": LOADING, **change}
    assert is_llm_config(args)
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        translate(args)


def test_two_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        translate({"llm_configs": [{"model_loading_config": LOADING}] * 2})


def test_widths() -> None:
    def one(**engine: Any) -> dict[str, Any]:
        return {"model_loading_config": LOADING, "engine_kwargs": engine}

    alone = translate(one(tensor_parallel_size=2, expert_parallel_size=4))
    assert (alone["pools.tensor_parallel_size"], alone["pools.expert_parallel_size"]) == (2, 4)
    pair = translate({"prefill_config": one(tensor_parallel_size=4), "decode_config": one(tensor_parallel_size=2)})
    assert (pair["pools.prefill_tensor_parallel_size"], pair["pools.decode_tensor_parallel_size"]) == (4, 2)
