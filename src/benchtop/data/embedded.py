"""Sets that an installed package brings along: no network. Each reader takes the set's registry entry."""

import functools
import importlib
import importlib.util
import itertools
import json
import re
import sysconfig
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from benchtop.data import DataError, Raw

Entry = dict[str, Any]


def scikit_learn(entry: Entry) -> Raw:
    """digits as images; the tables with their units and without scaling."""
    from sklearn import datasets

    plain = {"scaled": False} if entry["name"] == "diabetes" else {}
    found = getattr(datasets, f"load_{entry['name']}")(**plain)
    classes = tuple(map(str, found.get("target_names", ()))) if found.target.dtype.kind == "i" else ()
    if entry["kind"] == "images":
        return Raw(found.images[:, None].astype(np.uint8), found.target.astype(np.int64), classes)
    y = found.target.astype(np.int64 if classes else np.float32)
    return Raw(found.data.astype(np.float32), y, classes, extra={"columns": tuple(found.feature_names)})


def folder(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise DataError(f"this set comes with {package}, which is not installed: pip install {package}")
    return Path(spec.submodule_search_locations[0])


def pictures(entry: Entry) -> Raw:
    """Patches of the pictures; y is the number of the picture. Grey is the usual weighted sum, in integers."""
    from benchtop.data.public import cut, picture

    names = entry["colours" if entry.get("colour") else "grey"]
    pixels = [picture((folder("skimage") / "data" / f"{name}.png").read_bytes(), "RGB") for name in names]
    if not entry.get("colour"):
        weights = np.array([299, 587, 114])
        pixels = [(np.tensordot(weights, p.astype(np.int64), 1) // 1000).astype(np.uint8)[None] for p in pixels]
    return cut(pixels, entry["side"], tuple(names))


def faces(entry: Entry) -> Raw:
    """The first 100 are faces."""
    x = np.load(folder("skimage") / "data" / "lfw_subset.npy", allow_pickle=False)
    return Raw(x[:, None].astype(np.float32), np.repeat([1, 0], 100), ("other", "face"))


def statsmodels(entry: Entry) -> Raw:
    """A series in the order of time, (steps, channels); gaps are filled along a straight line."""
    import pandas as pd

    name = entry["variant"]
    found = pd.read_csv(folder("statsmodels") / "datasets" / name / f"{name}.csv")
    if entry.get("by_row"):  # a year a row, a month a column
        values = found.iloc[:, 1:].to_numpy(np.float64).reshape(-1, 1)
    else:
        values = found[entry["columns"]].interpolate().to_numpy(np.float64)
    return Raw(values.astype(np.float32), extra={"columns": tuple(entry.get("columns", [name]))})


def karate(entry: Entry) -> Raw:
    """Two camps; a graph so small that every node is also its own feature."""
    import networkx

    from benchtop.data.public import codes, nodes

    graph = networkx.karate_club_graph()
    y, classes = codes([graph.nodes[i]["club"] for i in graph])
    return nodes(np.eye(len(y)), y, np.array(graph.edges).T, classes=classes)


# ---- the source of Python's standard library as a text ----

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # anything else is left out, so that ids never change


def standard_library(entry: Entry) -> Raw:
    """The modules that the registry lists, one after the other, as characters or as byte pairs.

    Which modules, in which part, and both vocabularies are fixed, so that ids mean the same on every Python; the text
    itself is the running Python's.
    """
    texts = [source(part) for part in entry["modules"]]
    if entry["variant"] == "characters":
        vocabulary = tuple(CHARACTERS)
        tokens = texts
    else:
        merges = merge_table()
        vocabulary = (*CHARACTERS, *map("".join, merges))
        tokens = [[piece for word in WORD.findall(text) for piece in byte_pairs(word)] for text in texts]
    number = {token: i for i, token in enumerate(vocabulary)}
    ids = [np.array([number[token] for token in part], np.int64) for part in tokens]
    ends = itertools.accumulate(map(len, ids), initial=0)
    rows = tuple(np.arange(a, b) for a, b in itertools.pairwise(ends))
    return Raw(np.concatenate(ids), rows=rows, vocabulary=vocabulary)


def source(modules: list[str]) -> str:
    """Text of the modules; tabs become spaces, several blank lines one."""
    texts = []
    for module in modules:
        path = Path(sysconfig.get_path("stdlib")).joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.exists():
            raise DataError(
                f"stdlib: this Python has no {path}: use one that ships its library as source (3.11 to 3.14)"
            )
        text = path.read_text(encoding="utf-8").expandtabs(4)
        texts.append(re.sub(f"[^{re.escape(CHARACTERS)}]", "", text))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(texts))


WORD = re.compile(r"\n *| ?[A-Za-z_]+| ?[0-9]+| ?[^\w\s]+| +")  # pairs never merge across these


@functools.cache
def merge_table() -> dict[tuple[str, str], int]:
    """Pair of tokens -> order in which it was merged, most frequent first (made once, on Python 3.11)."""
    merges = json.loads(resources.files("benchtop.data").joinpath("bytepairs.json").read_text(encoding="utf-8"))
    return {tuple(pair): i for i, pair in enumerate(merges)}


@functools.lru_cache(1 << 16)
def byte_pairs(word: str) -> tuple[str, ...]:
    """Tokens of one word: the earliest merge that applies, again and again (Sennrich et al. 2016)."""
    merges, tokens = merge_table(), list(word)
    while pair := min(itertools.pairwise(tokens), key=lambda p: merges.get(p, len(merges)), default=None):
        if pair not in merges:
            break
        merged, i = [], 0
        while i < len(tokens):
            step = 2 if tuple(tokens[i : i + 2]) == pair else 1
            merged.append("".join(tokens[i : i + step]))
            i += step
        tokens = merged
    return tuple(tokens)
