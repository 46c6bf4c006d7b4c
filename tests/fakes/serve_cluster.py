"""One Penstock application on two Ray nodes, deployed as a user would: a YAML file and `serve deploy`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fakes.two_node_ray import TwoNodeRay

NAME = "llm"
ORACLE: dict[str, dict[str, Any]] = {
    "runner": {"kind": "oracle", "oracle_step_s": 0.01},
    "kv": {"num_blocks": 512},
    "scheduler": {"max_model_len": 2048},
}
OURS = ("ray::WorkerActor", "ray::Controller")


class ServeCluster(TwoNodeRay):
    """Prefill workers live on the head, decode workers on the second node."""

    def __init__(self) -> None:
        super().__init__({"prefill": 8}, {"decode": 8})

    def file(
        self, decode: int = 1, model: Mapping[str, Mapping[str, Any]] = ORACLE, **sections: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The deployment's file; `sections` are arguments over those of the model."""
        args: dict[str, dict[str, Any]] = {name: dict(section) for name, section in model.items()}
        args["ray"] = {"prefill_resources": {"prefill": 1}, "decode_resources": {"decode": 1}}
        args["front"] = {"port": self.direct_port, "admin": "shared"}
        args["health"] = {"drain_s": 20}
        for name, section in sections.items():
            args[name] = {**args.get(name, {}), **section}
        application = {
            "name": NAME,
            "route_prefix": "/",
            "import_path": "penstock.cluster.serve_app:build",
            "args": args,
            "deployments": [{"name": "ingress", "user_config": {"pools": {"prefill": 1, "decode": decode}}}],
        }
        http = {"host": "127.0.0.1", "port": self.http_port}
        return {"proxy_location": "HeadOnly", "http_options": http, "applications": [application]}

    def wait_pools(self, decode: int, timeout_s: float = 90.0) -> float:
        """Seconds until exactly one prefill and so many decode workers are there, and all are ready."""

        def there() -> bool:
            return self.ready_roles() == {"prefill": 1, "decode": decode} and len(self.workers()) == 1 + decode

        return self.until(there, timeout_s)

    def wait_gone(self, timeout_s: float = 40.0) -> float:
        """Seconds until no worker and no controller is left."""
        return self.until(lambda: not self.processes(*OURS), timeout_s)
