"""An expert read by itself is the one that a whole load fuses, in either form of checkpoint and for every cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.workers.errors import ModelError
from penstock.workers.model.checkpoint_experts import CheckpointExperts
from penstock.workers.model.expert_layers import ExpertLayers
from penstock.workers.model.families import ExpertNames
from penstock.workers.parallel.shards import TensorShard

EXPERTS, WIDTH, HIDDEN = 3, 8, 5
HOW = ExpertLayers(
    layers=(False, True, False, True),
    count=EXPERTS,
    top_k=1,
    width=WIDTH,
    renormalize=False,
    shared_width=0,
    names=ExpertNames("block_sparse_moe.", "w1", "w3", "w2"),
)


class Tensors:
    """A checkpoint in memory."""

    source = Path("memory")

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self.tensors:
            raise ModelError(f"{name}: missing", "memory")
        assert self.tensors[name].shape == shape
        return self.tensors[name]

    def take(self, name: str, part: torch.Tensor) -> torch.Tensor:
        assert part.untyped_storage().data_ptr() == self.tensors[name].untyped_storage().data_ptr()
        return part.clone()


def parts_of(layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(10 * layer + expert)
    return tuple(torch.randn(*shape, generator=chance) for shape in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)))


def single() -> Tensors:
    names = {}
    for number in (1, 3):
        for expert in range(EXPERTS):
            prefix = f"model.layers.{number}.block_sparse_moe.experts.{expert}."
            for name, tensor in zip(("w1", "w3", "w2"), parts_of(number, expert), strict=True):
                names[f"{prefix}{name}.weight"] = tensor
    return Tensors(names)


def stacked() -> Tensors:
    names = {}
    for number in (1, 3):
        every = [parts_of(number, expert) for expert in range(EXPERTS)]
        prefix = f"model.layers.{number}.mlp.experts."
        names[f"{prefix}gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in every])
        names[f"{prefix}down_proj"] = torch.stack([down for _, _, down in every])
    return Tensors(names)


@pytest.mark.parametrize("form", [single, stacked])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_parts_of_every_rank_are_the_expert(form: Any, width: int) -> None:
    checkpoint = form()
    for layer, number in enumerate((1, 3)):
        for expert in range(EXPERTS):
            gate, up, down = parts_of(number, expert)
            ranks = [
                CheckpointExperts(HOW, HIDDEN, checkpoint, torch.float32, TensorShard(rank, width)).read(layer, expert)
                for rank in range(width)
            ]
            own = WIDTH // width
            torch.testing.assert_close(torch.cat([part[:own] for part, _ in ranks]), gate)
            torch.testing.assert_close(torch.cat([part[own:] for part, _ in ranks]), up)
            torch.testing.assert_close(torch.cat([part for _, part in ranks], dim=1), down)


def test_dtype_and_bounds() -> None:
    experts = CheckpointExperts(HOW, HIDDEN, single(), torch.bfloat16, TensorShard())  # type: ignore[arg-type]
    assert {tensor.dtype for tensor in experts.read(0, 2)} == {torch.bfloat16}
    assert experts.has(1, 2)
    assert not experts.has(2, 0)
    assert not experts.has(0, 3)


def test_a_missing_tensor_is_named() -> None:
    checkpoint = single()
    del checkpoint.tensors["model.layers.3.block_sparse_moe.experts.1.w2.weight"]
    experts = CheckpointExperts(HOW, HIDDEN, checkpoint, torch.float32, TensorShard())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"layers\.3\..*w2"):
        experts.read(1, 1)
