"""Optimisers, schedules and clipping against torch's own, and optimisers given as two functions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import benchtop as bt
from benchtop import optim

X = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.linspace(-1, 1, 8)).sign().clamp(0).long()
sample = bt.batches((X, Y), 32)
SEEDS = [3, 4, 5]


def make():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def plain(seed, make_optimiser, steps, schedule=None, clip=None):
    """The loop that most notebooks write, for one seed."""
    torch.manual_seed(seed)
    model, generator = make(), torch.Generator().manual_seed(seed)
    optimiser = make_optimiser(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule) if schedule else None
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model, sample(generator)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        if scheduler:
            scheduler.step()
    return model


def assert_same(model, other, tolerance=1e-5):
    for p, q in zip(model.parameters(), other.parameters()):
        assert (p - q).abs().max() < tolerance


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    ("setting", "reference"),
    [
        (dict(optimiser="adamw", lr=1e-2, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1)),
        (
            dict(optimiser="adamw", lr=1e-2, beta1=0.8, beta2=0.95, eps=1e-4),
            lambda p: torch.optim.AdamW(p, 1e-2, (0.8, 0.95), 1e-4, weight_decay=0),
        ),
        (dict(optimiser="sgd", lr=0.1), lambda p: torch.optim.SGD(p, 0.1)),
        (dict(optimiser="sgd", lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        (
            dict(optimiser="sgd", lr=0.1, momentum=0.9, nesterov=1),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        ),
    ],
)
def test_optimisers_equal_those_of_torch(setting, reference, vectorize):
    models = bt.fit(make, loss, sample, steps=50, seeds=SEEDS, vectorize=vectorize, **setting).models
    for seed, model in zip(SEEDS, models):
        assert_same(model, plain(seed, reference, 50))


def test_every_replica_has_its_own_learning_rate_decay_momentum_and_clip():
    grid = dict(lr=[0.1, 0.3], weight_decay=[0.0, 0.2], momentum=[0.0, 0.9], clip=[0.05, 10.0])
    run = bt.fit(make, loss, sample, steps=20, seeds=[7], optimiser="sgd", vectorize=True, **grid)
    assert len(run.models) == 16
    for model, h in zip(run.models, run.replicas.drop(columns="seed").to_dict("records")):
        alone = bt.fit(make, loss, sample, steps=20, seeds=[7], optimiser="sgd", vectorize=False, **h)
        assert_same(model, alone.models[0])
    ends = {model[0].weight.sum().item() for model in run.models}
    assert len(ends) == 16, "each number of the grid must matter"


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_schedules_are_those_of_the_plain_loop(name):
    steps, schedule = 40, optim.SCHEDULES[name]
    reference = plain(3, lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0), steps, lambda t: schedule(t + 1, steps))
    run = bt.fit(make, loss, sample, steps=steps, seeds=SEEDS, lr=1e-2, schedule=name, vectorize=True)
    assert_same(run.models[0], reference)


def test_shapes_of_the_schedules():
    assert optim.cosine(1, 100) == 1.0 and abs(optim.cosine(51, 100) - 0.5) < 1e-12 and optim.cosine(100, 100) < 1e-3
    assert [optim.warmup(t, 100) for t in (1, 5, 10, 100)] == [0.1, 0.5, 1.0, 1.0]
    both = [optim.warmup_cosine(t, 100) for t in range(1, 101)]
    assert max(both) == both[9] == both[10] == 1.0 and both[0] == 0.1 and both[-1] < 1e-3
    assert optim.warmup_cosine(1, 5) == 1.0, "too few steps for a warm-up"

    def halving(step, steps):
        return 0.5 ** (step - 1)

    run = bt.fit(make, loss, sample, steps=20, seeds=SEEDS, lr=0.1, schedule=halving, vectorize=True)
    assert_same(run.models[1], plain(4, lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0), 20, lambda t: 0.5**t))


@pytest.mark.parametrize("vectorize", [True, False])
def test_clipping_is_that_of_torch_for_each_replica(vectorize):
    run = bt.fit(make, loss, sample, steps=50, seeds=SEEDS, lr=0.5, clip=0.1, optimiser="sgd", vectorize=vectorize)
    for seed, model in zip(SEEDS, run.models):
        assert_same(model, plain(seed, lambda p: torch.optim.SGD(p, 0.5), 50, clip=0.1))
    free = plain(3, lambda p: torch.optim.SGD(p, 0.5), 50)
    assert (run.models[0][0].weight - free[0].weight).abs().max() > 1e-2


# ---- not elementwise: Muon's orthogonal step for matrices, AdamW for the rest, as a chapter would write it ----


def orthogonal(g, rounds=5):
    """Newton-Schulz: g with its singular values near 1."""
    x = g / (g.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon_init(param):
    return torch.zeros_like(param) if param.dim() == 2 else bt.adamw.init(param)


def muon_update(param, grad, state, hyper, step):
    if param.dim() != 2:
        return bt.adamw.update(param, grad, state, hyper, step)
    state = 0.95 * state + grad
    return param - hyper["lr"] * orthogonal(state), state


class Muon(torch.optim.Optimizer):
    """The same, as an optimiser with state: what the two functions must equal."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        flat = [p for p in self.param_groups[0]["params"] if p.dim() != 2]
        self.rest = torch.optim.AdamW(flat, lr, weight_decay=0)

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.dim() == 2:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.mul_(0.95).add_(p.grad)
                p.sub_(self.param_groups[0]["lr"] * orthogonal(buffer))
        self.rest.step()


def shampoo_init(param):
    return torch.eye(len(param)) * 1e-3


def shampoo_update(param, grad, state, hyper, step):
    """One-sided Shampoo; a vector counts as a column."""
    g = grad.reshape(len(grad), -1)
    state = state + g @ g.T
    values, vectors = torch.linalg.eigh(state)
    root = vectors @ torch.diag(values.clamp(min=1e-6) ** -0.25) @ vectors.T
    return param - hyper["lr"] * (root @ g).view_as(param), state


@pytest.mark.parametrize("vectorize", [True, False])
def test_an_optimiser_of_two_functions_equals_the_plain_loop(vectorize):
    run = bt.fit(make, loss, sample, steps=50, seeds=SEEDS, lr=[0.01, 0.03], optimiser=(muon_init, muon_update),
                 vectorize=vectorize)  # fmt: skip
    for model, (seed, lr) in zip(run.models, run.replicas.itertuples(index=False)):
        assert_same(model, plain(int(seed), lambda p, lr=lr: Muon(p, lr), 50), 1e-4)


def test_a_preconditioner_with_a_state_of_another_shape():
    setting = dict(steps=30, seeds=SEEDS, lr=[0.02, 0.05], optimiser=(shampoo_init, shampoo_update))
    a, b = (bt.fit(make, loss, sample, vectorize=v, **setting) for v in (True, False))
    for model, other in zip(a.models, b.models):
        assert_same(model, other, 1e-4)


def test_the_fused_kernel_of_a_cpu_does_what_the_formulas_say():
    """A GPU moves by the formulas of `adamw`; a copy of the pair is moved by them here too."""
    setting = dict(steps=30, seeds=SEEDS, lr=[0.01, 0.02], weight_decay=[0.0, 0.1], beta1=0.8, eps=1e-6, clip=0.5,
                   schedule="cosine", vectorize=True)  # fmt: skip
    fused = bt.fit(make, loss, sample, **setting)
    plainly = bt.fit(make, loss, sample, optimiser=optim.adamw._replace(), **setting)
    for model, other in zip(fused.models, plainly.models):
        assert_same(model, other, 1e-5)


def test_the_fused_kernel_with_one_setting_for_all_does_what_the_formulas_say():
    setting = dict(steps=30, seeds=SEEDS, lr=0.02, weight_decay=0.1, clip=0.5, vectorize=True)
    fused = bt.fit(make, loss, sample, **setting)
    plainly = bt.fit(make, loss, sample, optimiser=optim.adamw._replace(), **setting)
    for model, other in zip(fused.models, plainly.models):
        assert_same(model, other, 1e-5)


def test_a_part_takes_the_layout_of_its_gradient_only_if_replicas_stay_whole():
    part = torch.arange(24.0).view(2, 3, 4)
    turned, mixed = torch.zeros(2, 4, 3).transpose(1, 2), torch.zeros(3, 4, 2).permute(2, 0, 1)
    for grad, strides in (
        (turned, (12, 1, 3)),
        (mixed, (12, 4, 1)),
        (torch.zeros(2, 1, 1).expand(2, 3, 4), (12, 4, 1)),
    ):
        laid = optim.laid_out_like(part, grad)
        assert laid.stride() == strides and torch.equal(laid, part)
    hyper = {"lr": torch.tensor([0.1, 0.2])}
    movers = [optim.FusedAdamW([p], hyper) for p in (part, optim.laid_out_like(part, turned))]
    for mover in movers:
        mover([part.sin()], torch.tensor(1.0), torch.tensor(1.0))
    assert torch.equal(movers[0].parts[0], movers[1].parts[0]) and not torch.equal(movers[0].parts[0], part)
