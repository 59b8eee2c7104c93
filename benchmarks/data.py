"""A batch of 512 Fashion-MNIST images with random crop and flip: device-resident tensor against torch's DataLoader.

python benchmarks/data.py [--out FILE.json] [--device cuda]   (needs the set: BENCHTOP_DATA_MIRROR or the network)

Both give float32 batches of the same kind: padded by 4, cropped to 28 x 28 at a random place, flipped half of the
time. The DataLoader reads the same tensor through a map-style data set with 2 workers that stay alive, as one would
write it without the bench. Rounds alternate; the fastest of each counts, so that a busy machine disturbs least.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import benchtop as bt

BATCH, PAD, BAR = 512, 4, 5.0


def crop_and_flip(x: torch.Tensor, generator: torch.Generator, pad: int = PAD) -> torch.Tensor:
    """(n, c, h, w) -> the same shape: each image moved by up to ``pad`` pixels (0 outside) and flipped with p = 1/2.

    Whole rows are copied first, columns are gathered from them after that: faster than one gather over both. A flip
    counts the columns backwards.
    """
    n, c, h, w = x.shape
    device, high, wide = x.device, h + 2 * pad, w + 2 * pad
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=generator, device=device)
    flip = torch.randint(2, (n, 1), generator=generator, device=device, dtype=torch.bool)
    columns = torch.arange(w, device=device)
    columns = torch.where(flip, w - 1 - columns, columns) + left
    rows = torch.arange(n * c, device=device)[:, None] * high + top.repeat_interleave(c, 0)
    rows = (rows + torch.arange(h, device=device)).flatten()
    padded = torch.nn.functional.pad(x, (pad, pad, pad, pad))
    cut = padded.view(-1, wide).index_select(0, rows).view(n, c, h, wide)
    return cut.gather(3, columns[:, None, None, :].expand(n, c, h, w))


class Images(Dataset):
    """The same, an image at a time; bytes in memory, float when asked for, as torchvision's data sets do."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor):
        self.x, self.y = x.mul(255).round().byte(), y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        top, left = torch.randint(2 * PAD + 1, (2,)).tolist()
        h, w = self.x.shape[-2:]
        image = torch.nn.functional.pad(self.x[i].float().div(255), (PAD, PAD, PAD, PAD))[
            :, top : top + h, left : left + w
        ]
        return (image.flip(-1) if torch.rand(()) < 0.5 else image), self.y[i]


def resident(
    x: torch.Tensor, y: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        rows = torch.randint(len(y), (BATCH,), generator=generator, device=x.device)
        yield crop_and_flip(x[rows], generator), y[rows]


def loaded(x: torch.Tensor, y: torch.Tensor, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    loader = DataLoader(
        Images(x.cpu(), y.cpu()),
        BATCH,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        drop_last=True,
        pin_memory=device != "cpu",
    )
    while True:
        yield from ((images.to(device), labels.to(device)) for images, labels in loader)


def seconds(batches: Iterator, n: int, device: str) -> float:
    """Per batch."""
    start = time.perf_counter()
    for _ in range(n):
        images, _labels = next(batches)
    if device != "cpu":
        torch.cuda.synchronize()
    assert images.shape == (BATCH, 1, 28, 28)
    return (time.perf_counter() - start) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    x, y = bt.load("fashion_mnist", device=options.device).train
    ours = resident(x, y, torch.Generator(options.device).manual_seed(0))
    theirs = loaded(x, y, options.device)
    for batches in (ours, theirs):  # start workers, fill caches
        seconds(batches, 3, options.device)
    times = [(seconds(ours, 40, options.device), seconds(theirs, 40, options.device)) for _ in range(options.rounds)]
    tensor, loader = map(min, zip(*times))
    device = torch.cuda.get_device_name() if options.device != "cpu" else f"{os.cpu_count()} x {platform.machine()}"
    found = {
        "what": "512 Fashion-MNIST images, random crop and flip, seconds a batch (fastest round)",
        "device": device,
        "torch": torch.__version__,
        "tensor": tensor,
        "DataLoader, 2 workers": loader,
        "ratio": loader / tensor,
        "bar": BAR,
        "rounds": [dict(zip(("tensor", "DataLoader"), pair)) for pair in times],
    }
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"tensor {tensor * 1e3:.2f} ms, DataLoader {loader * 1e3:.2f} ms a batch: {loader / tensor:.1f}x (bar {BAR:.0f}x)"
    )
    if loader < BAR * tensor:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
