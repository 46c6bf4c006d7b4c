"""Devices by name, with and without GPUs in sight; what is known of one."""

import pytest
import torch

from penstock.workers import device as module
from penstock.workers.device import check_dtype, device_facts, resolve_device
from penstock.workers.errors import ConfigError


@pytest.fixture
def see(monkeypatch):
    def cards(count, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")

    return cards


@pytest.mark.parametrize(
    ("name", "cards", "found"),
    [
        ("cpu", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_names(see, name, cards, found):
    see(cards)
    assert resolve_device(name) == torch.device(found)


@pytest.mark.parametrize(
    ("name", "cards"), [("cuda", 0), ("cuda:2", 2), ("gpu", 1), ("cuda:x", 1), ("", 1), ("CUDA", 1), ("cuda:100", 1)]
)
def test_names_that_mean_nothing_here(see, name, cards):
    see(cards)
    with pytest.raises(ConfigError) as caught:
        resolve_device(name)
    assert caught.value.key == "runner.device"


def test_dtypes(see):
    see(1, (7, 5))
    check_dtype(torch.device("cpu"), "bfloat16")
    check_dtype(torch.device("cuda", 0), "float16")
    with pytest.raises(ConfigError, match="bfloat16 is not supported by Card"):
        check_dtype(torch.device("cuda", 0), "bfloat16")
    see(1, (8, 0))
    check_dtype(torch.device("cuda", 0), "bfloat16")


def test_facts(see, monkeypatch, tmp_path):
    assert device_facts(torch.device("cpu")).name.startswith("cpu ")
    see(1)
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\nGCC 12\n")
    monkeypatch.setattr(module, "_DRIVER", version)
    facts = device_facts(torch.device("cuda", 0))
    assert (facts.name, facts.driver) == ("Card", "550.54.15")
    assert dict(facts.libraries)["torch"] == torch.__version__
    monkeypatch.setattr(module, "_DRIVER", tmp_path / "absent")
    assert device_facts(torch.device("cuda", 0)).driver == "unknown"
