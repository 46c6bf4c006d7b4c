"""Which device a worker computes on, and what there is to know about it: memory, name, driver, versions.

Called by `runner.py` at start. `runner.device` says cpu, cuda, cuda:N or auto; auto takes the first GPU that this
process sees, else the CPU. Ray narrows what a process sees, so `cuda` is right in an actor that asked for a GPU. It
does not know models or KV blocks.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

import torch

from penstock.workers.errors import ConfigError
from penstock.workers.settings import DEVICE_NAME

_KEY = "runner.device"
_DRIVER = Path("/proc/driver/nvidia/version")
_LIBRARIES = ("torch", "triton", "numpy")
_LEAST_BFLOAT16 = (8, 0)  # compute capability from which products in bfloat16 run on the tensor cores


def resolve_device(name: str) -> torch.device:
    """The device that `name` means here. Raises ConfigError where it is no such name, or no such GPU is here."""
    if not DEVICE_NAME.fullmatch(name):
        raise ConfigError(f"device {name!r} is not one of cpu, cuda, cuda:N, auto", key=_KEY)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not seen):
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if index >= seen:
        raise ConfigError(
            f"device {name!r}: this process sees {seen} GPUs; check the driver, CUDA_VISIBLE_DEVICES and, under Ray, "
            "ray.worker_num_gpus, or use device cpu",
            key=_KEY,
        )
    return torch.device("cuda", index)


def check_dtype(device: torch.device, dtype: str) -> None:
    """Raises ConfigError for a dtype that the device's products do not run in."""
    if device.type != "cuda" or dtype != "bfloat16":
        return
    if torch.cuda.get_device_capability(device) < _LEAST_BFLOAT16:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"dtype bfloat16 is not supported by {name}; use float16 or float32", key="runner.dtype")


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a captured graph and a tuned configuration depend on besides the model."""

    name: str
    driver: str
    libraries: tuple[tuple[str, str], ...]  # name, version


def device_facts(device: torch.device) -> DeviceFacts:
    """Name, driver and library versions of a device; for the CPU the processor's architecture and the system."""
    libraries = [("python", platform.python_version()), ("cuda", str(torch.version.cuda))]
    for library in _LIBRARIES:
        try:
            libraries.append((library, metadata.version(library)))
        except metadata.PackageNotFoundError:
            libraries.append((library, "absent"))
    if device.type != "cuda":
        return DeviceFacts(f"cpu {platform.machine()}", platform.release(), tuple(libraries))
    return DeviceFacts(torch.cuda.get_device_name(device), _driver_version(), tuple(libraries))


def _driver_version() -> str:
    """The kernel module's version, like 550.54.15; "unknown" where the system does not tell."""
    try:
        first = _DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"
    found = re.search(r"\b[0-9]+\.[0-9]+(\.[0-9]+)?\b", first)
    return found.group() if found else "unknown"


class DeviceMemory(Protocol):
    """Memory of one device, in bytes."""

    @property
    def total(self) -> int:
        """Of the whole device."""
        ...

    @property
    def free(self) -> int:
        """Free on the device just now, whoever uses the rest."""
        ...

    @property
    def allocated(self) -> int:
        """In this process's live tensors."""
        ...

    @property
    def peak(self) -> int:
        """The most that was in live tensors since `reset_peak`."""
        ...

    def reset_peak(self) -> None:
        """Give cached memory back and count the peak from now on."""
        ...


class CudaMemory:
    """`DeviceMemory` of a GPU, as torch's allocator and the driver count it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def total(self) -> int:
        """See `DeviceMemory.total`."""
        return int(torch.cuda.mem_get_info(self._device)[1])

    @property
    def free(self) -> int:
        """See `DeviceMemory.free`."""
        return int(torch.cuda.mem_get_info(self._device)[0])

    @property
    def allocated(self) -> int:
        """See `DeviceMemory.allocated`."""
        return int(torch.cuda.memory_allocated(self._device))

    @property
    def peak(self) -> int:
        """See `DeviceMemory.peak`."""
        return int(torch.cuda.max_memory_allocated(self._device))

    def reset_peak(self) -> None:
        """See `DeviceMemory.reset_peak`."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
