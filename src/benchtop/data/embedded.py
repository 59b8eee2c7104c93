"""Sets that an installed package brings along: no network."""

import itertools
import re
import sysconfig
from pathlib import Path

import numpy as np

from benchtop.data import DataError, Raw, describe


def digits(name: str) -> Raw:
    """1,797 handwritten digits, 8 x 8, grey values 0..16 (scikit-learn)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return Raw(
        found.images[:, None].astype(np.uint8), found.target.astype(np.int64), tuple(map(str, found.target_names))
    )


# ---- the source of Python's standard library as a text ----

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # anything else is left out, so that ids never change


def standard_library(modules: list[list[str]]) -> list[str]:
    """Text of the training, validation and test modules; several blank lines become one."""
    folder = Path(sysconfig.get_path("stdlib"))
    drop = re.compile(f"[^{re.escape(CHARACTERS)}]")
    texts = []
    for part in modules:
        sources = []
        for module in part:
            path = folder.joinpath(*module.split("."))
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if not path.exists():
                raise DataError(
                    f"stdlib: this Python has no {path}: use a Python that ships its standard library as source"
                )
            sources.append(drop.sub("", path.read_text(encoding="utf-8").expandtabs(4)))
        texts.append(re.sub(r"\n{3,}", "\n\n", "\n".join(sources)))
    return texts


def stdlib_characters(name: str) -> Raw:
    """Source of the standard library, one token a character."""
    texts = standard_library(describe(name)["modules"])
    ids = [np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) for text in texts]
    code = np.zeros(128, np.int64)
    code[[ord(c) for c in CHARACTERS]] = np.arange(len(CHARACTERS))
    ends = np.cumsum([0, *map(len, ids)])
    rows = tuple(np.arange(a, b) for a, b in itertools.pairwise(ends))
    return Raw(code[np.concatenate(ids)], rows=rows, vocabulary=tuple(CHARACTERS))
