"""The application that Serve's command line builds, and one round of it: deploy, scale, redeploy under load, delete."""

from __future__ import annotations

import subprocess
import warnings
from pathlib import Path

import httpx
import pytest
import yaml
from fakes.serve_cluster import ServeCluster
from fakes.stream_load import StreamLoad
from fakes.two_node_ray import BIN

from penstock.workers.errors import ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Serve's own models, on import
    from ray.serve.schema import ServeDeploySchema

    from penstock.cluster import serve_app
    from penstock.cluster.serve_app import build

ORACLE = {"runner.kind": "oracle"}


def test_pool_sizes_are_a_light_update_and_new_replicas_come_first() -> None:
    deployment = build({**ORACLE, "decode": "3", "ray.ingress_replicas": "2"})._bound_deployment
    assert deployment.name == "ingress"
    assert deployment.num_replicas == 2
    assert deployment.user_config == {"pools": {"prefill": 1, "decode": 3, "mixed": 0}}
    config = deployment._deployment_config
    assert config.max_surge_percent == 100
    assert config.graceful_shutdown_timeout_s > 2 * 30.0, "both drains must fit"
    assert config.max_ongoing_requests > 1024, "Serve would hold back what we refuse with Retry-After"


def test_mistakes_are_told_while_it_is_built() -> None:
    with pytest.raises(ConfigError, match="did you mean 'decode'"):
        build({**ORACLE, "decodee": 3})


def test_the_module_has_nothing_else() -> None:
    assert not hasattr(serve_app, "nothing")


@pytest.mark.timeout(90)
def test_serve_build_writes_a_file_that_serve_accepts(tmp_path: Path) -> None:
    out = tmp_path / "config.yaml"
    subprocess.run([BIN / "serve", "build", "penstock.cluster.serve_app:app", "-o", out], check=True, timeout=80)
    config = yaml.safe_load(out.read_text())
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == "penstock.cluster.serve_app:app"
    assert application["deployments"][0]["user_config"]["pools"] == {"prefill": 1, "decode": 1, "mixed": 0}


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_deploy_scale_and_redeploy_under_load_lose_nothing() -> None:
    """Two nodes, Serve's own commands. With kills and models: `tests/faults/test_serve_deploy.py`."""
    cluster = ServeCluster()
    try:
        cluster.deploy(cluster.file())
        cluster.wait_pools(1)
        assert cluster.http.get("/-/healthz").status_code == 200
        first = set(cluster.workers())
        load = StreamLoad(cluster.url, "oracle").start()
        cluster.deploy(cluster.file(decode=2))
        cluster.wait_pools(2)
        assert first < set(cluster.workers()), "a pool size is no reason to replace anybody"
        # A changed front replaces the ingress replicas and no worker.
        cluster.deploy(cluster.file(decode=1, front={"served_model_name": ["oracle", "other"]}))
        cluster.until(lambda: len(cluster.http.get("/v1/models").json()["data"]) == 2, 60.0)
        cluster.wait_pools(1)
        load.stop()
        assert (load.failed, load.wrong) == ([], 0)
        assert load.done > 50
        assert first == set(cluster.workers())
        cluster.shutdown_serve()
        cluster.wait_gone()
        with pytest.raises(httpx.HTTPError):
            cluster.http.get("/health")
    except BaseException:
        print(cluster.logs("replica", "controller", "worker-"))
        raise
    finally:
        cluster.end()
