"""Lottery tickets against torch.nn.utils.prune: the same masks round by round, outputs, gradients and training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import benchtop as bt

PEER = "torch.nn.utils.prune, l1_unstructured; rewinding re-derived as a loop over connections"
WHAT = "masks of three rounds and of one shot, forward, gradients, five steps of Adam, rewound weights"

lottery = bt.technique("lottery-ticket")

P = 0.36


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))


def ours(peer: nn.Sequential) -> nn.Sequential:
    """Our layers with the numbers of unpruned plain ones."""
    net = copy.deepcopy(peer)
    for i in (0, 2, 4):
        net[i] = lottery.MaskedLinear(peer[i].in_features, peer[i].out_features)
        net[i].load_state_dict(peer[i].state_dict() | {"mask": torch.ones_like(peer[i].weight)})
    return net


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(11, 7, generator=generator), torch.randn(11, 4, generator=generator)) for _ in range(5)]


def train(net: nn.Module, batches: list) -> nn.Module:
    adam = torch.optim.Adam(net.parameters(), lr=1e-2, eps=1e-30)
    for x, y in batches:
        adam.zero_grad()
        (net(x) - y).square().mean().backward()
        adam.step()
    return net


def cut(net: nn.Sequential, rounds: int = 1) -> nn.Sequential:
    """The peer prunes its trained layers in place: the output layer at half the rate."""
    for i, rate in ((0, P), (2, P), (4, P / 2)):
        prune.l1_unstructured(net[i], "weight", 1 - (1 - rate) ** rounds)
    return net


def rewound(net: nn.Sequential, first: nn.Sequential) -> nn.Sequential:
    """The peer's masks over its first weights, one connection after the other."""
    with torch.no_grad():
        for i in (0, 2, 4):
            for row, column in torch.cartesian_prod(*map(torch.arange, first[i].weight.shape)).tolist():
                kept = net[i].weight_mask[row, column] == 1
                net[i].weight_orig[row, column] = first[i].weight[row, column] if kept else 0.0
            net[i].bias.copy_(first[i].bias)
    return net


def same(mine: nn.Sequential, his: nn.Sequential, agree) -> None:
    for i in (0, 2, 4):
        assert torch.equal(mine[i].mask, his[i].weight_mask)
        agree(mine[i].weight, his[i].weight_orig)
        agree(mine[i].bias, his[i].bias)


def test_rounds_of_train_prune_rewind(batches, agree):
    first = plain()
    peer = copy.deepcopy(first)
    tickets = lottery.search({5: ours(first)}, lambda nets, k: {5: train(copy.deepcopy(nets[5]), batches)}, P, 3)
    for ticket in tickets[1:]:
        peer = rewound(cut(train(peer, batches)), first)
        same(ticket[5], peer, agree)
    assert 0 < tickets[3][5][0].mask.mean() < 0.3  # something is left, most is gone


def test_forward_gradients_and_training_of_a_ticket(batches, agree):
    first = plain()
    his = cut(copy.deepcopy(first))
    mine = lottery.subnetwork(ours(first), lottery.pruned(ours(first), P))
    agree(mine(batches[0][0]), his(batches[0][0]))
    for net in (mine, his):
        net(batches[0][0]).square().mean().backward()
    for i in (0, 2, 4):
        agree(mine[i].weight.grad, his[i].weight_orig.grad)
        assert not mine[i].weight.grad[mine[i].mask == 0].any()
    mine, his = train(mine, batches), train(his, batches)
    for x, _ in batches:
        agree(mine(x), his(x))


def test_one_shot(batches):
    first = train(plain(), batches)
    his = cut(copy.deepcopy(first), rounds=4)
    for mask, i in zip(lottery.pruned(ours(first), P, rounds=4), (0, 2, 4)):
        assert torch.equal(mask, his[i].weight_mask)
