"""Naive re-derivation: gradient descent step by step in numpy, the learning curve by adaptive quadrature in scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

import benchtop as bt

PEER = "naive re-derivation: a loop of gradient descent in numpy, integrals by scipy.integrate.quad"
WHAT = "learning curve and its gradients, eight steps of descent, ridge regression, ridge curve, final error"

chapter = bt.technique("high-dimensional-generalization")
SNR, INR = 3.0, 0.5


def integral(f, alpha):
    """Mean of f over the Marchenko-Pastur law with its atom at zero; the cosine takes the square roots away."""
    low, high = (math.sqrt(alpha) - 1) ** 2, (math.sqrt(alpha) + 1) ** 2
    middle, half = (low + high) / 2, (high - low) / 2

    def turned(angle):
        x = middle + half * math.cos(angle)
        return f(x) * (half * math.sin(angle)) ** 2 / (2 * math.pi * x)

    bulk, _ = quad(turned, 0, math.pi, epsabs=1e-12, epsrel=1e-10, limit=500)
    return bulk + max(0.0, 1 - alpha) * f(0.0)


def mode(x, time):
    """Error of one mode of eigenvalue x; the noise of a mode that is frozen is zero."""
    learned = (1 - math.exp(-x * time)) ** 2 / x if x else 0.0
    return (SNR + INR) * math.exp(-2 * x * time) + learned


def data(N, P, seed):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((N, P)) / np.sqrt(N)
    return X, rng.standard_normal(N), rng.standard_normal(N), rng.standard_normal(P)


def as_problem(X, teacher, start, epsilon):
    """The same data in the eigenvectors of X X^T, by numpy's singular value decomposition."""
    U, s, _ = np.linalg.svd(X, full_matrices=True)
    lam = np.zeros(len(X))
    lam[: len(s)] = s**2
    parts = (lam, U.T @ teacher, U.T @ start, U.T @ X @ epsilon)
    return chapter.Problem(*(torch.tensor(part)[None] for part in parts))


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
def test_learning_curve_is_the_integral(agree, alpha):
    times = [0.0, 0.7, 6.0, 40.0]
    ours = chapter.learning_curve(torch.tensor(times), *chapter.marchenko_pastur(alpha), SNR, INR)
    agree(ours, torch.tensor([1 + integral(lambda x, time=time: mode(x, time), alpha) for time in times]))


@pytest.mark.parametrize("alpha", [0.3, 2.5])
def test_gradients_in_time_and_signal(agree, alpha):
    time, snr = torch.tensor([1.3], requires_grad=True), torch.tensor(SNR, requires_grad=True)
    curve = chapter.learning_curve(time, *chapter.marchenko_pastur(alpha), snr, INR)
    ours = torch.stack([g.squeeze() for g in torch.autograd.grad(curve.sum(), (time, snr))])

    def slope(x):
        decay = math.exp(-1.3 * x)
        return -2 * x * (SNR + INR) * decay**2 + 2 * (1 - decay) * decay

    theirs = [integral(slope, alpha), integral(lambda x: math.exp(-2.6 * x), alpha)]
    agree(ours, torch.tensor(theirs))


@pytest.mark.parametrize(("N", "P"), [(7, 3), (5, 5), (4, 11)])
def test_steps_of_gradient_descent(agree, N, P):
    X, teacher, start, epsilon = data(N, P, seed=N)
    y = X.T @ (math.sqrt(SNR) * teacher) + epsilon
    w, eta, errors = math.sqrt(INR) * start, 0.05, []
    for _ in range(9):
        errors.append(1 + np.mean((w - math.sqrt(SNR) * teacher) ** 2))
        gradient = sum((w @ X[:, i] - y[i]) * X[:, i] for i in range(P))
        w = w - eta * gradient
    ours = chapter.descend(eta * torch.arange(9.0), as_problem(X, teacher, start, epsilon), SNR, INR, eta)[0]
    agree(ours, torch.tensor(errors))


@pytest.mark.parametrize(("N", "P"), [(7, 3), (4, 11)])
def test_the_end_is_the_nearest_solution(agree, N, P):
    X, teacher, start, epsilon = data(N, P, seed=1)
    y = X.T @ (math.sqrt(SNR) * teacher) + epsilon
    w0 = math.sqrt(INR) * start
    w = w0 + np.linalg.lstsq(X.T, y - X.T @ w0, rcond=None)[0]
    ours = chapter.descend(torch.tensor([math.inf]), as_problem(X, teacher, start, epsilon), SNR, INR)[0]
    agree(ours, torch.tensor([1 + np.mean((w - math.sqrt(SNR) * teacher) ** 2)]))


@pytest.mark.parametrize(("N", "P"), [(7, 3), (4, 11)])
def test_ridge_on_data_and_on_average(agree, N, P):
    X, teacher, start, epsilon = data(N, P, seed=2)
    y = X.T @ (math.sqrt(SNR) * teacher) + epsilon
    strengths = [0.01, 0.4, 5.0]
    errors, averages = [], []
    for gamma in strengths:
        w = np.linalg.solve(X @ X.T + gamma * np.eye(N), X @ y)
        errors.append(1 + np.mean((w - math.sqrt(SNR) * teacher) ** 2))
        averages.append(1 + integral(lambda x, g=gamma: (SNR * g**2 + x) / (x + g) ** 2, P / N))
    agree(chapter.ridge(torch.tensor(strengths), as_problem(X, teacher, start, epsilon), SNR)[0], torch.tensor(errors))
    ours = chapter.ridge_curve(torch.tensor(strengths), *chapter.marchenko_pastur(P / N), SNR)
    agree(ours, torch.tensor(averages))


def test_drawn_problems_are_the_eigenvectors_of_drawn_data(agree):
    N, P, teachers = 6, 9, 3
    ours = chapter.draw(N, P, 2, torch.Generator().manual_seed(5), teachers)
    g = torch.Generator().manual_seed(5)
    X = torch.randn(2, N, P, generator=g) / math.sqrt(N)
    teacher, start = torch.randn(2, 2, N, teachers, generator=g)
    noise = X @ torch.randn(2, P, teachers, generator=g)
    agree(ours.lam, torch.linalg.svdvals(X).square().flip(-1).repeat_interleave(teachers, 0))
    for part, vector in ((ours.teacher, teacher), (ours.start, start), (ours.noise, noise)):
        agree((part**2 * ours.lam).sum(-1), (X.mT @ vector).square().sum(1).flatten())
