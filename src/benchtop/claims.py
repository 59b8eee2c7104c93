"""Claims as data: a sentence, the rule that judges it, and a verdict that may say no.

Every form of claim comes down to one number a seed, the *gain*: how far the seed lies on the claim's side of the
threshold that was fixed in advance. One rule judges them all (`judge`):

- **holds**: the 95 % BCa bootstrap interval of the mean gain lies above zero and the exact sign-flip test has p < 0.05;
- **fails**: the interval lies below zero and p < 0.05;
- **open**: anything else.

Sources: Efron (1987), "Better bootstrap confidence intervals"; Fisher (1935), "The design of experiments", section 21.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from benchtop import profile, report
from benchtop.plots import forest, show

FEWEST = 6  # with five pairs the smallest two-sided sign-flip p-value is 2/32 > 0.05: no verdict could ever be reached
LEVEL = 0.95


@dataclass(frozen=True)
class Verdict:
    """What became of a claim. ``effect``, ``low`` and ``high`` are in the claim's own units, ``gain`` is per seed."""

    outcome: str  # holds | open | fails | not measured
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    n: int = 0

    def __str__(self) -> str:
        return self.outcome


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % BCa bootstrap interval of the mean of ``values`` (n,); a point when all are equal."""
    values = np.asarray(values, dtype=float)
    if np.ptp(values) <= 1e-12 * np.abs(values).max():  # BCa is undefined without spread
        return float(values.mean()), float(values.mean())
    result = stats.bootstrap((values,), np.mean, confidence_level=LEVEL, method="BCa", random_state=0)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def sign_flip(values: np.ndarray) -> float:
    """Two-sided p-value of the sign-flip test that the mean is zero: exact up to 16 values, sampled (2^16) beyond."""
    values = np.asarray(values, dtype=float)
    test = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=2**16, vectorized=True, random_state=0
    )
    return float(test.pvalue)


def judge(gain: Sequence[float]) -> tuple[str, float, float, float]:
    """(outcome, low, high, p) of one gain per seed, by the rule at the top of this module."""
    gain = np.asarray(gain, dtype=float)
    low, high = interval(gain)
    p = sign_flip(gain)
    if p < 0.05 and low > 0:
        return "holds", low, high, p
    if p < 0.05 and high < 0:
        return "fails", low, high, p
    return "open", low, high, p


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, made testable before the result is seen.

    ``metric``, ``better`` and ``than`` name a column and two arms for `test`; ``margin`` is the least gain that counts,
    in the metric's units; ``paper`` says where the paper claims it; ``stand_in`` marks a claim that only a stand-in for
    the real setting can be tested on.
    """

    statement: str
    metric: str = ""
    better: str = ""
    than: str = ""
    lower_is_better: bool = True
    margin: float = 0.0
    paper: str = ""
    stand_in: bool = False

    def test(self, results, tuning=None) -> Verdict:
        """Paired comparison of two arms: does ``better`` beat ``than`` by more than ``margin``?

        ``results``: a list of `fit` runs, or a DataFrame with one row per seed and one column per arm. ``tuning``: the
        choice of `best`; grids, tuned values and tuning seeds go into the record. Raises ValueError for a missing arm,
        a missing value or fewer than 6 seeds.
        """
        table = _paired(results, self)
        sign = -1 if self.lower_is_better else 1
        effect = sign * (table[self.better] - table[self.than]).to_numpy()
        word = "lower" if self.lower_is_better else "higher"
        return self._conclude(
            "difference", effect, effect - self.margin, table.index, threshold=self.margin,
            values={arm: table[arm].tolist() for arm in (self.better, self.than)},
            tuning=_tuning_record(tuning, (self.better, self.than)),
            label=f"{self.metric}: {self.better} {word} than {self.than} by",
        )  # fmt: skip

    def matches(self, predicted, measured, *, rtol: float, scale=None, seeds: Sequence[int] | None = None) -> Verdict:
        """Agreement with a formula: is the largest relative deviation of a seed below ``rtol``?

        ``measured``: (seeds, ...); ``predicted``: broadcast against it. A deviation is ``|measured - predicted| /
        scale``; ``scale`` defaults to ``|predicted|``, point by point.
        """
        measured, predicted = _array(measured), _array(predicted)
        scale = np.abs(predicted) if scale is None else _array(scale)
        error = np.abs(measured - predicted) / scale
        error = error.reshape(len(measured), -1).max(axis=1)
        return self._conclude("agreement", error, rtol - error, seeds, threshold=rtol, values={"deviation": error.tolist()},
                              label="largest relative deviation")  # fmt: skip

    def trend(self, x, y, *, sign: int = 1, seeds: Sequence[int] | None = None) -> Verdict:
        """Monotone dependence: does the least-squares slope of y (seeds, k) over x (k,) have this sign in the mean?

        The effect is the slope times ``sign``, in units of y per unit of x; it must exceed ``margin``.
        """
        x, y = _array(x), _array(y)
        if y.ndim != 2 or y.shape[1] != len(x):
            raise ValueError(f"trend got y of shape {y.shape} for x of length {len(x)}: expected (seeds, {len(x)})")
        centred = x - x.mean()
        slope = sign * (y @ centred) / (centred @ centred)
        return self._conclude("trend", slope, slope - self.margin, seeds, threshold=self.margin,
                              values={"slope": slope.tolist()},
                              label=f"{'rise' if sign > 0 else 'fall'} per unit")  # fmt: skip

    def at_most(self, value, bound: float, *, seeds: Sequence[int] | None = None) -> Verdict:
        """A bound: is ``value`` (seeds,) at most ``bound``?

        For a theorem pass each seed's worst case: a bound that one seed breaks cannot hold, whatever the mean says.
        """
        value = _array(value)
        if value.ndim != 1:
            raise ValueError(f"at_most got values of shape {value.shape}: expected one number per seed, its worst case")
        return self._conclude("bound", value, bound - value, seeds, threshold=bound, values={"value": value.tolist()},
                              label=self.metric, every=True)  # fmt: skip

    def _conclude(self, form, effect, gain, seeds, *, threshold, values, label, tuning=None, every=False) -> Verdict:
        running = profile.active()
        seeds = list(seeds) if seeds is not None else list(running.seeds) if running else list(range(len(effect)))
        if len(seeds) != len(effect):
            raise ValueError(f"claim {self.statement!r} got {len(effect)} results for {len(seeds)} seeds: pass seeds=")
        common = asdict(self) | {"form": form, "seeds": [int(s) for s in seeds], "threshold": threshold}
        if running and running.name == "smoke":
            report.emit("claim", **common, outcome="not measured", tuning=tuning)
            print(f"not measured: {self.statement} (profile smoke proves that the code runs, nothing more)")
            return Verdict("not measured")
        if len(effect) < FEWEST:
            raise ValueError(
                f"claim {self.statement!r} has {len(effect)} seeds: a verdict needs at least {FEWEST}, better 8"
            )
        if not np.isfinite(effect).all():
            bad = [s for s, e in zip(seeds, effect) if not np.isfinite(e)]
            raise ValueError(f"claim {self.statement!r} has no finite result for seed {bad[0]}: look at that run first")
        outcome, _, _, p = judge(gain)
        if every and outcome == "holds" and min(gain) < 0:
            outcome = "open"
        low, high = interval(effect)
        verdict = Verdict(outcome, float(np.mean(effect)), low, high, p, len(effect))
        report.emit("claim", **common, outcome=outcome, effect=verdict.effect, low=low, high=high, p=p, n=verdict.n,
                    gain=np.asarray(gain).tolist(), values=values, tuning=tuning)  # fmt: skip
        _present(self, verdict, label, effect, values, seeds, threshold)
        return verdict


def _present(claim: Claim, v: Verdict, label: str, effect, values: dict, seeds: list[int], threshold: float) -> None:
    """One sentence, a table and a forest plot."""
    numbers = f"{label} {v.effect:.3g} [{v.low:.3g}, {v.high:.3g}]"
    print(f"{v.outcome}: {claim.statement}\n{numbers} (threshold {threshold:g}, {v.n} seeds, sign-flip p = {v.p:.3g})")
    table = pd.DataFrame(values, index=pd.Index([int(s) for s in seeds], name="seed"))
    text = table.T.to_string(float_format="{:.4g}".format)
    html = table.T.to_html(float_format="{:.4g}".format, border=0, classes="benchtop-claim")
    report.display({"text/html": html, "text/plain": text})
    row = {"label": "", "effect": v.effect, "low": v.low, "high": v.high, "values": effect, "threshold": threshold}
    alt = f"Forest plot: {numbers}, the threshold {threshold:g} as a dotted line, {v.n} seeds as dots; verdict {v.outcome}."
    show(forest([row], xlabel=f"{label} (mean, 95 % interval, {v.n} seeds)"), alt=alt)


def _paired(results, claim: Claim) -> pd.DataFrame:
    """One row per seed, one column per arm, no holes."""
    if not isinstance(results, pd.DataFrame):
        from benchtop.train import final

        results = final(results, claim.metric)
    for arm in (claim.better, claim.than):
        if arm not in results.columns:
            known = ", ".join(map(repr, results.columns))
            raise ValueError(f"claim {claim.statement!r} names the arm {arm!r}: the results hold {known}")
    table = results[[claim.better, claim.than]]
    if table.isna().to_numpy().any():
        row = table[table.isna().any(axis=1)]
        arm = row.columns[row.iloc[0].isna()][0]
        raise ValueError(
            f"claim {claim.statement!r}: arm {arm!r} has no result for seed {row.index[0]}, so it cannot be paired"
        )
    return table


def _tuning_record(tuning, arms: Sequence[str]) -> dict[str, Any] | None:
    """The part of a `best` record that concerns these arms."""
    if tuning is None:
        return None
    record = tuning.record()
    return {arm: record[arm] for arm in arms if arm in record}


def _array(values) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=float)
