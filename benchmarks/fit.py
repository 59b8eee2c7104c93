"""Three trainings of 16 seeds each: a plain PyTorch loop per seed, `benchtop.fit`, and JAX.

    python benchmarks/fit.py [--only mlp cnn transformer] [--repeats 5] [--device cuda] [--out benchmarks/fit.json]

Ways. (a) The loop that most notebooks write: one seed after the other, ``torch.optim.AdamW``. (b) ``fit``. Both with one
thread or with all, whichever was faster in a trial of a few seeds (loop) or of the whole (fit). (c) JAX: ``vmap`` and
``jit``, optax, which takes the threads that it likes; skipped where it is not installed. All start from the same weights,
see the same batches and must end at the same loss.

Each measurement is a process of its own, so that its peak memory is its own. Rounds alternate between the ways; a ratio
is taken within a round, the median over rounds counts. Time runs from the first call after the imports: the choice
inside ``fit`` and the compilation of JAX are in it, and JAX is given again without. JAX finds weights and batches ready
made. Results are written after each training, so an interrupted run keeps what it has.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEEDS = range(16)
TRIAL = range(2)  # seeds of the trial that chooses the threads of the loop
LR, DECAY = 1e-3, 0.01
WORDS, LENGTH, WIDTH, HEADS, LAYERS = 32, 64, 64, 4, 2
TRAININGS = {  # steps, batch; how many times faster than (a) fit must be on 2 CPU cores and on a large GPU
    "mlp": {"what": "perceptron 64-128-128-10", "steps": 500, "batch": 64, "bars": {"cpu": 5.0, "cuda": 15.0}},
    "cnn": {"what": "convolutions 16, 32", "steps": 200, "batch": 64, "bars": {"cpu": 1.5, "cuda": 10.0}},
    "transformer": {"what": f"transformer, {LAYERS} layers, d = {WIDTH}, T = {LENGTH}", "steps": 60, "batch": 16,
                    "bars": {"cpu": 1.0, "cuda": 10.0}},
}  # fmt: skip
AGAINST_JAX = 1.5  # fit may take so many times as long as JAX with its compilation, on a CPU
SAME = 2e-2  # largest relative difference of the final loss, mean over seeds; the tests compare single seeds after few steps


# ---- the trainings, in PyTorch ----


def training(name: str, device: str):
    """(make_model, data, sample): the model, all inputs and targets, and the batches of `benchtop.fit`."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    import benchtop as bt

    batch = TRAININGS[name]["batch"]
    if name == "transformer":

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
                self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
                self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

            def forward(self, x):
                q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).transpose(-4, -2).unbind(-3)
                heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + self.out(heads.transpose(-3, -2).flatten(-2))
                return x + self.down(F.gelu(self.up(self.after(x))))

        class Transformer(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.place = nn.Embedding(WORDS, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
                self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
                self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

            def forward(self, tokens):
                return self.head(self.norm(self.blocks(self.embed(tokens) + self.place))).transpose(-1, -2)

        text = chain(20_000, torch.Generator().manual_seed(0)).to(device)
        whole = torch.stack([text[i : i + LENGTH + 1] for i in range(0, 64 * LENGTH, LENGTH)])
        data = whole[:, :-1], whole[:, 1:]
        return Transformer, data, bt.batches((text[:-1], text[1:]), batch, length=LENGTH)

    part = bt.load("digits", device=device).train
    if name == "mlp":

        def make():
            return nn.Sequential(nn.Flatten(-3), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                                 nn.Linear(128, 10))  # fmt: skip
    else:

        def make():
            return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                 nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(-3),
                                 nn.Linear(128, 10))  # fmt: skip

    return make, tuple(part), bt.batches(part, batch)


def chain(n: int, generator):
    """n words of a Markov chain: each word has four successors."""
    import torch

    follow = torch.randint(WORDS, (WORDS, 4), generator=generator)
    choices, text = torch.randint(4, (n,), generator=generator).tolist(), [0]
    for choice in choices[1:]:
        text.append(int(follow[text[-1], choice]))
    return torch.tensor(text)


def loss(model, batch):
    from torch.nn import functional as F

    return F.cross_entropy(model(batch[0]), batch[1])


def run_loop(name: str, device: str, seeds: range = SEEDS) -> dict:
    """(a) What most notebooks write."""
    import torch

    make, data, sample = training(name, device)
    start, losses = time.perf_counter(), []
    for seed in seeds:
        torch.manual_seed(seed)
        model, generator = make().to(device), torch.Generator(device).manual_seed(seed)
        optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
        for _ in range(TRAININGS[name]["steps"]):
            optimiser.zero_grad()
            loss(model, sample(generator)).backward()
            optimiser.step()
        with torch.no_grad():
            losses.append(loss(model, data).item())
    return {"seconds": time.perf_counter() - start, "losses": losses}


def run_fit(name: str, device: str, threads: int) -> dict:
    """(b) Ours."""
    import benchtop as bt

    make, data, sample = training(name, device)
    steps = TRAININGS[name]["steps"]
    start = time.perf_counter()
    run = bt.fit(make, loss, sample, steps=steps, seeds=SEEDS, lr=LR, weight_decay=DECAY, device=device, threads=threads,
                 evaluate=lambda model: {"loss": loss(model, data)}, eval_every=steps)  # fmt: skip
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "losses": bt.final([run], "loss")["model"].tolist(), "path": run.path, "why": run.why}


# ---- the same in JAX ----


def prepare(name: str, device: str, file: Path) -> None:
    """Weights, batches and data as arrays: JAX starts where the others start."""
    import numpy as np
    import torch

    make, data, sample = training(name, device)
    models, batches = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        models.append(make())
        generator = torch.Generator(device).manual_seed(seed)
        rows = torch.stack([sample.rows(generator) for _ in range(TRAININGS[name]["steps"])])
        batches.append(rows.cpu().numpy().astype(np.int32))
    arrays = {k: torch.stack([dict(m.named_parameters())[k].detach() for m in models]).numpy() for k, _ in
              models[0].named_parameters()}  # fmt: skip
    parts = {"part0": sample.part[0], "part1": sample.part[1], "data0": data[0], "data1": data[1]}
    parts = {k: t.cpu().numpy().astype(np.float32 if t.is_floating_point() else np.int32) for k, t in parts.items()}
    np.savez(file, rows=np.stack(batches, 1), **{f"weight.{k}": v for k, v in arrays.items()}, **parts)


def jax_model(name: str):
    """model(weights by their names in PyTorch, inputs) -> logits (..., classes)."""
    import jax
    from jax import numpy as jnp

    def linear(w, key, x):
        y = x @ w[f"{key}.weight"].T
        return y + w[f"{key}.bias"] if f"{key}.bias" in w else y

    def mlp(w, x):
        x = x.reshape(len(x), -1)
        return linear(w, "5", jax.nn.relu(linear(w, "3", jax.nn.relu(linear(w, "1", x)))))

    def convolve(w, key, x):
        y = jax.lax.conv_general_dilated(
            x, w[f"{key}.weight"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        y = jax.nn.relu(y + w[f"{key}.bias"][:, None, None])
        n, c, h, wide = y.shape
        return y.reshape(n, c, h // 2, 2, wide // 2, 2).max((3, 5))

    def cnn(w, x):
        x = convolve(w, "3", convolve(w, "0", x))
        return linear(w, "7", x.reshape(len(x), -1))

    def norm(w, key, x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[f"{key}.weight"] + w[f"{key}.bias"]

    def transformer(w, tokens):
        x = w["embed.weight"][tokens] + w["place"]
        n, length, d = x.shape
        seen = jnp.tril(jnp.ones((length, length), bool))
        for i in range(LAYERS):
            qkv = linear(w, f"blocks.{i}.qkv", norm(w, f"blocks.{i}.before", x))
            q, k, v = qkv.reshape(n, length, 3, HEADS, d // HEADS).transpose(2, 0, 3, 1, 4)
            scores = jnp.where(seen, q @ k.swapaxes(-1, -2) * (d // HEADS) ** -0.5, -jnp.inf)
            heads = (jax.nn.softmax(scores, -1) @ v).transpose(0, 2, 1, 3).reshape(n, length, d)
            x = x + linear(w, f"blocks.{i}.out", heads)
            inner = jax.nn.gelu(linear(w, f"blocks.{i}.up", norm(w, f"blocks.{i}.after", x)), approximate=False)
            x = x + linear(w, f"blocks.{i}.down", inner)
        return linear(w, "head", norm(w, "norm", x))

    return {"mlp": mlp, "cnn": cnn, "transformer": transformer}[name]


def run_jax(name: str, device: str, file: Path) -> dict:
    """(c) vmap over the seeds, jit of the whole step."""
    import jax
    import numpy as np
    import optax
    from jax import numpy as jnp

    found = np.load(file)
    model, optimiser = jax_model(name), optax.adamw(LR, weight_decay=DECAY)

    def objective(w, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(w, x), y).mean()

    def train() -> tuple[float, list[float]]:
        def step(w, state, rows):
            gradient = jax.grad(objective)(w, inputs[rows], targets[rows])
            change, state = optimiser.update(gradient, state, w)
            return optax.apply_updates(w, change), state

        start = time.perf_counter()
        inputs, targets = jnp.asarray(found["part0"]), jnp.asarray(found["part1"])
        w = {k.removeprefix("weight."): jnp.asarray(found[k]) for k in found.files if k.startswith("weight.")}
        state = jax.vmap(optimiser.init)(w)
        for rows in found["rows"]:
            w, state = move(step)(w, state, rows)
        losses = final(w, found["data0"], found["data1"])
        return time.perf_counter() - start, losses.tolist()

    compiled = {}

    def move(step):
        return compiled.setdefault("step", jax.jit(jax.vmap(step), donate_argnums=(0, 1)))

    final = jax.jit(jax.vmap(objective, in_axes=(0, None, None)))
    (seconds, losses), (again, _) = train(), train()
    out = {"seconds": seconds, "without compilation": again, "losses": losses}
    stats = jax.local_devices()[0].memory_stats() if device == "cuda" else None
    return out | ({"peak_bytes": stats["peak_bytes_in_use"]} if stats else {})


# ---- a measurement in its own process ----


def work(options: argparse.Namespace) -> None:
    name, way, threads = options.worker
    if way == "prepare":
        return prepare(name, options.device, options.file)
    if way == "jax":
        found = run_jax(name, options.device, options.file)
    else:
        import torch
        import torch._dynamo

        import benchtop as bt

        assert bt.fit and torch._dynamo, "imported now (the first optimiser would do it): it is not what is measured"
        torch.set_num_threads(int(threads))
        torch.zeros(1, device=options.device)
        run = {"loop": run_loop, "trial": functools.partial(run_loop, seeds=TRIAL),
               "fit": functools.partial(run_fit, threads=int(threads))}[way]  # fmt: skip
        found = run(name, options.device)
        if options.device == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    found.setdefault("peak_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    print(json.dumps(found))
    return None


def measure(name: str, way: str, threads: int, options: argparse.Namespace) -> dict | None:
    command = [sys.executable, __file__, "--worker", name, way, str(threads), "--device", options.device,
               "--file", str(options.file)]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=options.limit, check=True)
    except subprocess.TimeoutExpired:
        busy = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        raise SystemExit(
            f"{name}, {way}: over {options.limit:g} s ({busy}); wait for a quiet machine or raise --limit"
        ) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{name}, {way}: its process ended with {error.returncode}, see its error above") from None
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def compare(name: str, options: argparse.Namespace) -> dict:
    """All ways, round by round."""
    cores = os.cpu_count() or 1
    best = {way: threads_of(name, way, kind, cores, options) for way, kind in (("loop", "trial"), ("fit", "fit"))}
    ways = {"loop": ("loop", best["loop"]), "fit": ("fit", best["fit"])}
    if importlib.util.find_spec("jax") and importlib.util.find_spec("optax"):
        ways["jax"] = ("jax", cores)
        measure(name, "prepare", cores, options)
    else:
        print("JAX is left out: it is not installed (pip install 'benchtop[jax]')", flush=True)
    rounds: dict[str, list[dict]] = {way: [] for way in ways}
    for r in range(options.repeats):
        for way, (kind, threads) in ways.items():
            rounds[way].append(found := measure(name, kind, threads, options))
            print(f"{name}, round {r + 1} of {options.repeats}, {way}: {found['seconds']:.2f} s", flush=True)
    return summary(name, rounds) | {"threads": best}


def threads_of(name: str, way: str, kind: str, cores: int, options: argparse.Namespace) -> int:
    """One thread or all? Whichever was faster, three times each in turn."""
    trials = {threads: [] for threads in sorted({1, cores})}
    for _ in range(3 if len(trials) > 1 else 0):
        for threads, seconds in trials.items():
            seconds.append(measure(name, kind, threads, options)["seconds"])
    best = min(trials, key=lambda threads: statistics.median(trials[threads] or [0]))
    shown = ", ".join(f"{statistics.median(s):.2f} s with {t}" for t, s in trials.items() if s)
    print(f"{name}, threads of {way}: {best} ({shown or 'one core, untried'})", flush=True)
    return best


def summary(name: str, rounds: dict[str, list[dict]]) -> dict:
    """Medians, ratios within rounds, and the largest difference of a seed's loss from the loop's."""

    def median(way: str, key: str = "seconds") -> float:
        return statistics.median(found[key] for found in rounds[way])

    def ratio(way: str, key: str = "seconds") -> float:
        return statistics.median(a[key] / b["seconds"] for a, b in zip(rounds[way], rounds["fit"]))

    reference, out = statistics.mean(rounds["loop"][0]["losses"]), {}
    for way, founds in rounds.items():
        apart = max(abs(statistics.mean(found["losses"]) / reference - 1) for found in founds)
        out[way] = {"seconds": median(way), "each": [round(found["seconds"], 4) for found in founds],
                    "peak_bytes": round(median(way, "peak_bytes")), "loss": statistics.mean(founds[0]["losses"]),
                    "apart": apart}  # fmt: skip
        out[way] |= {key: founds[0][key] for key in ("path", "why") if key in founds[0]}
    times = {"loop": ratio("loop")}
    if "jax" in rounds:
        out["jax"]["without compilation"] = median("jax", "without compilation")
        times |= {"jax": ratio("jax"), "jax without compilation": ratio("jax", "without compilation")}
    about = {key: TRAININGS[name][key] for key in ("what", "steps", "batch")} | {"seeds": len(SEEDS)}
    return about | {"ways": out, "times as fast as": times}


def table(found: dict[str, dict]) -> str:
    lines = [f"{'':14}{'way':24}{'seconds':>9}{'fit is':>9}{'peak MB':>9}{'loss':>9}"]
    for name, training in found.items():
        rows = [(way, one["seconds"], one) for way, one in training["ways"].items()]
        if "jax" in training["ways"]:
            one = training["ways"]["jax"]
            rows.append(("jax without compilation", one["without compilation"], one))
        for way, seconds, one in rows:
            times = training["times as fast as"].get(way, 1.0)
            lines.append(
                f"{name:14}{way:24}{seconds:9.2f}{times:8.2f}x{one['peak_bytes'] / 1e6:9.0f}{one['loss']:9.4f}"
            )
    return "\n".join(lines)


def misses(found: dict[str, dict], device: str) -> list[str]:
    out = []
    for name, training in found.items():
        times, bar = training["times as fast as"], TRAININGS[name]["bars"][device]
        if times["loop"] < bar:
            out.append(f"{name}: {times['loop']:.2f}x the loop, the bar is {bar:g}x")
        if device == "cpu" and times.get("jax", 1) < 1 / AGAINST_JAX:
            out.append(f"{name}: takes {1 / times['jax']:.2f} times as long as JAX, the bar is {AGAINST_JAX:g}")
        out += [f"{name}: {way} ends at another loss ({one['apart']:.1e} apart)" for way, one in training["ways"].items()
                if one["apart"] > SAME]  # fmt: skip
    return out


def machine(device: str) -> dict:
    code = "import torch; print(torch.cuda.get_device_name())"
    if device == "cuda":
        name = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    else:
        name = f"{os.cpu_count()} cores, {processor()}"
    packages = ("torch", "jax", "optax")
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    return {"device": name, "python": platform.python_version(), **versions, "load before": round(os.getloadavg()[0], 2),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat()}  # fmt: skip


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if (
        info.exists()) else []  # fmt: skip
    return names[0] if names else platform.machine()


def main() -> None:
    here = Path(__file__).with_suffix(".json")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one measurement may take")
    parser.add_argument(
        "--out", type=Path, help="default for all trainings: fit.json beside this file, an entry a device"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    if options.out is None and set(options.only) == set(TRAININGS):
        options.out = here
    if os.getloadavg()[0] > 0.5:
        print(
            f"the machine is not quiet (load {os.getloadavg()[0]:.1f}): times will be too long, ratios uncertain",
            flush=True,
        )
    entry = machine(options.device) | {"repeats": options.repeats, "trainings": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            options.file = Path(folder, f"{name}.npz")
            entry["trainings"][name] = compare(name, options)
            if options.out:
                known = json.loads(options.out.read_text()) if options.out.exists() else {}
                options.out.write_text(json.dumps(known | {options.device: entry}, indent=1) + "\n")
    print(table(entry["trainings"]))
    if missed := misses(entry["trainings"], options.device):
        raise SystemExit("\n".join(missed))
    return None


if __name__ == "__main__":
    main()
