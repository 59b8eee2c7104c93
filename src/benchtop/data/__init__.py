"""Every chapter's data in one line, on the device, split the same way everywhere.

``load("digits", device="cuda")`` gives a :class:`Split`. What there is, from where and under which licence stands in
``registry.json``; ``benchtop data list`` prints it. Importing this module costs nothing: torch and the readers are
imported by the first ``load``.
"""

import difflib
import functools
import hashlib
import json
from dataclasses import dataclass, field
from importlib import import_module, resources
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch


class DataError(RuntimeError):
    """A data set cannot be had as declared; the message is one line: what, expected, cure."""


class UnknownData(LookupError):
    """No data set has this name; the message lists near ones."""


class Part(NamedTuple):
    """Inputs and what to predict from them, row by row."""

    x: "torch.Tensor"
    y: "torch.Tensor"


@dataclass(frozen=True)
class Split:
    """A data set on the device; unpacks into ``train, validation, test``, each a :class:`Part` ``(x, y)``.

    ======== ============================================ ===========================================
    kind     x                                            y
    ======== ============================================ ===========================================
    images   float32 (n, channels, height, width), 0..1   int64 (n,) class, or per-pixel / soft labels
    table    float32 (n, columns), standardised           int64 (n,) class, or float32 targets
    text     int64 (tokens,) one long text                the next token, (tokens,)
    series   float32 (steps, channels), standardised      the next step, (steps, channels)
    ======== ============================================ ===========================================

    Standardised means by mean and standard deviation of the training part; ``extra["x mean"]``, ``extra["x std"]``
    (and ``"y mean"``, ``"y std"`` for float targets) take numbers back to their units.
    """

    train: Part
    validation: Part
    test: Part
    name: str
    kind: str
    classes: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    licence: str = ""
    source: str = ""
    checksum: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __iter__(self):
        return iter((self.train, self.validation, self.test))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example: (1, 8, 8) for a picture; () for one token."""
        return tuple(self.train.x.shape[1:])

    def decode(self, ids) -> str:
        """Text of token ids (any shape, flattened)."""
        return self.extra.get("joiner", "").join(self.vocabulary[i] for i in ids.flatten().tolist())


class Raw(NamedTuple):
    """What a reader returns, still in NumPy: the checksum covers these arrays, so they must be exact everywhere."""

    x: "np.ndarray"
    y: "np.ndarray | None" = None  # None: a sequence, y is what comes next
    classes: tuple[str, ...] = ()
    rows: "tuple[np.ndarray, np.ndarray, np.ndarray] | None" = None  # an official split; None: by hash
    vocabulary: tuple[str, ...] = ()
    extra: dict[str, Any] | None = None


def load(name: str, device: "str | torch.device" = "cpu", size: int | None = None) -> Split:
    """The data set ``name`` on ``device``, with its fixed split.

    ``size`` keeps the first so many training rows of the fixed order (a smaller size is a subset of a larger one);
    validation and test stay whole, so that scores of different sizes compare. Raises :class:`UnknownData` or
    :class:`DataError`.
    """
    import torch

    from benchtop.report import emit

    entry = describe(name)
    raw = read(name)
    checksum = digest(raw)
    if "checksum" in entry and checksum != entry["checksum"]:
        raise DataError(
            f"{name}: its content has checksum {checksum}, expected {entry['checksum']}: "
            f"{entry['source']} ships other data than the book ran on; install the version in constraints.txt"
        )
    rows = raw.rows or split_rows(name, len(raw.x))
    if size is not None:
        if not 1 <= size <= len(rows[0]):
            raise DataError(f"{name}: size={size}, expected 1 to {len(rows[0])}, the number of training rows")
        rows = (rows[0][:size], *rows[1:])

    def tensor(array: "np.ndarray") -> torch.Tensor:
        """Small integers travel to the device as they are and become float there."""
        moved = torch.from_numpy(array).to(device)
        if array.dtype.kind == "f":
            return moved.float()
        return moved.float().div_(entry.get("peak", 255)) if array.dtype == "uint8" else moved.long()

    if raw.y is None:
        parts = [Part(values[:-1], values[1:]) for values in (tensor(raw.x[r]) for r in rows)]
    else:
        parts = [Part(tensor(raw.x[r]), tensor(raw.y[r])) for r in rows]
    emit("data", name=name, checksum=checksum)
    return Split(
        *parts,
        name=name,
        kind=entry["kind"],
        classes=raw.classes,
        vocabulary=raw.vocabulary,
        licence=entry["licence"],
        source=entry["source"],
        checksum=checksum,
        extra={k: tensor(v) if hasattr(v, "dtype") else v for k, v in (raw.extra or {}).items()},
    )


def split_rows(name: str, n: int, fractions: tuple[float, float] = (0.6, 0.2)) -> "tuple[np.ndarray, ...]":
    """Rows of train, validation and test: ordered by a hash, so that no version of a random generator matters."""
    import numpy as np

    order = sorted(range(n), key=lambda i: hashlib.blake2b(f"{name} {i}".encode(), digest_size=8).digest())
    first, second = (round(n * f) for f in (fractions[0], sum(fractions)))
    return tuple(np.array(part, dtype=np.int64) for part in (order[:first], order[first:second], order[second:]))


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def digest(raw: Raw) -> str:
    """Checksum of what a reader returned: types, shapes and bytes of all arrays, and the words."""
    state = hashlib.sha256(repr([raw.classes, raw.vocabulary, sorted(raw.extra or ())]).encode())
    arrays = [
        raw.x,
        raw.y,
        *(raw.rows or ()),
        *(v for _, v in sorted((raw.extra or {}).items()) if hasattr(v, "dtype")),
    ]
    for array in arrays:
        if array is not None:
            state.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
    return state.hexdigest()[:16]


# ---- registry ----


@functools.cache
def registry() -> dict[str, dict[str, Any]]:
    """Every set by name, as ``registry.json`` declares it."""
    return json.loads(resources.files(__name__).joinpath("registry.json").read_text(encoding="utf-8"))


def names() -> list[str]:
    """Names that ``load`` takes."""
    return list(registry())


def describe(name: str) -> dict[str, Any]:
    """What the registry says of a set: kind, source, licence, checksum, ..."""
    if name not in registry():
        near = difflib.get_close_matches(name, names(), 3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "`benchtop data list` shows what there is"
        raise UnknownData(f"unknown data set {name!r}: {hint}")
    return registry()[name]


def checksums(wanted: list[str]) -> dict[str, str]:
    """Declared checksum of each set, without loading anything: the part of a chapter's freshness key that is data.

    The text of the standard library differs a little with the version of Python. Its declared checksum covers the
    selection (which modules, which characters), so that a record stays fresh under another Python; the record keeps
    the checksum of the text it really saw.
    """
    return {
        name: entry.get("checksum") or short_hash(entry["modules"]) for name in wanted for entry in [describe(name)]
    }


def read(name: str) -> Raw:
    """Call the reader that the registry names, ``module.function``."""
    module, function = describe(name)["reader"].split(".")
    return getattr(import_module(f"{__name__}.{module}"), function)(name)
