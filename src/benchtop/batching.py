"""What plain PyTorch needs so that one vectorised call serves all replicas: attention, and randomness of their own."""

import math
import warnings
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T + mask) v for q (..., T, d), k (..., S, d), v (..., S, e); ``scale`` defaults to 1/sqrt(d).

    ``causal`` hides keys later than the query; ``mask`` (broadcast to (..., T, S)) is boolean, True where a query may
    look, or is added to the scores. Two matrix products: ``scaled_dot_product_attention`` has no batching rule on CPU
    and would loop over the replicas. Source: Vaswani et al. (2017), equation 1.
    """
    return _attention(q, k, v, mask, causal, scale, weigh=lambda weights: weights)


def _attention(q, k, v, mask, causal, scale, weigh) -> Tensor:
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return weigh(scores.softmax(-1)) @ v


# ---- random numbers as a function of (key, call, position) ----


def _wrapped(number: int) -> int:
    """A 64-bit constant as the signed number that torch can hold."""
    return number - 2**64 if number >= 2**63 else number


GOLDEN, FIRST, SECOND = map(_wrapped, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(z: Tensor) -> Tensor:
    """64 well-mixed bits of each number. The finaliser of SplitMix64, Steele, Lea and Flood (2014)."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * FIRST  # a signed shift copies the sign: the mask takes the copies away
    z = (z ^ ((z >> 27) & (2**37 - 1))) * SECOND
    return z ^ ((z >> 31) & (2**33 - 1))


def branch(key: Tensor, number: int | Tensor) -> Tensor:
    """The key of the numbered stream below ``key`` (int64)."""
    return mix(key + (number * GOLDEN if isinstance(number, Tensor) else _wrapped(number * GOLDEN % 2**64)))


def uniform(key: Tensor, shape: torch.Size) -> Tensor:
    """Numbers in [0, 1) of the given shape, fixed by ``key`` (scalar int64) alone."""
    position = torch.arange(shape.numel(), device=key.device)
    return ((branch(key, position) >> 40) & (2**24 - 1)).float().mul(2.0**-24).view(shape)


def cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
                  label_smoothing=0.0):  # fmt: skip
    """`torch.nn.functional.cross_entropy`, which vmap takes through a decomposition in Python; other options go there."""
    classes = not target.is_floating_point() and reduction in ("mean", "sum", "none")
    if not classes or label_smoothing or any(option is not None for option in (weight, size_average, reduce)):
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    dim, kept = min(1, input.dim() - 1), target != ignore_index
    rows = torch.where(kept, target, 0).unsqueeze(dim)
    losses = torch.where(kept, -input.log_softmax(dim).gather(dim, rows).squeeze(dim), 0.0)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / kept.sum()


def taken_apart(function: Callable) -> Callable:
    """A function that torch composes of others, for which vmap has no rule: at a level of grad it falls into its pieces."""
    return lambda input, *rest: vjp(lambda input: function(input, *rest), input)[0]


class ReplicaRules(TorchFunctionMode):
    """Inside it, a replica's dropout and noise come from its own generator, stacked or alone.

    vmap cannot draw from one generator per replica, and its ``randomness="different"`` gives other numbers than a model
    alone would see. So a draw is a function of (``key``, number of the call, position): ``key`` (scalar int64, made of
    seed and step) is vmapped like a parameter. ``stacked`` also swaps what vmap would run replica by replica.
    """

    def __init__(self, key: Tensor, stacked: bool):
        super().__init__()
        self.key, self.stacked, self.calls = key, stacked, 0
        self.rules = {
            F.dropout: self.dropout,
            F.dropout1d: lambda *a, **k: self.dropout(*a, **k, per_channel=1),
            F.dropout2d: lambda *a, **k: self.dropout(*a, **k, per_channel=2),
            F.dropout3d: lambda *a, **k: self.dropout(*a, **k, per_channel=3),
            torch.rand_like: self.rand_like,
            torch.randn_like: self.randn_like,
            F.multi_head_attention_forward: self.multi_head_attention,
        }
        if stacked:
            self.rules |= {F.scaled_dot_product_attention: self.attention, torch.lstm: self.lstm}
            self.rules |= {F.cross_entropy: cross_entropy}
            self.rules |= {function: taken_apart(function) for function in (torch.gru, torch.rnn_tanh, torch.rnn_relu)}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.rules.get(function, function)(*args, **(kwargs or {}))

    def draw(self, shape: torch.Size) -> Tensor:
        self.calls += 1
        return uniform(branch(self.key, self.calls), shape)

    def dropout(self, input, p=0.5, training=True, inplace=False, per_channel=0):  # names of torch.nn.functional
        if not training or p == 0:
            return input
        shape = torch.Size([*input.shape[: input.dim() - per_channel], *[1] * per_channel])
        return input * ((self.draw(shape) >= p) / max(1 - p, 1e-30)).to(input.dtype)

    def rand_like(self, input):
        return self.draw(input.shape).to(input.dtype)

    def randn_like(self, input):
        """Box and Muller (1958)."""
        radius = (-2 * (1 - self.draw(input.shape)).log()).sqrt()
        return (radius * (2 * math.pi * self.draw(input.shape)).cos()).to(input.dtype)

    def attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        if enable_gqa:
            raise NotImplementedError("grouped-query attention has no batching rule here: repeat the keys and values")
        return _attention(query, key, value, attn_mask, is_causal, scale, lambda w: self.dropout(w, dropout_p))

    def multi_head_attention(self, *args, **kwargs):
        """torch's own function, whose inner calls a mode does not see."""
        rules = {"dropout": self.dropout}
        if self.stacked or kwargs.get("dropout_p", args[10] if len(args) > 10 else 0.0):
            rules["scaled_dot_product_attention"] = self.attention
        with mock.patch.multiple(F, **rules):
            return F.multi_head_attention_forward(*args, **kwargs)

    def lstm(self, *args):
        """In its plain form: that of mkldnn has no batching rule."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the switch speaks of Intel's GPUs
            with torch.backends.mkldnn.flags(enabled=False):
                return taken_apart(torch.lstm)(*args)
