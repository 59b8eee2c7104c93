"""PiSSA against peft: the same start, outputs, gradients and training, with and without peft's scale alpha / r."""

import copy

import pytest
import torch
from torch import nn

import benchtop as bt

PEER = "peft 0.21, lora.Linear with init_lora_weights='pissa'; its LoRA start"
WHAT = "initial product and residual, forward, gradients, five steps of Adam; alpha as a learning rate"

peft = pytest.importorskip("peft")
pissa = bt.technique("pissa")

M, N, R = 12, 8, 3


@pytest.fixture
def linear():
    """Weights that float32 can hold: peft makes its start in float32 only."""
    torch.manual_seed(0)
    return nn.Linear(M, N).float()


def theirs(linear: nn.Linear, alpha: int = R, start="pissa") -> nn.Module:
    """The layer that peft makes of a copy of ``linear``, in float64."""
    model = nn.Sequential(copy.deepcopy(linear))
    config = peft.LoraConfig(r=R, lora_alpha=alpha, target_modules=["0"], init_lora_weights=start)
    return peft.get_peft_model(model, config).base_model.model[0].double()


def ours(peer: nn.Module) -> nn.Module:
    """Our layer with the factors of the peer: singular vectors are unique up to their signs, and to float32 there."""
    layer = pissa.PiSSALinear(nn.Linear(M, N), R)
    scale = peer.scaling["default"]
    with torch.no_grad():
        layer.A.copy_(scale**0.5 * peer.lora_A["default"].weight.T)
        layer.B.copy_(scale**0.5 * peer.lora_B["default"].weight.T)
        layer.W_res.copy_(peer.base_layer.weight.T)
        layer.bias.copy_(peer.base_layer.bias)
    return layer


def train(layer: nn.Module, batches: list, lr: float, steps: int = 5) -> list[torch.Tensor]:
    adam = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=lr, eps=1e-30)
    outputs = []
    for x, y in batches[:steps]:
        adam.zero_grad()
        (layer(x) - y).square().mean().backward()
        adam.step()
        outputs.append(layer(x).detach())
    return outputs


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(7, M, generator=generator), torch.randn(7, N, generator=generator)) for _ in range(5)]


def test_the_start_is_the_same(linear, agree):
    peer, layer = theirs(linear), pissa.PiSSALinear(copy.deepcopy(linear).double(), R)
    agree(layer.A @ layer.B, (peer.lora_B["default"].weight @ peer.lora_A["default"].weight).T)
    agree(layer.W_res, peer.base_layer.weight.T)
    signs = (layer.A * peer.lora_A["default"].weight.T).sum(0).sign()
    agree(layer.A * signs, peer.lora_A["default"].weight.T)
    agree(layer.B * signs[:, None], peer.lora_B["default"].weight.T)


def test_forward_and_gradients(linear, batches, agree):
    peer = theirs(linear)
    layer, (x, y) = ours(peer), batches[0]
    agree(layer(x), peer(x))
    for one in (layer, peer):
        (one(x) - y).square().mean().backward()
    agree(layer.A.grad, peer.lora_A["default"].weight.grad.T)
    agree(layer.B.grad, peer.lora_B["default"].weight.grad.T)


def test_training(linear, batches, agree):
    peer = theirs(linear)
    for mine, his in zip(train(ours(peer), batches, lr=1e-2), train(peer, batches, lr=1e-2)):
        agree(mine, his)


def test_alpha_is_a_learning_rate(linear, batches, agree):
    """Scale c at learning rate lr trains like scale 1 at lr sqrt(c): Adam does not see the size of a gradient."""
    peer = theirs(linear, alpha=4 * R)
    agree(ours(peer)(batches[0][0]), linear.double()(batches[0][0]))
    for mine, his in zip(train(ours(peer), batches, lr=2e-2), train(peer, batches, lr=1e-2)):
        agree(mine, his)


def test_lora_trains_the_same(linear, batches, agree):
    peer = theirs(linear, start=True)
    layer = pissa.LoRALinear(copy.deepcopy(linear).double(), R)
    with torch.no_grad():
        layer.A.copy_(peer.lora_A["default"].weight.T)
    agree(layer.B, peer.lora_B["default"].weight.T)
    bound = M**-0.5
    assert peer.lora_A["default"].weight.abs().max() <= bound  # the same Kaiming-uniform range as ours
    assert pissa.LoRALinear(copy.deepcopy(linear).double(), R).A.abs().max() <= bound
    for mine, his in zip(train(layer, batches, lr=1e-2), train(peer, batches, lr=1e-2)):
        agree(mine, his)
