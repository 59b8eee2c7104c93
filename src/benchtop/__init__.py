"""The bench of Benchtop Deep Learning: what a chapter imports.

Names are loaded when first used, so that ``import benchtop as bt`` costs next to nothing.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("benchtop")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0"

EXPORTS = {  # public name -> module that defines it; the freshness key of a chapter reads this table too
    "Profile": "profile",
    "load": "data",
    "fit": "train",
    "best": "train",
    "final": "train",
    "attention": "batching",
    "batches": "replicas",
    "Optimiser": "optim",
    "adamw": "optim",
    "sgd": "optim",
    "Claim": "claims",
    "curves": "plots",
    "forest": "plots",
    "show": "plots",
    "subplots": "plots",
    "explore": "widgets",
    "say": "report",
    "technique": "techniques",
}
__all__ = sorted(EXPORTS)


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(f"benchtop has no {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"benchtop.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
