"""A network of units, one at a time, with its gradient and its linearisation written out by hand."""

import math

import torch

import benchtop as bt

PEER = "naive re-derivation: loops over units and examples, gradients by hand, a Jacobian for the linearised network"
WHAT = "data, forward, loss, gradient, test error, alignment, tangent kernel, five steps of descent, linearised student"

D, N, P, ALPHA, EPS, RATE = 5, 7, 11, 3.0, 0.4, 1.3
book = bt.technique("grokking-lazy-to-rich")


def student(moved=True):
    """A student with other weights than it was born with, or the newborn one."""
    made = book.Student(D, N, P, torch.Generator().manual_seed(4)).double()
    if moved:
        made.W.data += 0.3 * torch.randn(N, D, generator=torch.Generator().manual_seed(5))
    return made


def unit(z):
    return z + EPS * z * z / 2


def output(W, W0, x):
    return ALPHA / N * sum(unit(w @ x) - unit(w0 @ x) for w, w0 in zip(W, W0))


def gradient(W, W0, X, y):
    """Of the loss, from the chain rule: one unit and one example at a time."""
    total = torch.zeros_like(W)
    for x, target in zip(X, y):
        error = output(W, W0, x) - target
        for i in range(N):
            total[i] += error * ALPHA / N * (1 + EPS * (W[i] @ x)) * x / (ALPHA**2 * P)
    return total


def test_the_task(agree):
    s = student()
    agree(s.y, torch.stack([(s.beta @ x) ** 2 / 2 for x in s.X]))
    agree(s.beta @ s.beta, torch.tensor(float(D)))
    generator = torch.Generator().manual_seed(4)
    drawn = [
        torch.randn(*shape, generator=generator, dtype=torch.get_default_dtype()) for shape in ((N, D), (D,), (P, D))
    ]
    agree(s.W0, drawn[0])
    agree(s.X, drawn[2] / math.sqrt(D))


def test_forward_loss_and_gradient(agree):
    s = student()
    W = s.W.detach()
    naive = torch.stack([output(W, s.W0, x) for x in s.X])
    agree(s(s.X, ALPHA, EPS), naive)
    agree(book.quadratic(s.X, *s.function(ALPHA, EPS)), naive)
    value = book.loss(s, None, ALPHA, EPS)
    agree(value, sum((f - y) ** 2 for f, y in zip(naive, s.y)) / (2 * ALPHA**2 * P))
    agree(torch.autograd.grad(value, s.W)[0], gradient(W, s.W0, s.X, s.y))


def test_test_error_from_moments_of_monomials(agree):
    """E x_a x_b x_c x_d by counting pairs, coefficient by coefficient."""
    s = student()
    v, A = (t.detach() for t in s.function(ALPHA, EPS))
    B = A - torch.outer(s.beta, s.beta) / 2

    def expected(v, B):
        total = (v * v).sum() / D
        for a in range(D):
            for b in range(D):
                for c in range(D):
                    for d in range(D):
                        pairs = (a == b) * (c == d) + (a == c) * (b == d) + (a == d) * (b == c)
                        total = total + B[a, b] * B[c, d] * pairs / D**2
        return total

    wanted = expected(v, B) / expected(0 * v, torch.outer(s.beta, s.beta) / 2)
    agree(book.test_error(s, v, A), wanted)
    M = sum(torch.outer(w, w) for w in s.W.detach()) / N
    agree(book.alignment(s), s.beta @ M @ s.beta / (M.square().sum().sqrt() * D))


def test_five_steps(agree):
    s = student(moved=False)
    W = s.W0.clone()
    for _ in range(5):
        W -= RATE * N * gradient(W, s.W0, s.X, s.y)
        s.W.data -= RATE * N * torch.autograd.grad(book.loss(s, None, ALPHA, EPS), s.W)[0]
    agree(s.W, W)


def test_fit_takes_the_same_steps_at_every_scale(agree):
    """The batched run of the chapter, all scales at once, against the loop by hand."""
    scales = [0.5, 2.0, ALPHA]
    run = bt.fit(lambda: student(moved=False), book.loss, lambda generator: torch.empty(0), steps=5, seeds=[0, 1],
                 lr=RATE * N, alpha=scales, eps=EPS, optimiser="sgd")  # fmt: skip
    assert run.path == "stacked"
    s = student(moved=False)
    W = s.W0.clone()
    for _ in range(5):
        W -= RATE * N * gradient(W, s.W0, s.X, s.y)
    agree(run.models[2].W, W)
    agree(run.models[5].W, W)


def test_linearised_student(agree):
    s = student(moved=False)
    new = torch.randn(6, D, generator=torch.Generator().manual_seed(9))

    def slopes(x):
        """d f / d w at alpha = 1, as one row."""
        return torch.cat([(1 + EPS * (w @ x)) * x / N for w in s.W0])

    J, J_new = torch.stack([slopes(x) for x in s.X]), torch.stack([slopes(x) for x in new])
    agree(book.tangent_kernel(s.W0, new, s.X, EPS), N * J_new @ J.T)
    w, at = torch.zeros(N * D), {}
    for step in range(31):
        at[step] = J_new @ w
        w = w - RATE * N * J.T @ (J @ w - s.y) / P
    steps = torch.tensor([1, 5, 30])
    v, A = book.lazy(s, EPS, RATE, steps)
    for k, step in enumerate(steps.tolist()):
        agree(book.quadratic(new, v[k], A[k]), at[step])
