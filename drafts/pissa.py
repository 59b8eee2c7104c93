# %% [markdown]
# # PiSSA: adapt the strongest directions first
#
# At the end you know why a low-rank adapter that starts from the top singular directions of a weight can learn faster than one that starts from zero, and you have measured whether it does here.

# %% [markdown]
# ## Set up

# %% tags=["setup"]
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("benchtop") is None:  # on Colab: install the bench, leave torch as it is
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "benchtop @ git+https://github.com/benchtop-dl/benchtop"], check=True)

# %% tags=["parameters"]
profile = "laptop"

# %% tags=["setup"]
import copy
import math

import pandas as pd
import torch
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F

import benchtop as bt

profile = bt.Profile(profile)

# %% [markdown]
# ## The idea
#
# A trained linear layer $y = xW + b$ with $W \in \mathbb{R}^{m \times n}$ is to be adapted to new data with few trainable numbers. LoRA {cite}`hu2021lora` freezes $W$ and learns a correction of rank $r$, $y = x(W + AB) + b$, with $A \in \mathbb{R}^{m \times r}$ random and $B \in \mathbb{R}^{r \times n}$ zero. The correction starts at zero, and so does the gradient of $A$: $\partial L/\partial A = (\partial L/\partial W) B^\top = 0$.
#
# PiSSA {cite}`meng2024pissa` has the same architecture and another start. With the singular value decomposition $W = U S V^\top$ it puts the $r$ largest directions into the adapter and freezes the rest:
#
# $$A = U_{[:, :r]} S_r^{1/2}, \qquad B = S_r^{1/2} V_{[:, :r]}^\top, \qquad W^{res} = U_{[:, r:]} S_{[r:]} V_{[:, r:]}^\top .$$
#
# The layer computes $y = x(W^{res} + AB) + b$, at the start exactly the old one. Both factors carry $\sqrt{s}$, so both get a gradient from the first step, along the directions in which $W$ acts most strongly.
#
# There is a second use. The frozen part may be stored in four bits. $W^{res}$ lacks the largest singular values, so a quantiser has a narrower range to cover, and its error should be smaller than that of quantising $W$ whole.

# %% [markdown]
# ## Build it
#
# The layer, with the symbols of the equations. `which` chooses other singular directions for the ablations.

# %% tags=["technique"]
class PiSSALinear(nn.Module):
    """y = x (W_res + A B) + b, with A, B from r singular directions of W; W_res and b are frozen.

    x: (..., m), W: (m, n), A: (m, r), B: (r, n).
    """

    def __init__(self, linear, r, which="principal"):
        super().__init__()
        W = linear.weight.detach().T
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        chosen = directions(len(S), r, which)
        root = S[chosen].sqrt()
        self.A = nn.Parameter(U[:, chosen] * root)  # (m, r)
        self.B = nn.Parameter(root[:, None] * Vh[chosen])  # (r, n)
        self.W_res = nn.Parameter(W - self.A.detach() @ self.B.detach(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x):
        return x @ self.W_res + (x @ self.A) @ self.B + self.bias


def directions(k, r, which):
    """Indices of r of the k singular directions, which are sorted from strong to weak."""
    if which == "principal":
        return torch.arange(r)
    if which == "minor":
        return torch.arange(k - r, k)
    return torch.randperm(k)[:r]

# %% [markdown]
# The baseline differs in its start only: the same shapes, the same number of trainable parameters.

# %% tags=["technique"]
class LoRALinear(nn.Module):
    """y = x (W + A B) + b with A random, B zero; W and b are frozen. The scale alpha / r is 1, as in the PiSSA paper."""

    def __init__(self, linear, r):
        super().__init__()
        m, n = linear.in_features, linear.out_features
        self.A = nn.Parameter((2 * torch.rand(m, r) - 1) / math.sqrt(m))  # Kaiming-uniform with a = sqrt(5)
        self.B = nn.Parameter(torch.zeros(r, n))
        self.W = nn.Parameter(linear.weight.detach().T.clone(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x):
        return x @ self.W + (x @ self.A) @ self.B + self.bias

# %% [markdown]
# Four-bit NormalFloat {cite}`dettmers2023qlora`: 16 levels at quantiles of a normal distribution, scaled per block by its largest absolute value.

# %% tags=["technique"]
def nf4_levels():
    """The 16 levels in [-1, 1]: 7 below zero, zero, 8 above, at normal quantiles."""
    top = 0.9677083  # quantile of the outermost level, from the reference implementation
    above = norm.ppf(torch.linspace(top, 0.5, 9, dtype=torch.float64)[:-1])
    below = -norm.ppf(torch.linspace(top, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.tensor([*below, 0.0, *above]).sort().values
    return (levels / levels.max()).float()


def nf4(W, block=64):
    """W (m, n) after a round trip through 4 bits; m n must be a multiple of the block length."""
    rows = W.reshape(-1, block)
    scale = rows.abs().amax(dim=1, keepdim=True)
    levels = nf4_levels().to(W)
    nearest = ((rows / scale)[..., None] - levels).abs().argmin(dim=-1)
    return (levels[nearest] * scale).reshape(W.shape)

# %% [markdown]
# ## Check it
#
# At the start the adapted layer is the old layer; the frozen part lacks exactly the $r$ strongest directions.

# %% tags=["check"]
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
linear, x = nn.Linear(12, 8).double(), torch.randn(5, 12, dtype=torch.float64)
S = torch.linalg.svdvals(linear.weight.detach())
for which, left in {"principal": S[3:], "minor": S[:-3]}.items():
    layer = PiSSALinear(linear, 3, which)
    same = torch.allclose(layer(x), linear(x), atol=1e-12)
    rest = torch.linalg.svdvals(layer.W_res)[:5]
    balanced = torch.allclose(layer.A.T @ layer.A, layer.B @ layer.B.T, atol=1e-12)
    print(which, "| same function:", same, "| W_res keeps the others:", torch.allclose(rest, left), "| A and B balanced:", balanced)
print("random directions:", sorted(directions(8, 8, "random").tolist()), len(directions(8, 3, "random")))
lora = LoRALinear(linear, 3).double()
print("LoRA starts as the old layer:", torch.equal(lora(x), linear(x)), "| range of A:", round(lora.A.abs().max().item() * 12**0.5, 1))

# %% [markdown]
# Gradients follow the chain rule, reach $A$ and $B$ only, and LoRA's $A$ has none at the start.

# %% tags=["check"]
# NBVAL_CHECK_OUTPUT
layer = PiSSALinear(linear, 3)
for adapter in (layer, lora):
    W = (adapter.A.detach() @ adapter.B.detach() + getattr(adapter, "W_res", getattr(adapter, "W", None))).requires_grad_()
    (dW,) = torch.autograd.grad((x @ W + adapter.bias).pow(2).sum(), W)
    adapter(x).pow(2).sum().backward()
    chain = torch.allclose(adapter.A.grad, dW @ adapter.B.T) and torch.allclose(adapter.B.grad, adapter.A.T @ dW)
    trainable = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    print(type(adapter).__name__, "| chain rule:", chain, "| A moves:", bool(adapter.A.grad.abs().max() > 0), "| trainable:", trainable)

# %% [markdown]
# The quantiser has the published levels, keeps them and zero exactly, and never moves a value by more than half a gap.

# %% tags=["check"]
# NBVAL_CHECK_OUTPUT
levels = nf4_levels()
print("levels:", [round(v, 3) for v in levels.tolist()])
scaled = torch.stack([levels.repeat(4), 3 * levels.repeat(4)])
print("levels survive:", torch.allclose(nf4(scaled), scaled))
W = torch.linspace(-2, 1, 128).reshape(8, 16)
print("largest error in half gaps:", round(((nf4(W) - W).abs().max() / (levels.diff().max() / 2 * 2)).item(), 1), "| shape kept:", nf4(W).shape == W.shape)

# %% [markdown]
# ## Try it
#
# **Task.** A small network learns to read digits; then the pictures are turned by 90 degrees and inverted, and only rank-4 adapters on its three layers may change. There is one backbone per seed, all trained at once.

# %% tags=["experiment"]
data = bt.load("digits", device=profile.device)
r, steps = 4, profile.pick(smoke=20, laptop=200, gpu=200)

def shifted(x):
    return 1 - x.rot90(1, (-2, -1))

def batches(part, change=lambda x: x, size=64):
    x, y = change(part.x).flatten(1), part.y
    def sample(generator):
        i = torch.randint(len(x), (size,), generator=generator, device=x.device)
        return x[i], y[i]
    return sample

def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)

# %% [markdown]
# The backbones.

# %% tags=["experiment"]
def backbone():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

def accuracy(model):
    return {"accuracy": (model(data.test.x.flatten(1)).argmax(-1) == data.test.y).float().mean()}

every_seed = [*profile.tuning_seeds, *profile.seeds]
pretrained = bt.fit(backbone, loss, batches(data.train), arm="backbone", steps=profile.pick(smoke=60, laptop=400, gpu=400),
                    seeds=every_seed, lr=3e-3, evaluate=accuracy, eval_every=400, device=profile.device)
backbones = dict(zip(every_seed, pretrained.models))
before = pd.Series([accuracy(m)["accuracy"].item() for m in pretrained.models])
bt.say(f"The {len(before)} backbones read {before.mean():.1%} of the upright test digits.")

# %% [markdown]
# **Arms.** PiSSA and LoRA, two ablations with the weakest and with random directions, and full fine-tuning as a reference.

# %% tags=["experiment"]
def adapted(layer):
    def make(seed):
        model = copy.deepcopy(backbones[seed])
        for i in (0, 2, 4):
            model[i] = layer(model[i])
        return model
    return make

arms = {
    "PiSSA": lambda linear: PiSSALinear(linear, r),
    "LoRA": lambda linear: LoRALinear(linear, r),
    "minor": lambda linear: PiSSALinear(linear, r, "minor"),
    "random": lambda linear: PiSSALinear(linear, r, "random"),
    "full": lambda linear: linear,
}

def metrics(model):
    return {f"{name} loss": F.cross_entropy(model(shifted(part.x).flatten(1)), part.y)
            for name, part in {"validation": data.validation, "test": data.test}.items()}

# %% [markdown]
# **Equal tuning.** Every arm gets the same grid of learning rates, judged on validation data with the tuning seeds.

# %% tags=["experiment"]
grid = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
common = dict(steps=steps, evaluate=metrics, eval_every=10, device=profile.device)
sample = batches(data.train, shifted)
tuning = [bt.fit(adapted(layer), loss, sample, arm=arm, seeds=profile.tuning_seeds, lr=grid, **common) for arm, layer in arms.items()]
choice = bt.best(tuning, "validation loss")

# %% [markdown]
# ## Does the claim hold?
#
# The claims, their metrics and margins stand here before the verdict seeds are run.

# %% tags=["claim"]
lower = bt.Claim("PiSSA ends at a lower test loss than LoRA after the same number of steps", metric="test loss", better="PiSSA", than="LoRA",
                 paper="Section 4: PiSSA outperforms LoRA at equal rank", stand_in=True)
faster = bt.Claim("PiSSA converges faster: lower validation loss averaged over the run", metric="mean validation loss", better="PiSSA", than="LoRA",
                  paper="Section 4: loss falls faster from the first steps", stand_in=True)
finer = bt.Claim("Quantising W_res to four bits loses less of W than quantising W", paper="Section 3: QPiSSA reduces the quantisation error", stand_in=True)

# %% [markdown]
# One run with the verdict seeds, each arm at its own learning rate.

# %% tags=["experiment"]
runs = [bt.fit(adapted(layer), loss, sample, arm=arm, seeds=profile.seeds, **choice[arm], **common) for arm, layer in arms.items()]
adapting = pd.concat([run.history.drop(columns="lr") for run in runs])
fig = bt.curves(adapting, "test loss", log=True)
bt.show(fig, alt="Test loss against training steps for five ways to adapt, on a logarithmic axis, each with a band over seeds.",
        caption=f"Adapting to turned, inverted digits; {len(profile.seeds)} seeds")

# %% tags=["claim"]
verdict_lower = lower.test(runs, tuning=choice)

# %% tags=["claim"]
history = pd.concat([run.history for run in runs]).query("metric == 'validation loss'")
averages = history.groupby(["seed", "arm"])["value"].mean().unstack()
verdict_faster = faster.test(averages, tuning=choice)

# %% [markdown]
# The quantisation error, as the paper measures it: the nuclear norm of what is lost, relative to quantising $W$ itself.

# %% tags=["claim"]
def lost(linear):
    layer, W = PiSSALinear(linear, r), linear.weight.detach().T.contiguous()
    ours = W - (nf4(layer.W_res.contiguous()) + layer.A.detach() @ layer.B.detach())
    return (torch.linalg.svdvals(ours).sum() / torch.linalg.svdvals(W - nf4(W)).sum()).item()

ratio = [sum(lost(backbones[seed][i]) for i in (0, 2, 4)) / 3 for seed in profile.seeds]
verdict_finer = finer.at_most(ratio, 1.0)

# %% tags=["claim", "hide-input"]
at_end = bt.final(runs, "test loss").mean()
bt.say(f"After {steps} steps the mean test loss is {at_end['PiSSA']:.3f} for PiSSA, {at_end['LoRA']:.3f} for LoRA, {at_end['minor']:.3f} with the weakest "
       f"directions, {at_end['random']:.3f} with random ones and {at_end['full']:.3f} for full fine-tuning. Verdicts: lower loss **{verdict_lower}**, faster "
       f"**{verdict_faster}**, finer quantisation **{verdict_finer}** (relative error {sum(ratio) / len(ratio):.2f}).")

# %% [markdown]
# The ablations say what the start is worth: they have PiSSA's architecture and both gradients from the first step, and differ only in the directions. If they did as well, it would be the scale and not the principal directions that helps.

# %% [markdown]
# ## What differs from the paper
#
# | deviation | why | which way it should move the result |
# |---|---|---|
# | a three-layer network of 64 units that reads digits, for a language model with billions of parameters | runs on a laptop; no pretrained download | its spectrum is flatter, so the principal directions hold less: smaller effect |
# | constant learning rate, no warm-up | one fewer thing to tune in each arm | favours the start with the smaller first step, LoRA |
# | exact singular value decomposition, not the randomised one | the matrices are small | none |
# | rank 4 of 64 (and of 10 in the last layer) | keeps the adapter small against the layer | larger relative rank than in the paper: differences shrink |
# | the new task turns and inverts the pictures | a shift large enough that adaptation is needed | the old principal directions matter less than for related language tasks: smaller effect |

# %% [markdown]
# ## Play
#
# Move the rank. The bars of $W^{res}$ lose their largest values one after the other; look at how slowly the rest falls.

# %% tags=["widget"]
def spectrum(rank):
    linear = backbones[profile.seeds[0]][2]
    fig, ax = bt.subplots(figsize=(5, 2.8))
    ax.plot(torch.linalg.svdvals(linear.weight.detach()).cpu(), label="W")
    ax.plot(torch.linalg.svdvals(PiSSALinear(linear, rank).W_res).cpu(), label="W_res")
    ax.set(xlabel="index", ylabel="singular value")
    ax.legend()
    return fig

bt.explore(spectrum, alt="Singular values of W and of W_res at rank {rank}: the residual starts where the {rank} largest end.", rank=[1, 2, 4, 8, 16, 32])

# %% [markdown]
# ## Exercises
#
# ### Exercise 1: count before you train (5 min, easy)

# %% tags=["exercise"]
def trainable(m, n, r):
    """The number of trainable parameters of a rank-r adapter on a layer with W of shape (m, n)."""
    ...

def check_trainable(answer):
    got = answer(12, 8, 3)
    if got is None:
        return "not yet: return a number, the entries of A and of B"
    if got == sum(p.numel() for p in PiSSALinear(nn.Linear(12, 8), 3).parameters()):
        return "not yet: W_res and the bias are frozen, do not count them"
    return "passed" if (got, answer(5, 5, 1)) == (60, 10) else "not yet: A has m r entries and B has r n"

print(check_trainable(trainable))

# %% tags=["solution", "hide-cell"]
def trainable_solution(m, n, r):
    return r * (m + n)

def trainable_wrong(m, n, r):
    return r * (m + n) + m * n + n  # counts the frozen part too

print(check_trainable(trainable_solution))

# %% [markdown]
# ### Exercise 2: hand the adapter on as a LoRA pair (15 min, medium)
#
# After training, $A'B'$ replaces $AB$. Others have $W$, not $W^{res}$. Write $\Delta W = A'B' - AB$ as one product of rank $2r$.

# %% tags=["exercise"]
def as_lora(A, B, A_new, B_new):
    """Factors (m, 2r) and (2r, n) whose product is A_new B_new - A B."""
    ...

def check_as_lora(answer):
    torch.manual_seed(0)
    A, B, A_new, B_new = torch.randn(6, 2), torch.randn(2, 5), torch.randn(6, 2), torch.randn(2, 5)
    pair = answer(A, B, A_new, B_new)
    if pair is None:
        return "not yet: return two factors, side by side and one above the other"
    left, right = pair
    if torch.allclose(left @ right, A_new @ B_new + A @ B, atol=1e-5):
        return "not yet: the old product must be taken away, look at the sign"
    return "passed" if torch.allclose(left @ right, A_new @ B_new - A @ B, atol=1e-5) else "not yet: stack A_new beside A and B_new above -B"

print(check_as_lora(as_lora))

# %% tags=["solution", "hide-cell"]
def as_lora_solution(A, B, A_new, B_new):
    return torch.cat([A_new, A], dim=1), torch.cat([B_new, -B], dim=0)

def as_lora_wrong(A, B, A_new, B_new):
    return torch.cat([A_new, A], dim=1), torch.cat([B_new, B], dim=0)  # forgets the sign

print(check_as_lora(as_lora_solution))

# %% [markdown]
# ## Further
#
# - The paper: {cite}`meng2024pissa`; its baseline {cite}`hu2021lora`; the quantiser {cite}`dettmers2023qlora`.
# - With `profile = "gpu"` the same experiment runs on a GPU, all seeds in one step.
