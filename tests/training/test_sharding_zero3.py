"""When a divided block is whole: while it computes, forward and backward, and at no other time. Weights are put away and fetched here by the
test itself; DeepSpeed, which does it over processes, is tried in `test_sharding.py` and `test_several_processes.py` (`pytest -m deepspeed`)."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from finetune.families.checkpointing import checkpoint_blocks
from finetune.training.sharding_zero3 import DividedBlock


class LooksAgain(torch.autograd.Function):
    """A product that keeps nothing of its weight, and looks at the layer again for the backward pass."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x @ layer.weight.t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.layer.weight, None


class Block(nn.Module):
    """Frozen products, a norm and a parameter of its own; trained at the side. Called with keywords, gives two tensors."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second, self.third = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8, bias=False)
        self.table = nn.Parameter(torch.randn(8))
        self.requires_grad_(False)
        self.side = nn.Linear(8, 8)

    def forward(self, states, *, other):
        inner = self.second(self.first(self.norm(states) * self.table).sin())
        return states + LooksAgain.apply(inner, self.third) + self.side(states), other + inner


class Shelf:
    """Puts weights away; counts what is out, and sees whether somebody holds on to what was out."""

    def __init__(self):
        self.away, self.out, self.most, self.seen = {}, 0, 0, []

    def put(self, weights):
        for weight in weights:
            self.away[weight] = weight.detach().numpy().copy()
            weight.data = torch.empty(0)

    @contextmanager
    def gather(self, weights):
        assert all(weight.numel() == 0 for weight in weights)
        for weight in weights:
            copy = self.away[weight].copy()  # lives as long as a tensor that looks at it
            self.seen.append(weakref.ref(copy))
            weight.data = torch.from_numpy(copy)
        del copy
        self.out += 1
        self.most = max(self.most, self.out)
        yield
        for weight in weights:
            weight.data = torch.empty(0)
        self.out -= 1

    def held(self):
        return sum(reference() is not None for reference in self.seen)


def blocks_of_three(checkpointed):
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(3)).train()
    checkpoint_blocks(blocks, checkpointed)
    return blocks


def divided(checkpointed=0):
    blocks, shelf, together = blocks_of_three(checkpointed), Shelf(), []
    for block in blocks:
        weights = [parameter for parameter in block.parameters() if not parameter.requires_grad]
        DividedBlock(block, weights, shelf.gather, together)
        shelf.put(weights)
    return blocks, shelf


def run(blocks):
    states, other = torch.ones(2, 8).cumsum(0), torch.ones(2, 8)
    for block in blocks:
        states, other = block(states=states, other=other)
    return (states * other).square().mean()


@pytest.mark.parametrize("checkpointed", [0, 2, 3])
def test_gradients_are_those_of_whole_blocks_bit_for_bit(checkpointed):
    whole, (blocks, _) = blocks_of_three(checkpointed), divided(checkpointed)
    for _ in range(2):  # gradients add up over micro-batches
        run(whole).backward()
        run(blocks).backward()
    # Two passes in one gradient, as where captions of two lengths are predicted in groups: the blocks take turns.
    (run(whole) + run(whole).sin()).backward()
    (run(blocks) + run(blocks).sin()).backward()
    for one, other in zip(whole, blocks, strict=True):
        assert torch.equal(one.side.weight.grad, other.side.weight.grad) and one.side.weight.grad.any()


@pytest.mark.parametrize(("checkpointed", "needed"), [(0, 2), (2, 3), (3, 3)])
def test_one_block_is_whole_at_a_time_and_none_in_between(checkpointed, needed):
    blocks, shelf = divided(checkpointed)
    loss = run(blocks)
    assert (shelf.out, shelf.most, shelf.held()) == (0, 1, 0)
    loss.backward()
    assert (shelf.out, shelf.most, shelf.held()) == (0, 1, 0)
    assert len(shelf.seen) == (3 + needed) * 8  # what the first block trains depends on none of its weights


def test_without_gradients_a_block_is_whole_while_it_computes():
    blocks, shelf = divided()
    with torch.no_grad():
        assert run(blocks) == run(blocks_of_three(0))
    assert (shelf.out, shelf.most, shelf.held()) == (0, 1, 0)


def test_a_weight_that_is_only_looked_at_stays_where_it_is():
    """A process that asks for a format must not wait for the others, who do not."""
    blocks, shelf = divided()
    assert blocks[0].first.weight.dtype == torch.float32 and blocks[0].first.weight.numel() == 0
    assert [name for name, _ in blocks.named_parameters()] == [name for name, _ in blocks_of_three(0).named_parameters()]
    assert shelf.seen == []


def test_a_block_that_fails_is_let_go():
    blocks, shelf = divided()
    with pytest.raises(RuntimeError):
        blocks[0](states=torch.ones(2, 5), other=torch.ones(2, 5))
    assert shelf.out == 0
