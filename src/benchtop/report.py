"""How a running chapter tells the runner, and the reader, what it measured."""

import json
import os
from typing import Any

LOG = "BENCHTOP_RECORD"  # the runner puts the path of a file here; each entry is one JSON line in it


def emit(kind: str, **entry: Any) -> None:
    """Append one entry (profile, data, fit, tuning or claim) to the log of the run, if a runner asked for one.

    A file and not a notebook output: it survives a kernel that dies, works without Jupyter and leaves the page clean.
    """
    if path := os.environ.get(LOG):
        with open(path, "a", encoding="utf-8") as log:
            log.write(json.dumps({"kind": kind} | entry, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """NumPy and torch values as plain Python ones."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a record cannot hold a {type(value).__name__}: pass numbers, strings, lists or dictionaries")


def say(markdown: str) -> None:
    """Show a sentence made from the run's own numbers, so that prose and results cannot disagree."""
    display({"text/markdown": markdown, "text/plain": markdown})


def display(bundle: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
    """Show a mime bundle in a notebook; where there is none, print its plain text and leave the rest to the runner."""
    if in_notebook():
        from IPython.display import display as show

        show(bundle, raw=True, metadata=metadata or {})
    else:
        print(bundle["text/plain"])
        emit("display", **bundle)


def in_notebook() -> bool:
    """True inside a Jupyter kernel; IPython itself may be missing on a machine that only computes."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None
