"""Rules for requests and limits, wherever they stand. Used by `pod_rules.py` and `cluster_rules.py`. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from penstock.cluster.validate.findings import Path, Problem, nearest
from penstock.cluster.validate.loose import mapping
from penstock.cluster.validate.quantities import quantity

OWN = ("cpu", "memory", "ephemeral-storage")
# What device plugins call the devices that Ray knows how to count.
DEVICES = (
    "nvidia.com/gpu",
    "nvidia.com/gpu.shared",
    "amd.com/gpu",
    "gpu.intel.com/i915",
    "gpu.intel.com/xe",
    "habana.ai/gaudi",
    "google.com/tpu",
    "aws.amazon.com/neuron",
    "aws.amazon.com/neuroncore",
    "huawei.com/Ascend910",
)
MISSPELT = 0.85  # how alike a name is to the one that was meant
ROUGHLY = 0.6
LEAST_MEMORY = 64 << 20


def check_resources(resources: dict[str, Any], path: Path) -> Iterator[Problem]:
    """Everything wrong with one `resources`."""
    requests, limits = mapping(resources, "requests"), mapping(resources, "limits")
    for name, value in requests.items():
        wanted, most = quantity(value), quantity(limits.get(name))
        if wanted is not None and most is not None and wanted > most:
            yield Problem((*path, "requests", name), f"request {value} is more than the limit {limits[name]}")
        if is_gpu(name) and wanted != most:
            yield Problem((*path, "requests", name), f"a GPU's request must equal its limit {limits.get(name)!r}")
    for kind, amounts in (("requests", requests), ("limits", limits)):
        for name, value in amounts.items():
            yield from _amount(name, value, (*path, kind, name))


def is_gpu(name: str) -> bool:
    """Whether Ray counts this resource of a container as GPUs."""
    return name.endswith("/gpu")


def _amount(name: str, value: object, path: Path) -> Iterator[Problem]:
    amount = quantity(value)
    if amount is not None and amount < 0:
        yield Problem(path, f"{value} is less than 0")
    elif name == "memory" and amount is not None and amount < LEAST_MEMORY:
        yield Problem(path, f"{value} is {amount:g} bytes, less than 64Mi")
    elif "/" in name and amount is not None and amount != int(amount):
        whole_ones = f"{value} GPUs: a pod gets whole ones; share them with Ray's num_gpus"
        yield Problem(path, whole_ones if is_gpu(name) else f"{value} of {name}: devices come whole")
    if name == "gpu":
        yield Problem(path, "GPUs have a vendor", "nvidia.com/gpu")
    elif "/" in name:
        unowned = "." not in name.partition("/")[0]  # vendors' names begin with their domain
        near = difflib.get_close_matches(name, DEVICES, n=1, cutoff=ROUGHLY if unowned else MISSPELT)
        if name not in DEVICES and (near or unowned):
            yield Problem(path, f"no device plugin offers {name!r}", near[0] if near else None)
    elif name not in OWN and not name.startswith("hugepages-"):
        yield Problem(path, f"unknown resource {name!r}", nearest(name, OWN))
