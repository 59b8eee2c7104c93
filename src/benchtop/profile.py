"""Profiles: one notebook, three honest sizes."""

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchtop.report import emit

if TYPE_CHECKING:
    import torch

NAMES = ("smoke", "laptop", "gpu")
VERDICT_FROM = 100  # verdict seeds start here, tuning seeds at 0: the two can never meet
_active: "Profile | None" = None


@dataclass(frozen=True, init=False)
class Profile:
    """The size at which a chapter runs: ``Profile("smoke" | "laptop" | "gpu")``.

    ``BENCHTOP_PROFILE`` in the environment wins over the argument (nbval cannot inject a parameter).

    Attributes: ``name``; ``device`` (a ``torch.device``; ``gpu`` takes CUDA and says so when there is none);
    ``seeds``, the verdict seeds 100, 101, ...; ``tuning_seeds``, 0, 1, ...
    """

    name: str
    device: "torch.device"
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]

    def __init__(self, name: str, *, seeds: int = 8, tuning_seeds: int = 4):
        """``seeds`` and ``tuning_seeds`` are the counts for laptop and gpu; smoke takes two of each.

        Raises ValueError for an unknown profile and RuntimeError for ``gpu`` without CUDA.
        """
        import torch  # here, so that what reads only NAMES (`benchtop list`) starts at once

        name = os.environ.get("BENCHTOP_PROFILE", name)
        if name not in NAMES:
            raise ValueError(
                f"unknown profile {name!r}: expected one of {', '.join(NAMES)}; set it in the parameters cell"
            )
        if name == "gpu" and not torch.cuda.is_available():
            raise RuntimeError("profile 'gpu' needs a CUDA device and torch sees none: choose profile = \"laptop\"")
        if name == "smoke":
            seeds = tuning_seeds = 2
        set_ = object.__setattr__  # the dataclass is frozen
        set_(self, "name", name)
        set_(self, "device", torch.device("cuda" if name == "gpu" else "cpu"))
        set_(self, "seeds", tuple(range(VERDICT_FROM, VERDICT_FROM + seeds)))
        set_(self, "tuning_seeds", tuple(range(tuning_seeds)))
        global _active
        _active = self
        emit("profile", name=name, started=time.time())  # the runner counts seconds from here: imports are done

    def pick(self, **sizes: Any) -> Any:
        """The value of this profile: ``profile.pick(smoke=20, laptop=600, gpu=20_000)``."""
        if set(sizes) != set(NAMES):
            raise ValueError(f"pick got {', '.join(sorted(sizes))}: it needs one value each for {', '.join(NAMES)}")
        return sizes[self.name]

    def __repr__(self) -> str:
        return f"Profile {self.name} on {self.device}, seeds {self.seeds[0]}-{self.seeds[-1]}"


def active() -> Profile | None:
    """The profile the running chapter chose last, or None outside a chapter."""
    return _active
