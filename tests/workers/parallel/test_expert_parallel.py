"""Experts over ranks against one rank that holds them all; placements that change while steps run; ranks that go."""

import dataclasses

import numpy as np
import pytest
import torch
from fakes.expert_group import (
    SHAPE,
    ExpertThreads,
    all_weights,
    fails_with_group_error,
    routed,
)

from penstock.kernels import ops
from penstock.workers.errors import ConfigError, ExpertsGoneError, IntegrityError
from penstock.workers.parallel import expert_rebalancing
from penstock.workers.parallel.expert_load import skew
from penstock.workers.parallel.expert_losses import LossPolicy
from penstock.workers.parallel.expert_moves import hosted_experts
from penstock.workers.parallel.expert_parallel import ExpertPolicy
from penstock.workers.parallel.expert_planner import PlacementLimits, first_placement
from penstock.workers.parallel.expert_weights import HostExperts

EVEN = torch.ones(SHAPE.num_experts)
POWER_LAW = torch.arange(1, SHAPE.num_experts + 1, dtype=torch.float64).pow(-1.2).float()
TWO_COPIES = ExpertPolicy(PlacementLimits(slots_per_rank=4), rebalance_steps=0)
SIX = dataclasses.replace(SHAPE, num_experts=6)  # three of four ranks have slots for two copies of each
ONE_COPY = ExpertPolicy(PlacementLimits(slots_per_rank=4, least_copies=1), rebalance_steps=0)


class Group(ExpertThreads):
    """Steps with tokens drawn per rank and step, each checked against the single rank."""

    def step(self, sequence, *, tokens=(5, 0, 3, 1), chosen=2, shares=None, members=None, layers=None, check=True):
        return self.each(
            lambda rank: self.one_step(rank, sequence, tokens[rank], chosen, shares, layers, check),
            members or tuple(self.ranks),
        )

    def one_step(self, rank, sequence, tokens, chosen, shares, layers, check):
        experts = self.ranks[rank]
        experts.begin_step(sequence)
        chance = torch.Generator().manual_seed(1000 * sequence + rank)
        worst = 0.0
        for layer in layers or range(self.shape.num_layers):
            x = torch.randn(tokens, self.shape.inputs, generator=chance).to(self.shape.dtype)
            ids, gates = routed(chance, tokens, chosen, EVEN[: self.shape.num_experts] if shares is None else shares)
            y = experts.forward(layer, x, ids, gates)
            if check and tokens:
                expected = ops.fused_moe(x, self.whole[layer], ids, gates)
                worst = max(worst, float((y - expected).abs().max()))
                assert y.dtype == expected.dtype
        experts.end_step()
        return worst

    def pump_until(self, wanted, most=400):
        for _ in range(most):
            self.each(lambda rank: self.ranks[rank].pump(), tuple(self.ranks))
            if wanted(self.ranks[0]):
                return
            for experts in self.ranks.values():
                if experts._round is not None:
                    experts._round.wait(0.02)
        raise AssertionError("the round did not come to its end")


@pytest.fixture
def make_group():
    made = []

    def make(*args, **kwargs):
        made.append(Group(*args, **kwargs))
        return made[-1]

    yield make
    for group in made:
        group.close()


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("policy", [TWO_COPIES, dataclasses.replace(ONE_COPY, limits=PlacementLimits(8, 1))])
def test_outputs_equal_the_single_rank(make_group, width, policy):
    slots = 8 if width == 1 else policy.limits.slots_per_rank * 2 // min(width, 2)
    limits = dataclasses.replace(policy.limits, slots_per_rank=slots)
    group = make_group(width, dataclasses.replace(policy, limits=limits))
    for sequence in range(6):
        for shares in (EVEN, POWER_LAW):
            worst = max(group.step(sequence, shares=shares, chosen=1 + sequence % 3))
            # Every product and every order of additions is the same; only the fusing of the last add may differ.
            assert worst <= 1e-6, sequence
    assert group.ranks[0].rank_rows().sum() > 0


def test_bfloat16_is_the_single_rank_up_to_rounding(make_group):
    group = make_group(2, ONE_COPY, dataclasses.replace(SHAPE, dtype=torch.bfloat16))
    assert max(group.step(0, tokens=(7, 2))) <= 0.05


def test_a_step_without_tokens_and_choices_of_no_expert(make_group):
    group = make_group(2, ONE_COPY)
    assert group.step(0, tokens=(0, 0)) == [0.0, 0.0]

    def none_chosen(rank):
        experts = group.ranks[rank]
        experts.begin_step(1)
        gates = torch.full((3, 2), float("nan"))
        return experts.forward(0, torch.randn(3, 32), torch.full((3, 2), -1), gates)

    assert all(torch.equal(y, torch.zeros(3, 32)) for y in group.each(none_chosen))


def test_a_ranks_own_rows_never_enter_the_collectives(make_group):
    group = make_group(2, dataclasses.replace(TWO_COPIES, limits=PlacementLimits(8)))  # both hold all
    sent = []
    for experts in group.ranks.values():
        inner = experts._exchange._collectives
        whole = inner.all_to_all
        inner.all_to_all = lambda rows, to, come, whole=whole: (sent.append(len(rows)), whole(rows, to, come))[1]
    group.step(0, tokens=(6, 6))
    # Each copy is to compute half of an expert's rows: what is over of one side's fills the other's.
    assert sum(sent) <= 2 * 2 * SHAPE.num_experts * 2
    sent.clear()
    only_first = torch.zeros(SHAPE.num_experts)
    only_first[:2] = 1.0
    group.step(1, tokens=(6, 6), shares=only_first)
    assert sum(sent) == 0, "even loads stay at home"


def test_ranks_that_disagree_stop_before_rows_travel(make_group):
    group = make_group(2, ONE_COPY)
    group.ranks[1]._sequence = 5

    def step(rank):
        with pytest.raises(IntegrityError, match=r"different steps: \[0, 5\]"):
            group.ranks[rank].forward(0, torch.randn(1, 32), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))

    group.each(step)


def test_too_few_slots_are_refused_with_the_numbers(make_group):
    with pytest.raises(ConfigError, match="8 experts do not fit 2 ranks with 3 slots a layer: 4 slots on each"):
        make_group(2, ExpertPolicy(PlacementLimits(3)))


def test_rebalancing_while_steps_run(make_group):
    policy = ExpertPolicy(PlacementLimits(slots_per_rank=5, least_copies=1), rebalance_steps=40, half_life_steps=30)
    shape = dataclasses.replace(SHAPE, num_layers=3, num_experts=16)
    shares = torch.arange(1, 17, dtype=torch.float64).pow(-1.2).float()
    group = make_group(4, policy, shape, sources=None)
    measured, generations = [], set()
    for sequence in range(200):
        assert max(group.step(sequence, tokens=(16, 16, 16, 16), shares=shares, check=sequence % 10 == 0)) <= 1e-6
        measured.append(skew(group.ranks[0].rank_rows()))
        generations.add(group.ranks[0].placement.generation)
        assert len({experts.placement.generation for experts in group.ranks.values()}) == 1
    assert measured[39] > 1.5
    assert measured[-1] <= 1.2
    assert len(generations) >= 2
    for experts in group.ranks.values():
        experts.placement.check_integrity()


def test_a_lost_rank_with_copies_elsewhere_costs_nothing_but_the_step(make_group):
    group = make_group(4, TWO_COPIES, SIX)
    group.step(0)
    group.lose(2)
    assert all(
        group.each(
            lambda rank: fails_with_group_error(lambda: group.one_step(rank, 1, 4, 2, EVEN[:6], None, True)), (0, 1, 3)
        )
    )
    group.regroup((0, 1, 3), 1)
    assert group.ranks[0].gone == ()
    for sequence in range(1, 30):
        assert max(group.step(sequence, members=(0, 1, 3))) <= 1e-6
    # The copies that were lost are made good elsewhere, where slots allow two of each.
    placement = group.ranks[0].placement
    assert placement.generation > 0
    assert (placement.holders().sum(axis=2) >= 2).all()
    assert (placement.slots[:, 2] == -1).all()
    assert max(group.step(30, members=(0, 1, 3))) <= 1e-6


def hosts_of(num_ranks, copies, limits, shape=SHAPE):
    """Sources that hold what a rank starts with and, in host memory, `copies` of every expert over the ranks."""
    whole = all_weights(shape)
    hosted = hosted_experts(shape.num_experts, num_ranks, copies)
    placed = first_placement(shape.num_layers, shape.num_experts, num_ranks, limits).holders()

    def source(rank):
        own = HostExperts()
        for layer in range(shape.num_layers):
            for expert in np.flatnonzero(hosted[:, rank] | placed[layer][:, rank]).tolist():
                own.add(layer, expert, *whole.read(layer, expert))
        return own

    return source


def test_without_a_copy_the_gone_are_named_refused_and_refilled(make_group, caplog):
    group = make_group(2, ONE_COPY)
    held = group.ranks[1].placement.holders()[0]
    only_there = np.flatnonzero(held[:, 1] & ~held[:, 0]).tolist()
    group.lose(1)
    group.regroup((0,), 1)
    experts = group.ranks[0]
    assert experts.gone == tuple((layer, expert) for layer in range(2) for expert in only_there)
    assert f"layer 0: experts {', '.join(map(str, only_there))}" in caplog.text
    one = torch.tensor([[only_there[0]]])
    with pytest.raises(ExpertsGoneError, match=f"layer 1: expert {only_there[0]}") as caught:
        experts.forward(1, torch.randn(1, 32), one, torch.ones(1, 1))
    assert caught.value.experts == ((1, only_there[0]),)
    group.pump_until(lambda rank: not rank.gone)  # from host memory; it takes more slots than before
    assert max(group.step(1, members=(0,))) <= 1e-6


def test_degraded_steps_leave_out_what_is_gone(make_group):
    policy = dataclasses.replace(ONE_COPY, losses=LossPolicy.DEGRADE)
    group = make_group(2, policy)
    held = group.ranks[1].placement.holders()[0]
    gone, kept = int(np.flatnonzero(held[:, 1])[0]), int(np.flatnonzero(held[:, 0])[0])
    group.lose(1)
    group.regroup((0,), 1)
    experts = group.ranks[0]
    x, ids = torch.randn(2, 32), torch.tensor([[gone, kept], [gone, gone]])
    y = experts.forward(0, x, ids, torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    expected = ops.fused_moe(x[:1], group.whole[0], ids[:1, 1:], torch.ones(1, 1))
    assert torch.allclose(y[:1], expected, atol=1e-6)
    assert torch.equal(y[1], torch.zeros(32))
    assert experts.degraded_rows == 3


def test_weights_come_from_other_ranks_when_the_own_host_has_none(make_group):
    """Each expert in host memory of two ranks of three; one lost rank's experts reach those that host them not."""
    group = make_group(4, ONE_COPY, SHAPE, hosts_of(4, 2, ONE_COPY.limits))
    group.lose(3)
    group.regroup((0, 1, 2), 1)
    group.pump_until(lambda experts: not experts.gone and not experts._mend and experts._round is None)
    for sequence in range(1, 4):
        assert max(group.step(sequence, members=(0, 1, 2))) <= 1e-6


def test_a_restarted_rank_joins_without_stopping_the_others_for_weights(make_group):
    group = make_group(4, TWO_COPIES)
    group.step(0)
    group.lose(2)
    group.regroup((0, 1, 3), 1)
    group.step(1, members=(0, 1, 3))
    group.regroup((0, 1, 2, 3), 2, joins=(2,))
    assert (group.ranks[2].placement.slots[:, 2] == -1).all()
    assert max(group.step(2)) <= 1e-6
    group.pump_until(lambda experts: (experts.placement.slots[:, 2] >= 0).all())
    assert max(group.step(3)) <= 1e-6
    assert (group.ranks[0].placement.holders().sum(axis=2) >= 2).all()


def test_a_round_that_fails_anywhere_is_given_up_everywhere(make_group, caplog):
    group = make_group(4, TWO_COPIES, SIX, hosts_of(4, 1, TWO_COPIES.limits, SIX))
    group.lose(3)
    group.regroup((0, 1, 2), 1)
    slots = {rank: experts._slots for rank, experts in group.ranks.items()}
    packs = {rank: held.pack for rank, held in slots.items()}

    def no_room(row):
        raise MemoryError("no room for an expert")

    for held in slots.values():
        held.pack = no_room
    group.pump_until(lambda experts: experts._failed_rounds == 1)
    assert {experts._failed_rounds for experts in group.ranks.values()} == {1}
    assert "no room for an expert" in caplog.text
    assert max(group.step(1, members=(0, 1, 2))) <= 1e-6
    for rank, held in slots.items():
        held.pack = packs[rank]
    group.pump_until(lambda experts: experts.placement.generation > 0)
    assert max(group.step(2, members=(0, 1, 2))) <= 1e-6


def test_weights_damaged_on_their_way_are_not_used(make_group, monkeypatch, caplog):
    group = make_group(4, TWO_COPIES, SIX, hosts_of(4, 1, TWO_COPIES.limits, SIX))
    group.lose(3)
    group.regroup((0, 1, 2), 1)
    carried = expert_rebalancing._digest
    counter = iter(range(10**6))
    monkeypatch.setattr(expert_rebalancing, "_digest", lambda row: carried(row) + next(counter))
    group.pump_until(lambda experts: experts._failed_rounds == 3)
    assert "arrived damaged from" in caplog.text
    # Three in a row, and nothing more is tried until ranks leave or come; steps go on.
    group.each(lambda rank: group.ranks[rank].pump(), (0, 1, 2))
    assert group.ranks[0]._round is None
    assert max(group.step(3, members=(0, 1, 2))) <= 1e-6
