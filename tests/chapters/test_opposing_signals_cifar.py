"""The public data and the convolutional network of the gpu profile, at a small size on a CPU."""

import json
import math
import os

import pytest
import torch

from benchtop.techniques import cells, find_notebook


class Small:
    """Names, rates and network of the gpu profile, sizes of smoke."""

    device = torch.device("cpu")

    def pick(self, *, smoke, laptop, gpu):
        chosen = smoke if isinstance(smoke, int) else gpu
        return "cifar10-copies/lossless" if chosen == "cifar10" else chosen  # what a mirror holds


@pytest.mark.skipif("BENCHTOP_DATA_MIRROR" not in os.environ, reason="needs CIFAR-10: set BENCHTOP_DATA_MIRROR")
def test_search_and_removal_on_cifar(monkeypatch):
    monkeypatch.setenv("BENCHTOP_PROFILE", "smoke")
    notebook = json.loads(find_notebook("opposing-signals").read_text(encoding="utf-8"))
    space = {"profile": "smoke", "__name__": "chapter"}
    for source in cells(notebook, "setup", "technique")[1:]:
        exec(source, space)
    space["profile"] = Small()
    wanted = ("data = bt.load", "class Pictures", "def search")
    for source in cells(notebook, "experiment"):
        if any(words in source for words in wanted):
            exec(source, space)
    model = space["Pictures"](0, planted=True)
    assert model.x.shape == (60, 3, 32, 32) and (model.y[: 2 * space["k"]] < 2).all()
    assert isinstance(model.body[0], torch.nn.Conv2d)
    assert math.isfinite(space["sharpness"](model, 2))
    setting = space["natural"] | {"steps": 3}
    result, _, removals = space["search"](0, setting, 2)
    assert {len(removed) for removed in removals.values()} == {4}
    assert -1 <= result["correlation"] <= 1
    full, without = (space["descend"](0, **setting, removed=removed)[0] for removed in ([], removals["found"]))
    assert torch.equal(full[0], without[0]) and not torch.equal(
        full[1], without[1]
    )  # the same start, the same pictures
    assert space["Pictures"](0, planted=False, removed=removals["found"]).keep.sum() == 56
