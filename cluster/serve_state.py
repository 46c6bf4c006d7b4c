"""What Ray Serve says about one application: whether it is still wanted, and where its proxies listen.

The controller asks when its last ingress has left, and for the cluster's address. Blocking: call it beside the loop.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus

EVERY_INTERFACE = ("", "0.0.0.0", "::")
_OVER = (ApplicationStatus.DELETING, ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOY_FAILED)


@dataclass(frozen=True, slots=True)
class ServeView:
    """`wanted`: the application exists, and Serve runs it or tries to. `urls`: its base at every proxy."""

    wanted: bool
    urls: tuple[str, ...] = ()


def look_at_serve(app_name: str) -> ServeView:
    """Ask Serve's controller. Raises what Ray raises when it does not answer."""
    client = _get_global_client(raise_if_no_controller_running=False)
    application = serve.status().applications.get(app_name) if client is not None else None
    if client is None or application is None:
        return ServeView(False)
    details = client.get_serve_details()
    found = details["applications"].get(app_name) or {}
    prefix, proxies = found.get("route_prefix"), details.get("proxies") or {}
    options = details.get("http_options") or {}
    port, bound = options.get("port"), str(options.get("host") or "")
    nodes = {str(proxy["node_ip"]) for proxy in proxies.values() if proxy.get("node_ip")}
    hosts = sorted(nodes) if bound in EVERY_INTERFACE else [bound] if nodes else []
    scheme = "https" if options.get("ssl_certfile") else "http"
    urls = (
        tuple(f"{scheme}://{host}:{port}{prefix.rstrip('/')}" for host in hosts) if prefix is not None and port else ()
    )
    return ServeView(application.status not in _OVER, urls)


def delete_application(app_name: str) -> None:
    """Have Serve end the application; does not wait."""
    serve.delete(app_name, _blocking=False)
