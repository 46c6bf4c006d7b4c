"""How many KV blocks fit: the formula, what others take, and what is said where too few do."""

import dataclasses

import pytest

from penstock.workers.errors import ConfigError
from penstock.workers.kv.sizing import MemoryUse, blocks_that_fit

USE = MemoryUse(total=1000, weights=300, activations=100, foreign=0)


@pytest.mark.parametrize(
    ("change", "utilization", "blocks"),
    [
        ({}, 0.9, 50 - 1),
        ({}, 0.5, 10 - 1),
        ({"weights": 0}, 1.0, 90 - 1),
        ({"foreign": 100}, 0.9, 50 - 1),  # they fit into what is left over
        ({"foreign": 150}, 0.9, 45 - 1),
        ({"foreign": 400}, 0.5, 10 - 1),  # another worker with its own share
    ],
)
def test_the_formula(change, utilization, blocks):
    assert blocks_that_fit(dataclasses.replace(USE, **change), utilization, 10, needed=1) == blocks


def test_too_few_for_one_sequence():
    with pytest.raises(ConfigError, match="49 blocks, and one sequence of max_model_len needs 50") as caught:
        blocks_that_fit(USE, 0.9, 10, needed=50)
    assert caught.value.key == "kv.gpu_memory_utilization"
    with pytest.raises(ConfigError, match=": 0 blocks"):
        blocks_that_fit(USE, 0.1, 10, needed=1)
