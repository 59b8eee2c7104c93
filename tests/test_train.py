"""The seeds engine: stacked and one-by-one training agree, choices and errors are clear."""

import math

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import benchtop as bt
from benchtop import optim, train

X = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.linspace(-1, 1, 8)).sign().clamp(0).long()


class Attention(nn.Module):
    """A one-layer transformer over the 8 inputs as tokens."""

    def __init__(self):
        super().__init__()
        # no bias for the keys: its true gradient is zero, and Adam would blow the rounding errors up to full steps
        self.embed, self.qkv = nn.Linear(1, 12), nn.Linear(12, 36, bias=False)
        self.norm, self.mlp, self.head = nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x):
        h = self.embed(x[..., None])
        h = h + bt.attention(*self.qkv(self.norm(h)).chunk(3, dim=-1), causal=True)
        return self.head((h + self.mlp(h).relu()).mean(-2))


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(-1, (1, 8)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(-2), nn.Linear(24, 2)
    ),
    "transformer": Attention,
}


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def sample(generator):
    i = torch.randint(len(X), (32,), generator=generator)
    return X[i], Y[i]


def evaluate(model):
    return {"loss": F.cross_entropy(model(X), Y)}


def run(model="mlp", **changes):
    arguments = dict(steps=100, seeds=[0, 1, 2], lr=1e-2, evaluate=evaluate, eval_every=50)
    return bt.fit(MODELS[model], loss, sample, **(arguments | changes))


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("model", MODELS)
def test_stacked_equals_one_by_one(model, optimiser):
    setting = dict(model=model, optimiser=optimiser, lr=[1e-2, 3e-3], weight_decay=0.1)
    if optimiser == "sgd":
        setting["momentum"] = 0.9
    stacked, alone = run(**setting, vectorize=True), run(**setting, vectorize=False)
    for a, b in zip(stacked.models, alone.models):
        for p, q in zip(a.parameters(), b.parameters()):
            assert (p - q).abs().max() < 1e-4
    keys = ["seed", "lr", "step"]
    merged = stacked.history.merge(alone.history, on=keys)
    assert len(merged) == 3 * 2 * 3
    assert (merged["value_x"] - merged["value_y"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_update_is_that_of_torch(name):
    model = nn.Linear(4, 3)
    twin = nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    if name == "adamw":
        reference = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.3)
    else:
        reference = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    h = {"lr": 0.1, "weight_decay": 0.3} if name == "adamw" else {"lr": 0.1, "momentum": 0.9}
    p, optimiser = model.weight.detach(), optim.OPTIMISERS[name]
    state, h = optimiser.init(p), {k: torch.tensor(v) for k, v in h.items()}
    for step in range(1, 6):
        gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        p, state = optimiser.update(p, gradient, state, h, torch.tensor(float(step), dtype=torch.float64))
        twin.weight.grad, twin.bias.grad = gradient, torch.zeros(3)
        reference.step()
    torch.testing.assert_close(p, twin.weight.detach(), rtol=1e-6, atol=1e-6)


def test_same_call_same_bits():
    a, b = run(), run()
    assert all(torch.equal(p, q) for m, n in zip(a.models, b.models) for p, q in zip(m.parameters(), n.parameters()))


def test_a_seed_sees_the_same_batches_in_every_arm_and_grid_point():
    seen = []

    def spy(generator):
        batch = sample(generator)
        seen.append(batch[0].sum().item())
        return batch

    bt.fit(MODELS["mlp"], loss, spy, steps=3, seeds=[5, 6], lr=[0.1, 0.2], vectorize=True)
    first, seen = seen, []
    bt.fit(MODELS["transformer"], loss, spy, steps=3, seeds=[5, 6], lr=0.1, vectorize=True)
    assert first == seen
    assert len(set(first)) == 6


def test_frozen_parameters_stay_and_may_differ_by_seed():
    def make(seed):
        model = MODELS["mlp"]()
        model[0].weight.data.fill_(seed)
        model[0].weight.requires_grad_(False)
        return model

    models = bt.fit(make, loss, sample, steps=5, seeds=[1, 2], lr=0.1).models
    assert [m[0].weight.unique().tolist() for m in models] == [[1.0], [2.0]]
    assert (models[0][2].weight != make(1)[2].weight).any()


def test_the_loss_gets_the_hyper_parameters_it_names():
    def scaled(model, batch, scale):
        return scale * loss(model, batch)

    a = bt.fit(MODELS["mlp"], scaled, sample, steps=5, seeds=[0], lr=0.1, scale=[0.0, 1.0], optimiser="sgd").models
    torch.manual_seed(0)
    start = MODELS["mlp"]()
    assert torch.equal(a[0][0].weight, start[0].weight)
    assert not torch.equal(a[1][0].weight, start[0].weight)


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_evaluation_gets_the_hyper_parameters_it_names(vectorize):
    def scaled(model, alpha):
        return {"alpha": alpha * torch.ones(()), "sum": alpha * sum(p.sum() for p in model.parameters())}

    def outside_torch(model, alpha):
        return {"alpha": float(alpha)}

    def loss(model, batch, alpha):
        return alpha * model(batch[0]).pow(2).mean()

    for measure in (scaled, outside_torch):
        run = bt.fit(MODELS["mlp"], loss, sample, steps=2, seeds=[0, 1], lr=1e-3, alpha=[0.5, 2.0], evaluate=measure,
                     eval_every=1, vectorize=vectorize)  # fmt: skip
        rows = run.history[run.history["metric"] == "alpha"]
        assert len(rows) == 12 and (rows["value"] == rows["alpha"]).all()


def test_best_takes_the_optimum_and_reports_the_edge(capsys):
    wide, narrow = run(arm="wide", lr=[1e-5, 1e-2, 30.0]), run(arm="narrow", lr=[1e-5, 1e-4])
    choice = bt.best([wide, narrow], "loss")
    assert choice["wide"] == {"lr": 1e-2}
    record = choice.record()
    assert (record["wide"]["edge"], record["narrow"]["edge"]) == ([], ["lr"])
    assert record["wide"]["budget"] == 3 * 3 * 100
    assert "narrow: lr = 0.0001" in (out := capsys.readouterr().out)
    assert out.count("AT THE EDGE") == 1


def test_best_is_the_mean_over_seeds_of_the_last_step():
    rows = [("A", s, lr, t, "loss", v) for lr, t, v in [(0.1, 0, 0.0), (0.1, 9, 2.0), (0.2, 0, 9.0), (0.2, 9, 1.0), (0.3, 9, 3.0)]
            for s in (0, 1)]  # fmt: skip
    history = pd.DataFrame(rows, columns=["arm", "seed", "lr", "step", "metric", "value"])
    replicas = history[["seed", "lr"]].drop_duplicates()
    result = train.Fit("A", history, [], replicas, {"lr": [0.1, 0.2, 0.3]}, 9, 0.0, 0)
    assert bt.best(result, "loss")["A"] == {"lr": 0.2}
    assert bt.best(result, "loss", lower_is_better=False)["A"] == {"lr": 0.3}


def test_claims_take_runs_paired_by_seed():
    table = bt.final([run(arm="A"), run("transformer", arm="B")], "loss")
    assert table.index.tolist() == [0, 1, 2]
    assert table.columns.tolist() == ["A", "B"]


def exploding(model, batch):
    return loss(model, batch) + model[0].weight.sum().exp().exp().exp()


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_loss_that_is_not_finite_is_named(vectorize):
    with pytest.raises(train.DivergedError) as error:
        bt.fit(MODELS["mlp"], lambda m, b: exploding(m, b) * math.nan, sample, steps=3, seeds=[7], lr=0.1, arm="A",
               vectorize=vectorize)  # fmt: skip
    assert str(error.value) == "arm 'A' diverged at step 1 (seed=7, lr=0.1): lower lr, or look at the loss of that seed"


def test_a_point_of_a_grid_may_diverge_and_is_passed_over():
    def steep(model, batch):
        return (model(batch[0]) ** 4).mean()

    result = bt.fit(
        MODELS["mlp"], steep, sample, steps=60, seeds=[0, 1], lr=[1e-3, 1e-2, 1e9], evaluate=evaluate, optimiser="sgd"
    )
    choice = bt.best(result, "loss")
    assert choice["model"]["lr"] < 1e9
    assert choice.record()["model"]["diverged"] == 1


@pytest.mark.parametrize("vectorize", [True, False])
def test_metrics_of_a_replica_that_diverged_are_not_numbers_even_if_they_look_like_some(vectorize):
    def steep(model, batch):
        return (model(batch[0]) ** 4).mean()

    def accuracy(model):
        return {"accuracy": (model(X).argmax(-1) == Y).float().mean()}

    result = bt.fit(MODELS["mlp"], steep, sample, steps=40, seeds=[0, 1], lr=[1e-3, 1e9], optimiser="sgd",
                    evaluate=accuracy, eval_every=20, vectorize=vectorize)  # fmt: skip
    gone = result.history["value"].isna()
    assert gone.equals((result.history["lr"] == 1e9) & (result.history["step"] > 0))
    assert bt.best(result, "accuracy", lower_is_better=False).record()["model"]["diverged"] == 1


def test_a_schedule_is_asked_for_the_steps_that_are_taken_only():
    asked = []

    def falling(step, steps):
        asked.append((step, steps))
        return step**-0.5  # of Noam; step 0 has no value

    for vectorize in (True, False):
        run(steps=5, schedule=falling, vectorize=vectorize)
    assert set(asked) == {(t, 5) for t in range(1, 6)}


@pytest.mark.parametrize(("changes", "words"), [
    (dict(lr=None), "no learning rate"),
    (dict(optimiser="adam"), "unknown optimiser 'adam': expected one of adamw, sgd"),
])  # fmt: skip
def test_bad_arguments_are_one_clear_line(changes, words):
    arguments = dict(steps=1, seeds=[0], lr=0.1) | changes
    if arguments["lr"] is None:
        del arguments["lr"]
    with pytest.raises(ValueError, match=words):
        bt.fit(MODELS["mlp"], loss, sample, **arguments)


def test_attention_equals_torch():
    q, k, v = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    for causal in (False, True):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(bt.attention(q, k, v, causal=causal), expected, rtol=1e-5, atol=1e-5)
    for mask in (torch.ones(5, 5).tril().bool(), torch.randn(2, 5, 5)):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(bt.attention(q, k, v, mask=mask, scale=0.3), expected, rtol=1e-5, atol=1e-5)


def test_batches_are_rows_or_windows_of_the_part():
    text = torch.arange(100)
    x, y = bt.batches((text[:-1], text[1:]), size=6, length=5)(torch.Generator().manual_seed(0))
    assert x.shape == (6, 5)
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(5))
    data = bt.load("digits")
    assert bt.batches(data.train, 4)(torch.Generator().manual_seed(0)).x.shape == (4, *data.shape)
    with pytest.raises(ValueError, match="longer than the data"):
        bt.batches((text,), size=2, length=101)
