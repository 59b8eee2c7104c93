"""Gradient noise against optax: the schedule, clipping before noise, gradients of the network, training steps."""

import itertools

import numpy as np
import pytest
import torch

import benchtop as bt

PEER = "optax 0.2, clip_by_global_norm, add_noise and sgd, on a network in jax"
WHAT = "standard deviation of the noise, clipped and noisy gradient, forward, gradients, six steps of SGD"

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
chapter = bt.technique("gradient-noise")

WIDTHS, LR, ETA, GAMMA, CLIP, KEY = [5, 8, 7, 3], 0.2, 0.3, 0.55, 0.05, 3


@pytest.fixture(autouse=True)
def double_precision():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def problem():
    """A network away from its start, and a batch."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = chapter.DeepNet(WIDTHS, "He")
    model.theta.data[0] += 0.1 * torch.randn(model.theta.shape[1], generator=generator)
    return model, torch.randn(9, WIDTHS[0], generator=generator), torch.arange(9) % WIDTHS[-1]


def logits(w, x):
    """The same network in jax: w is one vector, weights before biases."""
    for m, n in itertools.pairwise(WIDTHS):
        W, b, w = w[: m * n].reshape(m, n), w[m * n : m * n + n], w[m * n + n :]
        x = x @ W + b
        x = jax.nn.relu(x) if len(w) else x
    return x


def cross_entropy(w, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(w, x), y).mean()


def peer_noise(size: int, steps: int) -> list[torch.Tensor]:
    """The standard normal numbers that optax adds with this key: its noise on zero gradients, at variance 1."""
    noise = optax.add_noise(1.0, 0.0, KEY)
    state, drawn = noise.init(np.zeros(size)), []
    for _ in range(steps):
        xi, state = noise.update(np.zeros(size), state)
        drawn.append(torch.tensor(np.asarray(xi)))
    return drawn


def test_the_noisy_gradient(agree):
    """Norms above and below the bound; the noise of step t has the standard deviation of the schedule."""
    gradients = [torch.linspace(-1, 2, 50) * scale for scale in (1e-3, 1.0, 10.0, 1e-4)]
    peer = optax.chain(optax.clip_by_global_norm(CLIP), optax.add_noise(ETA, GAMMA, KEY))
    state = peer.init(np.zeros(50))
    for t, (g, xi) in enumerate(zip(gradients, peer_noise(50, 4))):
        theirs, state = peer.update(g.numpy(), state)
        agree(chapter.noisy(g, xi, t, ETA, GAMMA, CLIP), torch.tensor(np.asarray(theirs)))


def test_forward_and_gradients(problem, agree):
    model, x, y = problem
    w = model.theta.detach()[0].numpy()
    agree(model(x), torch.tensor(np.asarray(logits(w, x.numpy()))))
    xi = torch.linspace(-3, 3, len(w))
    loss = chapter.loss(model, (x, y, xi))
    loss.backward()
    value, gradient = jax.value_and_grad(cross_entropy)(w, x.numpy(), y.numpy())
    agree(loss, torch.tensor(float(value)))
    agree(model.theta.grad[0], torch.tensor(np.asarray(gradient)))
    agree(model.theta.grad[1], xi)


def test_training(problem, agree):
    model, x, y = problem
    w, steps = model.theta.detach()[0].numpy().copy(), 6
    peer = optax.chain(optax.clip_by_global_norm(CLIP), optax.add_noise(ETA, GAMMA, KEY), optax.sgd(LR))
    state, drawn = peer.init(w), peer_noise(len(w), steps)
    hyper = {name: torch.tensor(value) for name, value in dict(lr=LR, eta=ETA, gamma=GAMMA, c=CLIP).items()}
    for step, xi in enumerate(drawn, start=1):
        (grad,) = torch.autograd.grad(chapter.loss(model, (x, y, xi)), model.theta)
        model.theta.data, _ = chapter.noisy_sgd.update(model.theta.data, grad, (), hyper, torch.tensor(step))
        updates, state = peer.update(jax.grad(cross_entropy)(w, x.numpy(), y.numpy()), state, w)
        w = np.asarray(optax.apply_updates(w, updates))
        agree(model.theta[0], torch.tensor(w))
        assert not model.theta[1].any()
