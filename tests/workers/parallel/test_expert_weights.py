"""Slots: weights survive their way bit for bit, change only in a switch, and a wrong switch is refused whole."""

import dataclasses

import numpy as np
import pytest
import torch
from fakes.expert_group import SHAPE, all_weights

from penstock.kernels import ops
from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.expert_weights import ExpertSlots, HostExperts

START = np.array([[0, 1, -1], [2, 3, 4]], dtype=np.int32)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64])
def shape(request):
    return dataclasses.replace(SHAPE, dtype=request.param)


def one_row(slots, shape, layer, expert):
    place = int(slots.places(layer)[expert])
    x = torch.ones(1, shape.inputs, dtype=shape.dtype)
    return ops.fused_moe(x, slots.packed(layer), torch.tensor([[place]]), torch.ones(1, 1))


def test_a_row_goes_from_slots_to_slots_bit_for_bit(shape):
    weights = all_weights(shape)
    giver = ExpertSlots(shape, weights, START)
    taker = ExpertSlots(shape, HostExperts(), np.full_like(START, -1))
    giver._source = HostExperts()  # only its slots are left
    wanted = np.array([[-1, 0, -1], [4, -1, -1]], dtype=np.int32)
    staged = {(0, 1): (0, taker.pack(giver.row(0, 0))), (1, 0): (4, taker.pack(giver.row(1, 4)))}
    taker.switch(wanted, staged)
    assert torch.equal(taker.row(0, 0), giver.row(0, 0))
    assert torch.equal(one_row(taker, shape, 1, 4), one_row(giver, shape, 1, 4))
    gate_up, down = weights.read(0, 0)
    assert torch.equal(taker.row(0, 0), torch.cat([gate_up.reshape(-1), down.reshape(-1)]))
    with pytest.raises(IntegrityError, match="expert 5 of layer 1 was asked of a rank that does not have it"):
        taker.row(1, 5)


def test_what_stays_keeps_its_slot_and_more_slots_can_be_had(shape):
    slots = ExpertSlots(shape, all_weights(shape), START)
    before = one_row(slots, shape, 1, 3)
    wider = np.array([[0, 1, -1, 7, -1], [-1, 3, 6, -1, 5]], dtype=np.int32)
    staged = {
        (layer, slot): (expert, slots.pack(slots.row(layer, expert)))
        for layer, slot, expert in ((0, 3, 7), (1, 2, 6), (1, 4, 5))
    }
    slots.switch(wider, staged)
    assert slots.packed(1).num_experts == 5
    assert slots.places(1).tolist() == [-1, -1, -1, 1, -1, 4, 2, -1]
    assert torch.equal(one_row(slots, shape, 1, 3), before)
    fresh = ExpertSlots(shape, all_weights(shape), wider)
    for layer, expert in ((0, 0), (0, 7), (1, 6), (1, 5)):
        assert torch.equal(one_row(slots, shape, layer, expert), one_row(fresh, shape, layer, expert))


def test_a_switch_without_its_weights_changes_nothing():
    slots = ExpertSlots(SHAPE, all_weights(), START)
    wanted = START.copy()
    wanted[0, 0], wanted[1, 0] = 5, 6
    staged = {(0, 0): (5, slots.pack(slots.row(0, 5))), (1, 0): (7, slots.pack(slots.row(1, 7)))}
    with pytest.raises(IntegrityError, match="expert 6 of layer 1 is not staged for slot 0"):
        slots.switch(wanted, staged)
    assert np.array_equal(slots.slots, START)
    assert int(slots.places(0)[0]) == 0
    with pytest.raises(IntegrityError, match="2 slots a layer where there are 3"):
        slots.switch(START[:, :2], {})
