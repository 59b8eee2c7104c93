"""Replica i is the plain loop on that seed alone: architectures, dropout, running statistics, frozen and tied weights."""

import contextlib
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import benchtop as bt
from benchtop import batching, replicas, report
from benchtop.train import DivergedError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(256, 1, 8, 8, generator=GENERATOR), torch.randint(4, (256,), generator=GENERATOR)
TOKENS = torch.randint(12, (2000,), generator=GENERATOR)
SEEDS = [1, 2, 3]


def mlp():
    return nn.Sequential(nn.Flatten(-3), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, stride=2),
                         nn.ReLU(), nn.Flatten(-3), nn.Linear(8, 4))  # fmt: skip


class Transformer(nn.Module):
    """torch's own encoder layer, unchanged: its attention must come out right and fast."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        # no biases: that of the keys has no gradient but rounding, which Adam would blow up to full steps
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True, norm_first=True, bias=False)
        self.head = nn.Linear(16, 12)

    def forward(self, tokens):
        mask = torch.ones(tokens.shape[-1], tokens.shape[-1], dtype=torch.bool).triu(1)
        return self.head(self.layer(self.embed(tokens), src_mask=mask)).transpose(-1, -2)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU, layers=1, **more):
        super().__init__()
        self.embed, self.cell = nn.Embedding(12, 8), kind(8, 16, layers, batch_first=True, **more)
        self.head = nn.Linear(16, 12)

    def forward(self, tokens):
        return self.head(self.cell(self.embed(tokens))[0]).transpose(-1, -2)


images = bt.batches((IMAGES, LABELS), 32)
text = bt.batches((TOKENS[:-1], TOKENS[1:]), 8, length=10)
CASES = {
    "mlp": (mlp, images),
    "cnn": (cnn, images),
    "transformer": (Transformer, text),
    "gru": (Recurrent, text),
    "lstm, two layers": (lambda: Recurrent(nn.LSTM, 2), text),
    "rnn": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), text),
}


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def plain(make, sample, seed, steps=100, lr=3e-3):
    """The loop that most notebooks write, for one seed."""
    torch.manual_seed(seed)
    model, generator = make(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model, sample(generator)).backward()
        optimiser.step()
    return model


def state(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def largest_difference(model, other):
    mine, theirs = state(model), state(other)
    assert mine.keys() == theirs.keys()
    return max((mine[name].double() - theirs[name].double()).abs().max().item() for name in mine)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_replica_i_is_the_plain_loop_on_that_seed_alone(case, vectorize):
    make, sample = CASES[case]
    models = bt.fit(make, loss, sample, steps=100, seeds=SEEDS, lr=3e-3, weight_decay=0.01, vectorize=vectorize).models
    for seed, model in zip(SEEDS, models):
        assert largest_difference(model, plain(make, sample, seed)) < 1e-4


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_same_call_gives_the_same_bits(vectorize):
    def make():
        return nn.Sequential(*cnn()[:5], nn.BatchNorm2d(8), nn.Dropout(0.3), *cnn()[5:])

    def run():
        return bt.fit(make, loss, images, steps=20, seeds=SEEDS, lr=[1e-2, 1e-3], schedule="cosine", clip=1.0,
                      evaluate=lambda m: {"loss": loss(m, (IMAGES, LABELS))}, vectorize=vectorize)  # fmt: skip

    a, b = run(), run()
    assert a.history.equals(b.history)
    for m, n in zip(a.models, b.models):
        assert all(torch.equal(p, q) for p, q in zip(state(m).values(), state(n).values()))


# ---- running statistics ----


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_keeps_the_running_statistics_of_each_replica(momentum):
    def make():  # no bias before a normalisation: it has no gradient but rounding, which Adam would blow up to full steps
        return nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6, momentum=momentum), nn.ReLU(),
                             nn.Flatten(-3), nn.Linear(216, 8, bias=False), nn.BatchNorm1d(8, momentum=momentum),
                             nn.Linear(8, 4))  # fmt: skip

    def evaluate(model):
        return {"loss": loss(model, (IMAGES, LABELS))}

    run = bt.fit(make, loss, images, steps=60, seeds=SEEDS, lr=3e-3, weight_decay=0.01, evaluate=evaluate)
    assert run.path == ("loop" if momentum is None else "stacked"), "a cumulative mean reads its counter on the host"
    for seed, model in zip(SEEDS, run.models):
        alone = plain(make, images, seed, steps=60)
        assert largest_difference(model, alone) < 1e-4
        with torch.no_grad():
            final = run.history.query("seed == @seed and step == 60")["value"].item()
            assert abs(final - loss(alone.eval(), (IMAGES, LABELS)).item()) < 1e-4
        assert int(model[1].num_batches_tracked) == 60 and model[5].running_mean.abs().max() > 0.01
        assert model.training


# ---- dropout ----


@pytest.mark.parametrize("case", ["module", "channels", "attention", "noise"])
def test_dropout_of_a_replica_does_not_depend_on_its_neighbours(case):
    make, sample, objective = {
        "module": (lambda: nn.Sequential(*mlp(), nn.Dropout(0.2)), images, loss),
        "channels": (lambda: nn.Sequential(*cnn()[:2], nn.Dropout2d(0.4), *cnn()[2:]), images, loss),
        "attention": (lambda: Transformer(0.3), text, loss),
        "noise": (mlp, images, lambda m, b: loss(m, (b[0] + torch.randn_like(b[0]) * torch.rand_like(b[0]), b[1]))),
    }[case]
    together = bt.fit(make, objective, sample, steps=50, seeds=SEEDS, lr=3e-3, vectorize=True)
    for seed, model in zip(SEEDS, together.models):
        alone = bt.fit(make, objective, sample, steps=50, seeds=[seed], lr=3e-3, vectorize=False)
        assert largest_difference(model, alone.models[0]) < 1e-4
    other = bt.fit(make, loss, sample, steps=50, seeds=SEEDS, lr=3e-3, vectorize=True)
    if case != "noise":
        without = plain(lambda: make().eval(), sample, SEEDS[0], steps=50)
        assert largest_difference(other.models[0], without) > 1e-3, "the masks must matter"


def test_dropout_by_hand_in_a_plain_loop():
    """The rule in full: a key from the seed, from it one for the step, from it one for the first call."""
    seed, p = 11, 0.25
    torch.manual_seed(seed)
    model, generator = mlp(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0)
    key = batching.branch(torch.tensor(0), seed)
    for step in range(1, 31):
        x, y = images(generator)
        keep = batching.uniform(batching.branch(batching.branch(key, step), 1), x.shape) >= p
        optimiser.zero_grad()
        F.cross_entropy(model(x * keep / (1 - p)), y).backward()
        optimiser.step()
    twin = bt.fit(lambda: nn.Sequential(nn.Dropout(p), mlp()), loss, images, steps=30, seeds=[10, seed], lr=3e-3,
                  vectorize=True).models[1][1]  # fmt: skip
    assert largest_difference(twin, model) < 1e-4


def test_random_numbers_are_uniform_normal_and_unrelated():
    keys = batching.branch(torch.tensor(0), torch.arange(200))
    draws = torch.stack([batching.uniform(key, torch.Size([1000])) for key in keys])
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 1 / 2) < 3e-3 and abs(draws.var() - 1 / 12) < 1e-3
    counts = torch.histc(draws, 100, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 160, "chi-squared with 99 degrees of freedom, p about 1e-4"
    for rows in (draws, draws.T):  # from replica to replica, from position to position
        r = torch.corrcoef(rows[:200])
        assert (r - torch.eye(200)).abs().max() < 6 / rows.shape[1] ** 0.5
    with batching.ReplicaRules(keys[0], stacked=False):
        normal, again = torch.randn_like(draws), torch.randn_like(draws)
    assert abs(normal.mean()) < 1e-2 and abs(normal.var() - 1) < 2e-2 and abs((normal**4).mean() - 3) < 0.1
    assert abs((normal * again).mean()) < 1e-2


def test_points_of_a_grid_share_their_noise_and_steps_do_not():
    seen = {}

    def spy(model, batch, scale):
        noise = torch.rand_like(batch[0])
        seen.setdefault(float(scale), []).append(noise.mean().item())
        return loss(model, batch)

    bt.fit(mlp, spy, images, steps=4, seeds=[5], lr=0.1, scale=[1.0, 2.0], vectorize=False)
    assert seen[1.0][-4:] == seen[2.0] and len(set(seen[2.0])) == 4


# ---- frozen and tied ----


def test_a_frozen_part_is_held_once_if_shared_and_per_replica_if_not():
    class Adapter(nn.Module):
        def __init__(self, seed=None):
            super().__init__()
            self.base = nn.Linear(64, 4)
            self.base.load_state_dict({"weight": torch.full((4, 64), float(seed or 1)), "bias": torch.zeros(4)})
            self.base.requires_grad_(False)
            self.delta = nn.Linear(64, 4)

        def forward(self, x):
            return self.base(x.flatten(-3)) + self.delta(x.flatten(-3))

    for make in (Adapter, lambda: Adapter(1)):
        a, b = (bt.fit(make, loss, images, steps=10, seeds=SEEDS, lr=1e-2, vectorize=v) for v in (True, False))
        for model, other, seed in zip(a.models, b.models, SEEDS):
            assert largest_difference(model, other) < 1e-5
            assert torch.equal(model.base.weight, make(seed).base.weight if make is Adapter else make().base.weight)
            assert model.delta.weight.abs().max() > 0


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(12, 16), nn.Linear(16, 12)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens).tanh()).transpose(-1, -2)

    for vectorize in (True, False):
        run = bt.fit(Tied, loss, text, steps=50, seeds=SEEDS, lr=3e-3, weight_decay=0.01, vectorize=vectorize)
        for seed, model in zip(SEEDS, run.models):
            assert model.head.weight is model.embed.weight
            assert largest_difference(model, plain(Tied, text, seed, steps=50)) < 1e-4


# ---- the choice of the way ----


def wide(width):
    return lambda: nn.Sequential(nn.Flatten(-3), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                 nn.Linear(width, 4))  # fmt: skip


def test_small_matrices_are_stacked_and_large_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv(report.LOG, str(tmp_path / "log"))
    small = bt.fit(wide(64), loss, images, steps=1, seeds=SEEDS, lr=1e-3)
    large = bt.fit(wide(1500), loss, images, steps=1, seeds=SEEDS, lr=1e-3)
    assert (small.path, large.path) == ("stacked", "loop")
    assert "million operations" in small.why and "above 80 million stacking does not pay" in large.why
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(entry["path"], entry["why"]) for entry in logged] == [(r.path, r.why) for r in (small, large)]
    assert all(entry["peak_bytes"] > 10**7 and entry["seconds"] > 0 for entry in logged)


def test_the_work_of_a_step_is_counted_without_touching_the_model():
    model = nn.Sequential(nn.Flatten(-3), nn.Linear(64, 100, bias=False), nn.BatchNorm1d(100), nn.Linear(100, 4))
    before = {name: t.clone() for name, t in state(model).items()}
    job = replicas.Job(loss, images, 1, [{"seed": 0, "lr": 0.1}], [], bt.sgd, None, None, 1, torch.device("cpu"),
                       "float32", "", None, None)  # fmt: skip
    # products of 32 rows: forward and the gradient of the weights, and of the inputs where there is one to pass on
    assert replicas.work(job, model) == 2 * 32 * (2 * 64 * 100 + 3 * 100 * 4)
    assert all(torch.equal(before[name], t) for name, t in state(model).items())


def test_a_module_may_be_fed_with_a_parameter():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.project, self.classify = (
                nn.Parameter(torch.ones(1, 64)),
                nn.Linear(64, 64),
                nn.Linear(64, 4),
            )

        def forward(self, x):
            return self.classify(x.flatten(-3) * self.project(self.query))

    run = bt.fit(Asking, loss, images, steps=1, seeds=SEEDS, lr=1e-3)
    assert run.path == "stacked" and "million operations" in run.why


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (lambda m, b: loss(m, b) * (2.0 if loss(m, b).item() > 0 else 1.0), "vmap cannot take"),
        (lambda m, b: loss(m, b) + 0 * torch.randn(3).sum(), "random"),
        (lambda m, b: F.multi_margin_loss(m(b[0]), b[1]), "no batching rule for aten::multi_margin_loss"),
    ],
)
def test_what_cannot_be_stacked_goes_through_the_loop_and_says_so(objective, words):
    run = bt.fit(mlp, objective, images, steps=3, seeds=SEEDS, lr=1e-3)
    assert run.path == "loop" and re.search(words, run.why), run.why
    again = bt.fit(mlp, objective, images, steps=3, seeds=SEEDS, lr=1e-3)
    assert run.why == again.why
    assert largest_difference(run.models[2], again.models[2]) == 0


def test_a_mistake_in_the_loss_is_shown_as_it_is():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bt.fit(mlp, lambda m, b: m.nothing, images, steps=3, seeds=SEEDS, lr=1e-3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        bt.fit(mlp, lambda m, b: m(b[0][..., :5]).sum(), images, steps=3, seeds=SEEDS, lr=1e-3)


def test_torch_own_attention_stays_on_the_fast_path():
    run = bt.fit(Transformer, loss, text, steps=2, seeds=SEEDS, lr=1e-3)
    assert run.path == "stacked", run.why


def test_evaluate_may_leave_torch():
    def metrics(model):
        return {"loss": loss(model, (IMAGES, LABELS)).item(), "constant": 2.0}

    def tensors(model):
        return {"loss": loss(model, (IMAGES, LABELS)), "constant": torch.tensor(2.0)}

    a, b = (
        bt.fit(mlp, loss, images, steps=20, seeds=SEEDS, lr=1e-2, evaluate=e, eval_every=10, vectorize=True)
        for e in (metrics, tensors)
    )
    assert a.path == "stacked" and len(a.history) == len(b.history) == 3 * 3 * 2
    assert (a.history["value"] - b.history["value"]).abs().max() < 1e-5


# ---- precision, progress, platforms, devices ----


@pytest.mark.parametrize("vectorize", [True, False])
def test_bf16_rounds_the_loss_and_keeps_float32_parameters(vectorize):
    seen = []

    def spy(model, batch):
        seen.append(model(batch[0]).dtype)
        return loss(model, batch)

    a, b = (bt.fit(mlp, spy, images, steps=30, seeds=SEEDS, lr=3e-3, precision=p, vectorize=vectorize).models[0]
            for p in ("float32", "bf16"))  # fmt: skip
    assert {torch.float32, torch.bfloat16} == set(seen)
    assert all(p.dtype == torch.float32 for p in b.parameters())
    assert 1e-5 < largest_difference(a, b) < 0.1


def test_tf32_is_on_exactly_when_asked_for():
    seen, before = [], torch.backends.cuda.matmul.allow_tf32

    def spy(model, batch):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return loss(model, batch)

    for precision in ("tf32", "float32"):
        bt.fit(mlp, spy, images, steps=1, seeds=[0], lr=0.1, precision=precision)
    assert set(seen[: len(seen) // 2]) == {(True, True)} and set(seen[len(seen) // 2 :]) == {(False, False)}
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_the_progress_bar_waits_and_is_hidden_from_those_who_do_not_look(monkeypatch, capsys):
    job = replicas.Job(*[None] * 14)
    assert job.progress(10).disable, "standard error is not a terminal here"
    monkeypatch.setattr(report, "in_notebook", lambda: True)
    shown = job.progress(10)
    assert not shown.disable and shown.delay > 0
    monkeypatch.setenv(report.LOG, "somewhere")
    assert job.progress(10).disable, "a runner executes: nobody looks"


def test_the_bench_imports_without_resource():
    code = "import sys; sys.modules['resource'] = None; import torch; from benchtop import train; print(train._peak(torch.device('cpu')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "0"


def test_data_are_held_once_and_the_gather_equals_batch_by_batch():
    own = bt.fit(mlp, loss, lambda g: images(g), steps=20, seeds=SEEDS, lr=[1e-2, 1e-3], vectorize=True)
    gathered = bt.fit(mlp, loss, images, steps=20, seeds=SEEDS, lr=[1e-2, 1e-3], vectorize=True)
    for model, other in zip(own.models, gathered.models):
        assert largest_difference(model, other) == 0
    assert images.part[0].data_ptr() == IMAGES.data_ptr()


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: records kernels without effect, replays them on the same memory.

    Reading a number on the host, or making a tensor from one, is an error, as it is while a CUDA stream is captured.
    """

    forbidden = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.lift_fresh)

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made, self.replays = [], {}, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.forbidden:
            raise RuntimeError(f"{function} is not permitted while a stream is captured")
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor) and (place := t.untyped_storage()).data_ptr() not in self.made:
                self.before.setdefault(place.data_ptr(), (place, place.clone()))
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        known = self.before.keys()
        self.made |= {t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, torch.Tensor)} - known
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for place, content in self.before.values():
            place.copy_(content)

    def replay(self):
        self.replays += 1
        with torch.no_grad():  # a graph replays kernels and knows of no autograd
            for function, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs))):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """The CUDA way of `fit` on a CPU; the list of its tapes."""
    made, stream = [], SimpleNamespace(wait_stream=lambda other: None)
    fakes = dict(CUDAGraph=lambda: made.append(Tape()) or made[-1], graph=lambda tape, stream: tape,
                 Stream=lambda: stream, current_stream=lambda: stream, stream=contextlib.nullcontext)  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(replicas, "mover", replicas.Mover)  # a GPU moves by the formulas
    monkeypatch.setattr(replicas, "_on_cuda", lambda job: True)
    return made


def noisy():
    return nn.Sequential(*cnn()[:4], nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), *cnn()[5:])


def turned_init(param):
    return torch.zeros_like(param)


def turned_update(param, grad, state, hyper, step):
    state = 0.9 * state + grad / grad.norm()
    return param - hyper["lr"] * state / step**0.1, state


@pytest.mark.parametrize("way", [dict(optimiser="adamw"), dict(optimiser="sgd", momentum=0.9),
                                 dict(optimiser=(turned_init, turned_update))], ids=["adamw", "sgd", "functions"])  # fmt: skip
def test_a_replayed_step_equals_eager_steps(tapes, monkeypatch, way):
    def run():
        return bt.fit(noisy, loss, images, steps=20, seeds=SEEDS, lr=[3e-3, 1e-2], schedule="cosine", clip=1.0, **way,
                      evaluate=lambda m: {"loss": loss(m, (IMAGES, LABELS))}, eval_every=8, vectorize=True)  # fmt: skip

    captured = run()
    assert tapes[0].replays == 20 - replicas.GRAPH_AFTER and captured.why.endswith("the step is a CUDA graph")
    monkeypatch.setattr(replicas, "_on_cuda", lambda job: False)
    eager = run()
    assert eager.why == "vectorize=True"
    for model, other in zip(captured.models, eager.models):
        assert largest_difference(model, other) < 1e-6
    assert (captured.history["value"] - eager.history["value"]).abs().max() < 1e-6


def test_what_cannot_be_captured_goes_on_eagerly_and_says_so(tapes, monkeypatch):
    def constant(model, batch):
        return loss(model, batch) * torch.tensor(2.0)  # copies a number to the device at each call

    setting = dict(steps=10, seeds=SEEDS, lr=3e-3, vectorize=True)
    run = bt.fit(mlp, constant, images, **setting)
    assert "no CUDA graph (aten.lift_fresh" in run.why and tapes[0].replays == 0
    monkeypatch.setattr(replicas, "_on_cuda", lambda job: False)
    for model, other in zip(run.models, bt.fit(mlp, constant, images, **setting).models):
        assert largest_difference(model, other) == 0


def test_a_replica_that_diverges_between_two_looks_is_named_with_its_step(tapes):
    with pytest.raises(DivergedError, match=r"diverged at step 6 \(seed=2"):
        bt.fit(mlp, lambda m, b: loss(m, b) * b[2], lambda g: (*images(g), bad(g)), steps=20, seeds=[1, 2], lr=0.1,
               vectorize=True)  # fmt: skip


def bad(generator, calls={}):  # noqa: B006
    seed = generator.initial_seed()
    calls[seed] = calls.get(seed, 0) + 1
    return torch.tensor(math.nan if (seed, calls[seed]) == (2, 6) else 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_the_captured_step_equals_eager_steps(monkeypatch, optimiser):
    def make():
        return nn.Sequential(*mlp(), nn.Dropout(0.1))

    def run():
        sample = bt.batches((IMAGES.cuda(), LABELS.cuda()), 32)
        return bt.fit(make, loss, sample, steps=50, seeds=SEEDS, lr=3e-3, optimiser=optimiser, schedule="cosine", clip=1.0,
                      device="cuda", vectorize=True)  # fmt: skip

    captured = run()
    monkeypatch.setattr(replicas, "GRAPH_AFTER", 1000)
    for model, other in zip(captured.models, run().models):
        assert largest_difference(model, other) < 1e-4


@pytest.mark.parametrize(("shape", "options"), [((6, 5), {}), ((5,), {}), ((6, 5, 3, 2), dict(reduction="sum")), ((6, 5), dict(reduction="none")),
                                            ((6, 5), dict(ignore_index=2)), ((6, 5), dict(label_smoothing=0.1)),
                                            ((6, 5), dict(weight=torch.arange(1.0, 6).double()))])  # fmt: skip
def test_the_cross_entropy_of_the_fast_path_is_that_of_torch(shape, options):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(5, (shape[:1] if len(shape) > 1 else ()) + shape[2:], generator=generator)
    if len(shape) == 4:
        target[0, 0, 0] = -100  # the value that torch passes over
    logits = [
        torch.randn(shape, generator=generator.manual_seed(1), dtype=torch.float64).requires_grad_() for _ in range(2)
    ]
    values = [function(x, target, **options) for function, x in zip((batching.cross_entropy, F.cross_entropy), logits)]
    torch.testing.assert_close(*values)
    for value in values:
        value.pow(2).sum().backward()
    torch.testing.assert_close(logits[0].grad, logits[1].grad)


def test_probabilities_as_targets_and_bad_labels_are_treated_as_by_torch():
    logits, shares = torch.randn(6, 5), torch.rand(6, 5).softmax(1)
    torch.testing.assert_close(batching.cross_entropy(logits, shares), F.cross_entropy(logits, shares))
    for label in (5, -1):
        with pytest.raises((IndexError, RuntimeError)):
            batching.cross_entropy(logits, torch.full((6,), label))


@pytest.mark.parametrize(("threads", "expected"), [(None, 1), (2, 2)])
def test_small_work_is_done_by_one_thread_unless_told_otherwise(threads, expected):
    seen, before = set(), torch.get_num_threads()

    def watched(model, batch):
        seen.add(torch.get_num_threads())
        return loss(model, batch)

    torch.set_num_threads(3)
    try:
        bt.fit(mlp, watched, images, steps=2, seeds=[1], lr=0.1, threads=threads)  # one by one: called at each step
        assert expected in seen and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_fit_does_not_wait_for_the_compiler_of_torch():
    """A second and more at the first call of each chapter; a process of its own, since others here may have it loaded."""
    program = """if True:
        import sys
        import torch
        import benchtop as bt

        part = torch.rand(40, 8), torch.randint(3, (40,))
        for arm in ({}, {"optimiser": bt.sgd}, {"vectorize": False}):
            bt.fit(lambda: torch.nn.Linear(8, 3), lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]),
                   bt.batches(part, 8), steps=2, seeds=range(2), lr=1e-2, evaluate=lambda m: {"one": 1.0}, **arm)
        print(*(name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
