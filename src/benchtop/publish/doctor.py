"""Is this machine ready to run, build and test the book? What is missing, and what to do about it."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from benchtop.publish.chapter import Book

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
RUNNING = ("distributed", "psutil", "nbformat")  # without Jupyter these are enough: `benchtop run --no-kernel`
JUPYTER = ("papermill", "nbclient", "ipykernel")
ROOM = 2e9  # bytes free: the environment's caches, the site and the largest data set


class Row(NamedTuple):
    """One thing that was looked at; ``cure`` is empty where it is fine."""

    name: str
    found: str
    cure: str = ""


def examine(book: Book) -> Iterator[Row]:
    """Everything that running, building and testing the book relies on."""
    wanted = {r.name: r.specifier for r in map(Requirement, requires("benchtop") or [])}
    here = platform.python_version()
    yield Row("Python", here, "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer, make a new .venv")
    yield packages("torch", ("torch",), wanted, "install the torch that fits your driver, see pytorch.org")
    yield device()
    yield packages("runner", RUNNING, wanted, "pip install 'benchtop[worker]'")
    yield packages("Jupyter", JUPYTER, wanted, "pip install 'benchtop[publish]', or use benchtop run --no-kernel")
    yield Row("ipywidgets", f"{installed('ipywidgets') or 'none'}; sliders of the book do without")
    browser = next(filter(None, map(shutil.which, BROWSERS)), "")
    yield Row("browser", browser or "none", "" if browser else "apt-get install chromium, for the tests of the site")
    from benchtop.data.fetch import cache

    if mirror := os.environ.get("BENCHTOP_DATA_MIRROR"):
        there = "://" in mirror or Path(mirror).is_dir()
        yield Row(
            "data mirror", mirror, "" if there else "set BENCHTOP_DATA_MIRROR to a folder that exists, or unset it"
        )
    yield writable("data cache", cache(), "set BENCHTOP_DATA_CACHE to a folder where you may write")
    yield writable("book", book.root / "book", f"chown -R $USER {book.root}, or clone the book elsewhere")
    yield writable("logs", book.root / "_build", f"chown -R $USER {book.root / '_build'}, or delete it")
    yield room("disk of the book", book.root)
    yield room("disk for what runs", Path(tempfile.gettempdir()))


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def packages(title: str, names: tuple[str, ...], wanted: dict, cure: str) -> Row:
    """The versions of these packages; a problem if one is missing or older than the metadata of benchtop allow."""
    found = {name: installed(name) for name in names}
    bad = [name for name, v in found.items() if not v or (name in wanted and not wanted[name].contains(v, True))]
    return Row(title, ", ".join(f"{name} {v or 'missing'}" for name, v in found.items()), cure if bad else "")


def device() -> Row:
    """What torch computes on; a driver whose GPU torch cannot use is a problem, no GPU is none."""
    try:
        import torch
    except ImportError:
        return Row("device", "torch cannot be imported", "install torch first")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        return Row("device", f"{torch.cuda.get_device_name()}, {memory:.0f} GB, CUDA {torch.version.cuda}{driver()}")
    if driver():
        cure = "install a torch that is built for this driver, see pytorch.org"
        return Row("device", f"a GPU that torch {torch.__version__} cannot use{driver()}", cure)
    return Row("device", f"CPU, {os.cpu_count()} cores; no GPU, so not the profile gpu")


def driver() -> str:
    """The NVIDIA driver's version; empty if there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20)
    found = re.search(r"Driver Version: ([\d.]+)", done.stdout)
    return f", driver {found[1]}" if found else ""


def writable(title: str, folder: Path, cure: str) -> Row:
    """A file can be written there, or where the folder will be made."""
    place = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            return Row(title, str(folder))
    except OSError as error:
        return Row(title, f"{folder}: {error.strerror}", cure)


def room(title: str, folder: Path) -> Row:
    free = shutil.disk_usage(folder).free
    return Row(
        title, f"{free / 1e9:.1f} GB free", "" if free >= ROOM else f"free {ROOM / 1e9:.0f} GB: `make clean` helps"
    )
