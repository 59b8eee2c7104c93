"""Upgrade radar: does the book survive the newest releases that its ranges allow?"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

from benchtop.publish.chapter import Book, BookError

LEFT_OUT = (".git", ".venv", "_build", "__pycache__", ".ipynb_checkpoints", "*.egg-info", ".*_cache")


def radar(book: Book, names: list[str] | None = None) -> Iterator[tuple[bool, str]]:
    """Run chapters in smoke in a throw-away environment without the constraints: (went well, one line) as they end.

    The book is copied first, so that nothing in it changes. pip takes its settings (index, constraint, find-links) from
    the usual places: where the newest torch is out of reach, PIP_CONSTRAINT names one that is not.
    """
    slugs = [chapter.slug for chapter in book.select(names)]
    with tempfile.TemporaryDirectory(prefix="benchtop-radar-") as folder:
        copy, place = Path(folder) / "book", Path(folder) / "venv"
        shutil.copytree(book.root, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        venv.create(place, with_pip=True)
        python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
        hidden = {"BENCHTOP_PROFILE", "BENCHTOP_RECORD", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
        environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"TMPDIR": folder}

        def call(program: str, *words: str) -> subprocess.CompletedProcess:
            command = [python.with_name(program), *words]
            return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)

        installed = call("python", "-m", "pip", "install", "--quiet", "--upgrade", "--editable", ".[publish,data]")
        if installed.returncode:
            words = installed.stderr.strip().splitlines()[-1:] or ["no message"]
            raise BookError(f"the newest releases cannot be installed: {words[0]}; see PIP_CONSTRAINT, PIP_INDEX_URL")
        yield True, moved(copy / "constraints.txt", call("python", "-m", "pip", "freeze", "--exclude-editable").stdout)
        for slug in slugs:
            done = call("benchtop", "run", "--all", "--profile", "smoke", slug)
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(f"{slug}")]
            yield (
                done.returncode == 0,
                (lines or [f"{slug}: {(done.stderr.strip() or 'nothing ran').splitlines()[-1]}"])[0],
            )


def moved(constraints: Path, freeze: str) -> str:
    """Which packages are at another version than the one the book was tested with."""

    def versions(text: str) -> dict[str, str]:
        return {re.sub("[-_.]+", "-", name).lower(): v for name, v in re.findall(r"^([\w.-]+)==([^\s+]+)", text, re.M)}

    tested, newest = versions(constraints.read_text(encoding="utf-8")), versions(freeze)
    changes = [f"{name} {tested[name]} -> {v}" for name, v in sorted(newest.items()) if tested.get(name, v) != v]
    return f"{len(changes)} of {len(newest)} packages moved: {', '.join(changes) or 'none'} (Python {sys.version.split()[0]})"
