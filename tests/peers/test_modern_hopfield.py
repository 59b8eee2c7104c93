"""The modern Hopfield network against PyTorch's attention, and against a re-derivation in plain loops."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import benchtop as bt

PEER = "torch.nn.MultiheadAttention and scaled_dot_product_attention; naive re-derivation: energies and bound in loops"
WHAT = "update, energy, binary flips, separation and bound; pooling: forward, gradients, five steps of SGD"

technique = bt.technique("modern-hopfield")


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_update_is_dot_product_attention(agree):
    X, xi = rand(3, 11, 6), rand(3, 4, 6)
    for beta in (0.1, 6**-0.5, 3.0):
        agree(technique.update(X, xi, beta), F.scaled_dot_product_attention(xi, X, X, scale=beta))


def test_update_and_its_gradient_in_loops(agree):
    X, xi, beta = rand(7, 5).requires_grad_(), rand(1, 5).requires_grad_(), 0.7
    weights = [math.exp(beta * float(x @ xi.detach()[0])) for x in X.detach()]
    naive = sum(w / sum(weights) * x for w, x in zip(weights, X.detach()))
    ours = technique.update(X, xi, beta)
    agree(ours[0], naive)
    (gradient,) = torch.autograd.grad(ours.sum(), xi)
    p = torch.tensor(weights) / sum(weights)  # Jacobian: beta X^T (diag p - p p^T) X
    jacobian = beta * X.detach().T @ (p.diag() - torch.outer(p, p)) @ X.detach()
    agree(gradient[0], jacobian.sum(0))


def test_energy_in_loops(agree):
    X, xi, beta = rand(7, 5), rand(3, 5), 1.3
    longest = max(float(x @ x) for x in X)
    naive = [
        -math.log(sum(math.exp(beta * float(x @ state)) for x in X) / len(X)) / beta
        + float(state @ state) / 2
        + longest / 2
        for state in xi
    ]
    agree(technique.energy(X, xi, beta), torch.tensor(naive))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_binary_update_takes_the_state_of_lower_energy(agree, n):
    X, xi = rand(6, 10).sign(), rand(5, 10).sign()
    naive = xi.clone()
    for s in range(len(xi)):
        for k in range(xi.shape[1]):
            energies = []
            for value in (-1.0, 1.0):
                state = xi[s].clone()
                state[k] = value
                energies.append(-sum(float(x @ state) ** n for x in X))
            if energies[0] != energies[1]:
                naive[s, k] = -1.0 if energies[0] < energies[1] else 1.0
    agree(technique.binary_update(X, xi, n), naive)


def test_separation_and_bound_in_loops(agree):
    X, beta, r = rand(6, 4), 0.9, 0.3
    deltas = [float(X[i] @ X[i]) - max(float(X[i] @ X[j]) for j in range(6) if j != i) for i in range(6)]
    longest = math.sqrt(max(float(x @ x) for x in X))
    agree(technique.separation(X), torch.tensor(deltas))
    naive = [2 * 5 * longest * math.exp(-beta * (delta - 2 * longest * r)) for delta in deltas]
    agree(technique.error_bound(X, beta, r), torch.tensor(naive))


def test_constant_solves_its_equation():
    """c = b / W(e^(a + ln b)) means b / c e^(b / c) = b e^a; no Lambert function is needed to see it."""
    for d, beta, K, p in ((20, 1, 3, 0.001), (75, 1, 1, 0.001), (50, 2, 1.5, 0.1)):
        a = 2 / (d - 1) * (1 + math.log(2 * beta * K**2 * p * (d - 1)))
        b = 2 * K**2 * beta / 5
        w = b / technique.capacity_constant(d, beta, K, p)
        assert math.isclose(w * math.exp(w), b * math.exp(a), rel_tol=1e-9)


def pools(d=6):
    """Our pooling with random weights, and PyTorch's attention with the same ones behind its own normalisation."""
    ours = technique.HopfieldPooling(d, d)
    with torch.no_grad():
        for k, parameter in enumerate(ours.parameters()):
            parameter.copy_(rand(*parameter.shape, k + 1)[..., 0])
    theirs = nn.MultiheadAttention(d, 1, batch_first=True)
    layers = (ours.W_Q, ours.W_K, ours.W_V)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        theirs.out_proj.weight.copy_(ours.W_O.weight)
        theirs.out_proj.bias.copy_(ours.W_O.bias)
    rest = nn.ParameterDict({"R": ours.R.detach().clone()})
    norms = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)])
    for norm, own in zip(norms, (ours.norm_R, ours.norm_K, ours.norm_V)):
        norm.load_state_dict(own.state_dict())

    def forward(Y):
        state = rest["R"].expand(len(Y), 1, d)
        return theirs(norms[0](state), norms[1](Y), norms[2](Y), need_weights=False)[0][:, 0]

    return ours, forward, [theirs, rest, norms]


def test_pooling_is_multihead_attention_with_a_learned_query(agree):
    ours, theirs, modules = pools()
    Y, target = rand(4, 9, 6), rand(4, 6)
    mine = torch.optim.SGD(ours.parameters(), lr=0.01)
    peer = torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.01)
    for _ in range(5):
        out, expected = ours(Y), theirs(Y)
        agree(out, expected)
        for optimiser, value in ((mine, out), (peer, expected)):
            optimiser.zero_grad()
            ((value - target) ** 2).mean().backward()
        agree(
            torch.cat([ours.W_Q.weight.grad, ours.W_K.weight.grad, ours.W_V.weight.grad]),
            modules[0].in_proj_weight.grad,
        )
        agree(ours.R.grad, modules[1]["R"].grad)
        mine.step()
        peer.step()
    agree(ours(Y), theirs(Y))
