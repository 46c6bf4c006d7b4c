"""The tuner's search on response surfaces whose optimum is known, and its spaces."""

import math

import numpy as np
import pytest
from kernel_bench.search import TRIALS, Found, next_task, search
from kernel_bench.space import MOST_ACCUMULATORS, SHARED_BYTES, SPACES

SHAPES = [{"T": 16, "M": 6144, "K": 4096}, {"T": 256, "M": 4096, "K": 12288}, {"T": 4096, "M": 6144, "K": 4096}]
SEEDS = 20


def product_surface(key, seed):
    """Seconds of a product: waves over the card, latency hiding by stages, splitting's cost, and tastes of the seed."""
    rng = np.random.default_rng(1000 + seed)
    taste = rng.uniform(0.5, 1.5, 5)
    depth, stages, warps = rng.choice([64, 128]), rng.choice([3, 4]), rng.choice([4, 8])

    def seconds(config):
        tiles = -(-key["T"] // config["BLOCK_T"]) * -(-key["M"] // config["BLOCK_M"]) * config["SPLIT_K"]
        bytes_each = 2 * (config["BLOCK_T"] + config["BLOCK_M"]) * config["BLOCK_K"] * config["num_stages"]
        resident = max(1, min(4, SHARED_BYTES // bytes_each))
        waves = math.ceil(tiles / (132 * resident))
        inner = key["K"] / config["SPLIT_K"]
        compute = 2 * config["BLOCK_T"] * config["BLOCK_M"] * inner / (7.5e12 / resident)
        hidden = 1 - math.exp(-taste[0] * config["num_stages"] * resident / 2)
        traffic = 2 * (config["BLOCK_T"] + config["BLOCK_M"]) * inner / (25e9 / resident * hidden)
        time = waves * max(compute, traffic) + 3e-6
        if config["SPLIT_K"] > 1:
            time += 2e-6 + config["SPLIT_K"] * key["T"] * key["M"] * 4 / 3e12
        time *= 1 + 0.1 * taste[1] * abs(math.log2(config["BLOCK_K"] / depth))
        time *= 1 + 0.05 * taste[2] * abs(config["num_stages"] - stages)
        time *= 1 + 0.1 * taste[3] * abs(math.log2(config["num_warps"] / warps))
        time *= 1 + (0.03 * taste[4] if config["GROUP_T"] == 1 else 0)
        return time * (1.3 if config["vendor"] else 1)

    return seconds


def reached(key, seed):
    """(share of the optimum by the search, by as many random trials)."""
    space, surface, rng = SPACES["linear"], product_surface(key, seed), np.random.default_rng(seed)
    configs = space.configs(key)
    best = min(surface(config) for config in configs)

    def measure(config):
        return surface(config) * (1 + 0.01 * rng.standard_normal())

    found = search(configs, measure, features=lambda config: space.features(config, key), seed=seed)
    assert len(found.trials) == TRIALS
    picked = rng.choice(len(configs), TRIALS, replace=False)
    return best / surface(found.best[0]), best / min(surface(configs[number]) for number in picked)


@pytest.mark.parametrize("key", SHAPES, ids=lambda key: f"T{key['T']}")
def test_forty_trials_reach_95_percent_of_the_optimum_in_nine_of_ten_seeds(key):
    ours, random = zip(*(reached(key, seed) for seed in range(SEEDS)), strict=True)
    assert np.mean([share >= 0.95 for share in ours]) >= 0.9
    assert np.mean(ours) > np.mean(random)


def test_a_surface_that_the_features_know_nothing_about():
    """A bowl in the logarithms, with a wall; only the configurations' own numbers to go by."""
    space, key = SPACES["moe"], {"T": 64, "E": 128, "top_k": 8, "F": 768, "K": 2048}
    configs, good = space.configs(key), 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        centre = configs[int(rng.integers(len(configs)))]
        weights = {name: rng.uniform(0.05, 0.3) for name in centre}

        def seconds(config, centre=centre, weights=weights):
            away = sum(weights[name] * abs(math.log2(config[name] / centre[name])) for name in centre)
            return 1e-4 * (1 + away) * (2 if config["BLOCK_T"] * config["BLOCK_M"] > 16384 else 1)

        best = min(seconds(config) for config in configs)
        found = search(configs, seconds, seed=seed)
        good += best / seconds(found.best[0]) >= 0.95
    assert good >= 0.9 * SEEDS


def test_a_seed_decides_everything_and_starts_come_first():
    key, space = SHAPES[0], SPACES["linear"]
    configs, surface = space.configs(key), product_surface(SHAPES[0], 0)
    start = [configs[17], configs[3]]
    runs = [search(configs, surface, start=start, seed=4, trials=20) for _ in range(2)]
    assert runs[0].trials == runs[1].trials
    assert [config for config, _ in runs[0].trials[:2]] == start
    assert len({str(config) for config, _ in runs[0].trials}) == 20


def test_refusals_cost_no_trial_and_failures_are_no_winners():
    configs, asked = SPACES["rms_norm"].configs({"rows": 1, "width": 64}), []
    found = search(configs, lambda config: None if config["num_warps"] > 4 else 1.0 / config["ROWS"], trials=12)
    assert found.best[0]["ROWS"] == 32 or len(found.trials) == 12
    assert found.best[0]["num_warps"] <= 4
    found = search(
        configs, lambda config: asked.append(config) or 1.0, accept=lambda config: config["ROWS"] == 2, trials=40
    )
    assert {config["ROWS"] for config in asked} == {2}
    assert len(found.trials) == 5
    with pytest.raises(ValueError, match="no configuration ran"):
        _ = Found().best


@pytest.mark.parametrize("kernel", SPACES)
def test_spaces_are_admissible(kernel):
    key = {"T": 64, "M": 4096, "K": 4096, "E": 128, "top_k": 8, "F": 768, "R": 16, "rows": 64, "width": 4096}
    configs = SPACES[kernel].configs({**key, "head_dim": 128, "page": 16, "bytes": 2, "group": 4})
    assert configs
    assert len({str(config) for config in configs}) == len(configs)
    for config in configs:
        if "BLOCK_T" in config:
            assert config["BLOCK_T"] * config["BLOCK_M"] <= MOST_ACCUMULATORS * 32 * config["num_warps"]
            assert config["BLOCK_T"] <= 128


def test_the_next_task_is_where_most_is_to_be_saved():
    assert next_task([1.0, 5.0], [0.5, 0.5], [1.0, 1.0]) == 1
    assert next_task([1.0, 5.0], [0.1, 0.99], [1.0, 1.0]) == 0
    assert next_task([1.0, 1.0], [0.5, 0.5], [0.0, 0.2]) == 1
    assert next_task([1.0, 1.0], [0.5, 0.5], [1.0, 1.0]) == 0
