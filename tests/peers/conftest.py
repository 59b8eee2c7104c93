"""What the peer tests share.

One file a chapter, ``test_<slug with underscores>.py``, compares ``benchtop.technique(slug)`` with an implementation that
the chapter's author did not write: forward, gradients and a few training steps, on random inputs in float64, to 1e-5
relative. Packages come with the extra ``peers``; import them with ``pytest.importorskip``. Each file says at its top
what it compares with; the book's table of peers is made from these constants:

    PEER = "peft 0.21, LoraLayer with init_lora_weights='pissa'"   # or: "naive re-derivation: ..."
    WHAT = "initial factors, forward, gradients, five steps of SGD"
"""

import pytest
import torch

RELATIVE = 1e-5


@pytest.fixture
def agree():
    """``agree(ours, theirs)``: largest difference at most 1e-5 of the largest value of the peer."""

    def compare(ours: torch.Tensor, theirs: torch.Tensor, rtol: float = RELATIVE) -> None:
        ours, theirs = torch.as_tensor(ours).detach(), torch.as_tensor(theirs).detach()
        assert ours.shape == theirs.shape, f"shapes differ: ours {tuple(ours.shape)}, peer {tuple(theirs.shape)}"
        scale = max(theirs.abs().max().item(), 1e-12)
        worst = (ours - theirs).abs().max().item() / scale
        assert worst <= rtol, f"differs from the peer by {worst:.2g} of its largest value, at most {rtol:g} allowed"

    return compare


@pytest.fixture(autouse=True)
def float64():
    """Compare formulas, not rounding: tensors are float64 unless a test says otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
