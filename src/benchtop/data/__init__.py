"""Every chapter's data in one line, on the device, split the same way everywhere.

``load("digits", device="cuda")`` gives a :class:`Split`. What there is, from where and under which licence stands in
``registry.json``; ``benchtop data list`` prints it. Importing this module costs nothing: torch and the readers are
imported by the first ``load``.
"""

import difflib
import fnmatch
import functools
import hashlib
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, field
from importlib import import_module, resources
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch

MALFORMED = (  # what the readers' libraries raise on bad bytes
    *(ValueError, LookupError, ArithmeticError, TypeError, AttributeError, OSError, EOFError, MemoryError),
    *(NotImplementedError, RuntimeError, AssertionError, StopIteration),
    *(struct.error, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile),
)


class DataError(ValueError):
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

    =========== ============================================== ==================================================
    kind        x                                              y
    =========== ============================================== ==================================================
    images      float32 (n, channels, height, width) in 0..1   int64 (n,) class, or (n, height, width) per pixel
    table       float32 (n, columns), standardised             int64 (n,) class, or float32 targets, standardised
    text        int64 (tokens,), one long text                 the next token, (tokens,)
    sentences   int64 (n, longest), 0 is padding               int64 (n,) class
    lines       int64 (n, longest), 0 is padding               the next token, (n, longest)
    pairs       int64 (n, longest), 0 is padding               int64 (n, longest of the answers)
    series      float32 (steps, channels), standardised        the next step, (steps, channels)
    graph       int64 (n,) numbers of nodes                    int64 (n,) class of the node
    graphs      int64 (n,) numbers of graphs                   int64 (n,) class of the graph
    ratings     int64 (n, 2) user and item                     float32 (n,) rating
    =========== ============================================== ==================================================

    Other kinds say what x and y are in their reader's docstring. Standardised means by mean and standard deviation of
    the training part, column by column (a column of only 0 and 1 stays); ``extra["scale"]`` has ``x`` and ``y`` pairs
    (mean, standard deviation) that take numbers back to their units. ``extra`` also has what belongs to a kind: a
    graph's "features" and "edges" (2, edges), a table's "columns". Arrays in it that go by row follow the set's own
    order: index them with ``rows`` (three tensors, train, validation, test).
    """

    train: Part
    validation: Part
    test: Part
    name: str
    kind: str
    rows: tuple["torch.Tensor", ...]
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
    """What a reader returns, still in NumPy and exact on every platform: the checksum covers it."""

    x: "np.ndarray"
    y: "np.ndarray | None" = None  # None: a sequence, y is what comes next
    classes: tuple[str, ...] = ()
    rows: "tuple[np.ndarray | None, ...] | None" = None  # official train, validation, test; None: ours, by hash
    vocabulary: tuple[str, ...] = ()
    extra: "dict[str, Any] | None" = None


def load(name: str, device: "str | torch.device" = "cpu", size: int | None = None) -> Split:
    """The data set ``name`` on ``device``, with its fixed split.

    ``size`` keeps the first so many training rows of the fixed order (a smaller size is a subset of a larger one);
    validation and test stay whole, so that scores of different sizes compare. Raises :class:`UnknownData` or
    :class:`DataError`.
    """
    import torch

    from benchtop.report import emit

    entry = describe(name)
    raw, checksum = read(name)
    rows = parts_of(name, len(raw.x), raw.rows, sequence=raw.y is None)
    if size is not None:
        if not 1 <= size <= len(rows[0]):
            raise DataError(f"{name}: size={size}, expected 1 to {len(rows[0])}, the number of training rows")
        rows = (rows[0][:size], *rows[1:])

    def tensor(array: "np.ndarray") -> torch.Tensor:
        """Bytes travel to the device as they are and become float there."""
        moved = torch.tensor(array, device=device)
        if array.dtype.kind == "f":
            return moved.float()
        return moved.float().div_(entry.get("peak", 255)) if array.dtype == "uint8" else moved.long()

    extra = {key: tensor(value) if hasattr(value, "dtype") else value for key, value in (raw.extra or {}).items()}
    xs, ys = ([None if values is None else tensor(values[r]) for r in rows] for values in (raw.x, raw.y))
    if entry["kind"] in ("table", "series"):
        extra["scale"] = {"x": standardise(xs), "y": standardise(ys) if raw.y is not None else None}
    if raw.y is None:
        xs, ys = [x[:-1] for x in xs], [x[1:] for x in xs]
    emit("data", name=name, checksum=checksum)
    return Split(
        *map(Part, xs, ys),
        name=name,
        kind=entry["kind"],
        rows=tuple(torch.from_numpy(r).to(device) for r in rows),
        classes=raw.classes,
        vocabulary=raw.vocabulary,
        licence=entry["licence"],
        source=entry["source"],
        checksum=checksum,
        extra=extra,
    )


def parts_of(name: str, n: int, rows: Any = None, sequence: bool = False) -> "tuple[np.ndarray, ...]":
    """Rows of train, validation and test.

    Without an official split 60, 20 and 20 percent; where only the validation part is missing, a tenth of train.
    Ordered by a hash, so that no version of a random generator matters; a sequence (80, 10, 10) keeps its order.
    """
    import numpy as np

    train, validation, test = rows or (np.arange(n), None, None)
    if not sequence:
        set_name = name.partition("/")[0]
        key = [hashlib.blake2b(f"{set_name} {i}".encode(), digest_size=8).digest() for i in train.tolist()]
        train = train[sorted(range(len(train)), key=key.__getitem__)]
    if test is None:
        train, validation, test = np.split(train, [round(n * f) for f in ((0.8, 0.9) if sequence else (0.6, 0.8))])
    elif validation is None:
        train, validation = np.split(train, [len(train) - len(train) // 10])
    return train, validation, test


def standardise(parts: "list[torch.Tensor]") -> "tuple[torch.Tensor, torch.Tensor] | None":
    """Shift and scale the float columns (axis 1) of all parts, in place, by mean and deviation of the first part."""
    import torch

    if not parts[0].is_floating_point():
        return None
    column = parts[0].double().transpose(0, -1 if parts[0].ndim == 1 else 1).reshape(*parts[0].shape[1:2], -1)
    deviation, mean = torch.std_mean(column, -1, correction=0, keepdim=True)
    plain = ((column == 0) | (column == 1)).all(-1, keepdim=True) | (deviation == 0)
    shape = (-1, *[1] * (parts[0].ndim - 2)) if parts[0].ndim > 1 else ()
    mean, deviation = (torch.where(plain, v, s).float().reshape(shape) for v, s in ((0.0, mean), (1.0, deviation)))
    for part in parts:
        part.sub_(mean).div_(deviation)
    return mean, deviation


def digest(raw: Raw) -> str:
    """Checksum of what a reader returned: types, shapes and bytes of all arrays, and the words."""
    extra = sorted((raw.extra or {}).items())
    state = hashlib.sha256(repr([raw.classes, raw.vocabulary, [k for k, _ in extra]]).encode())
    for array in [raw.x, raw.y, *(raw.rows or ()), *(value for _, value in extra)]:
        if hasattr(array, "dtype"):
            state.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
    return state.hexdigest()[:16]


# ---- registry ----


@functools.cache
def registry() -> dict[str, dict[str, Any]]:
    """Every set as ``registry.json`` declares it; a set in variants has them under "variants"."""
    return json.loads(resources.files(__name__).joinpath("registry.json").read_text(encoding="utf-8"))


def names() -> list[str]:
    """Names that ``load`` takes: "digits", or set and variant, "planetoid/cora"."""
    return [f"{key}/{v}" if v else key for key, entry in registry().items() for v in entry.get("variants", [""])]


def describe(name: str) -> dict[str, Any]:
    """What the registry says of a set: title, kind, reader, licence, source, bytes, files with sha256 and address."""
    if name not in names():
        near = [n for n in names() if n.startswith(f"{name}/")] or difflib.get_close_matches(name, names(), 3, 0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "`benchtop data list` shows what there is"
        raise UnknownData(f"unknown data set {name!r}: {hint}")
    key, _, variant = name.partition("/")
    entry = {"name": name, "variant": variant, "bytes": 0} | registry()[key]
    entry |= entry.pop("variants", {}).get(variant, {})
    for group in {"files", "public"} & set(entry):  # a variant needs only the files that its "match" names
        entry[group] = [f for f in entry[group] if any(fnmatch.fnmatch(f["path"], p) for p in entry.get("match", "*"))]
    return entry | ({"bytes": sum(f["bytes"] for f in entry["files"])} if "files" in entry else {})


def table() -> list[dict[str, Any]]:
    """One row a name: name, title, kind, bytes (0: embedded, no network), licence, flag, source, note."""
    columns = ("name", "title", "kind", "bytes", "licence", "flag", "source", "note")
    return [{column: entry.get(column, "") for column in columns} for entry in map(describe, names())]


def checksums(wanted: list[str]) -> dict[str, str]:
    """Declared checksum of each set, without loading anything: the part of a chapter's freshness key that is data.

    The text of the standard library differs a little with the version of Python. Its declared checksum covers the
    selection (which modules, in which parts), so that a record stays fresh under another Python; the record keeps the
    checksum of the text it really saw. Pictures stored as JPEG go by their file's sha256 for the same reason.
    """

    def declared(entry: dict[str, Any]) -> str:
        covers = entry.get("modules") or [file["sha256"] for file in entry["files"]]
        return hashlib.sha256(json.dumps([entry["variant"], covers]).encode()).hexdigest()[:16]

    return {entry["name"]: entry.get("checksum") or declared(entry) for entry in map(describe, wanted)}


def get(name: str) -> "list[Path]":
    """Fetch a set's files; their verified paths (none for an embedded set)."""
    from benchtop.data import fetch

    entry = describe(name)
    return fetch.locate(entry) if "files" in entry else []


def check(name: str) -> str:
    """Read a set from what is on this machine, without network: one line on what was found, or a DataError."""
    raw, checksum = read(name, download=False)
    return f"{name}: {len(raw.x):,} rows, checksum {checksum}"


def read(name: str, download: bool = True) -> tuple[Raw, str]:
    """Call the reader that the registry names, ``module.function``; what it found, and the checksum of that.

    Any damage is a one-line DataError.
    """
    from benchtop.data import fetch

    entry, paths = describe(name), []
    module, function = entry["reader"].split(".")
    reader = getattr(import_module(f"{__name__}.{module}"), function)
    try:
        if "files" in entry:
            paths = fetch.locate(entry, download)
            raw = reader(fetch.Files(paths), entry)
        else:
            raw = reader(entry)
    except DataError:
        raise
    except MALFORMED as error:
        if not paths:
            raise
        fetch.discard(entry)
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"{name}: {paths[0].parent} cannot be read ({reason}): delete its files and load again"
        ) from error
    checksum = digest(raw)
    if checksum != entry.get("checksum", checksum):
        fetch.discard(entry)
        raise DataError(
            f"{name}: its content has checksum {checksum}, expected {entry['checksum']}: {entry['source']} "
            "gives other data than the book ran on; install the versions in constraints.txt or load again"
        )
    return raw, checksum


def library(name: str, package: str = "") -> Any:
    """An optional library, or one line that says how to get it."""
    try:
        return import_module(name)
    except ImportError:
        raise DataError(f"this set is read by {name}, which is not installed: pip install {package or name}") from None
