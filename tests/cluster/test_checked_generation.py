"""Rolling back where a checker finds an error: the policies in a simulation, the flow against a scripted model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator, deltas
from fakes.http_server import HttpServer
from fakes.tiny_model import CONTEXT

from penstock.cluster.checked_generation import (
    Backwards,
    RollbackPolicy,
    TokenCost,
    generate_checked,
    python_checker,
)
from penstock.cluster.client import connect
from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec
from penstock.router.emission import Delta
from penstock.workers.protocol import EndReason, GenerateRequest

FIX, MEAN, MOST, NODE = 0.7, 16.0, 256, 4


def simulated_cost(policy: RollbackPolicy, cause: int, rng: random.Random) -> int:
    """Tokens generated again until the error is gone; nodes every few tokens, from the error back."""
    distances = list(range(NODE, MOST + 1, NODE))
    cost = 0
    for _ in range(500):
        distance = distances[policy.choose(distances)]
        cost += distance
        if cause <= distance and rng.random() < FIX:
            return cost
        policy.failed(distance)
    raise AssertionError("the error is never fixed")


class Chosen:
    """Always the same choice."""

    def __init__(self, choose: Callable[[Sequence[int]], int]) -> None:
        self.choose = choose

    def failed(self, distance: int) -> None:
        pass


@pytest.mark.parametrize("mean", [8.0, 16.0, 40.0])
def test_token_cost_is_the_cheapest_policy(mean: float) -> None:
    rng = np.random.default_rng(3)
    causes = np.clip(rng.geometric(1 / mean, 1500), 1, MOST).tolist()
    dice = random.Random(4)
    policies: dict[str, Callable[[], RollbackPolicy]] = {
        "token cost": lambda: TokenCost(MOST, mean, FIX),
        "backwards": Backwards,
        "anywhere": lambda: Chosen(lambda distances: dice.randrange(len(distances))),
        "all again": lambda: Chosen(lambda distances: len(distances) - 1),
    }
    costs = {
        name: float(np.mean([simulated_cost(make(), cause, random.Random(n)) for n, cause in enumerate(causes)]))
        for name, make in policies.items()
    }
    print(costs)
    assert costs["token cost"] == min(costs.values())


def test_the_belief_follows_bayes() -> None:
    policy = TokenCost(8, mean=4.0, fix=0.5)
    before = policy.belief.copy()
    assert before.sum() == pytest.approx(1)
    assert before[1] / before[0] == pytest.approx(0.75)
    policy.failed(3)
    weights = before * np.where(np.arange(1, 9) <= 3, 0.5, 1.0)
    assert policy.belief == pytest.approx(weights / weights.sum())


@pytest.mark.parametrize(
    ("text", "sound", "wrong"),
    [
        ("x = 1\ny = ", 6, False),
        ("def f(a,\n", 9, False),
        ("if x:\n    y = 1\n", 16, False),
        ("try:\n    x = 1\n", 15, False),
        ('s = """\n', 8, False),
        ("x = = 1\n", 0, True),
        ("x = 1\n  y = 2\n", 0, True),
        ("x = (1]\n", 0, True),
        ("x = \0\n", 0, True),
        ("", 0, False),
    ],
)
def test_python_lines(text: str, sound: int, wrong: bool) -> None:
    verdict = python_checker(text)
    assert (verdict.sound, bool(verdict.error)) == (sound, wrong)


@pytest.mark.parametrize("policy", [Backwards, lambda: TokenCost(MOST, 4.0)])
@pytest.mark.parametrize("mends", [True, False])
def test_a_model_that_makes_a_known_mistake(
    codec: TextCodec, policy: Callable[[], RollbackPolicy], mends: bool
) -> None:
    """It writes the mistake unless its first token may not come; or writes it always."""
    good, bad, rest = "a = 1\nb = 2\n", "c = = 3\n", "d = 4\n"
    mended = "e = 3\n"
    asked: list[GenerateRequest] = []

    def script(request: GenerateRequest) -> list[Delta]:
        asked.append(request)
        forbidden = {word[-1] for word in request.sampling.bad_words}
        wrong = codec.encode(good, "prompt"), codec.encode(bad, "prompt"), codec.encode(rest, "prompt")
        right = codec.encode(mended, "prompt")
        emitted = list(request.emitted)
        tokens = [token for part in wrong for token in part]
        if mends and forbidden and emitted == wrong[0][: len(emitted)]:
            tokens = [*wrong[0], *right, *wrong[2]]
        return [delta for token in tokens[len(emitted) :] for delta in deltas((token,), EndReason.NONE)] + deltas(
            (), EndReason.STOP
        )

    generator = FakeGenerator(script)
    app = build_app(IngressSettings(("tiny",), CONTEXT), codec, generator, Metrics(), FakeFleet())
    with HttpServer(app) as server, connect(server.url) as handle:
        answer = handle.rewindable("write", max_tokens=100)
        found = generate_checked(answer, python_checker, policy(), most_rollbacks=3)
    if mends:
        assert found.text == good + mended + rest
        assert (found.error, found.rollbacks) == ("", 1)
        assert asked[1].emitted == tuple(codec.encode(good, "prompt"))[: len(asked[1].emitted)]
        assert asked[1].emitted
    else:
        assert found.error
        assert found.rollbacks == 3
        assert len(asked) == 4
    assert found.tokens_taken_back > 0
