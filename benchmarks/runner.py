"""All chapters in smoke: `benchtop run` against papermill one after the other and Jupyter Book's execute_notebooks: force.

python benchmarks/runner.py [--chapters 6] [--out FILE.json]

The chapters are generated, as small as a chapter can be (they import torch, matplotlib and benchtop, draw a figure and
test a claim), followed by the chapters of this book. Each way is one command line on a fresh copy; `benchtop run` once on
one core, where the overhead of a chapter shows, and once on all. Wall seconds depend on what else the machine does,
processor seconds hardly; Jupyter Book also makes the pages, which is told apart by a build without execution.

Bars: at most 3.5 processor seconds an empty chapter on one core; wall at most 1.2 x (sum of chapter seconds) / jobs.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[1]
OVERHEAD, SHARE = 3.5, 1.2  # the two bars
CELLS = [
    "import torch\nimport matplotlib.pyplot as plt\nimport benchtop as bt\n\nprofile = bt.Profile(profile)",
    "plt.plot(torch.arange(3))",
    'bt.Claim("small", paper="none").at_most([0.1 + i / 100 for i in range(8)], 1.0, seeds=range(100, 108))',
]
CONFIG = "title: Small\nexecute: {{execute_notebooks: '{how}'}}\nonly_build_toc_files: true\n"


def make_book(root: Path, generated: int) -> list[Path]:
    """A book of generated chapters and the real ones; the paths of its notebooks."""
    for number in range(generated):
        cells = [
            new_markdown_cell(f"# Chapter {number}"),
            new_code_cell('profile = "laptop"'),
            *map(new_code_cell, CELLS),
        ]
        cells[1].metadata["tags"] = ["parameters"]
        kernel = {"name": "python3", "display_name": "Python 3"}
        path = root / "book" / "small" / f"chapter-{number}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    for path in sorted((ROOT / "book").glob("*/*.ipynb")):
        (root / "book" / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, root / "book" / path.parent.name)
    notebooks = sorted((root / "book").glob("*/*.ipynb"))
    names = [str(path.relative_to(root).with_suffix("")) for path in notebooks]
    toc = {"format": "jb-book", "root": names[0], "chapters": [{"file": name} for name in names[1:]]}
    (root / "_toc.yml").write_text(json.dumps(toc))
    (root / "_config.yml").write_text(CONFIG.format(how="force"))
    return notebooks


def cost(commands: list[list[str]], root: Path, cores: int | None = None) -> tuple[dict[str, float], str]:
    """Wall and processor seconds of commands, one after the other, with all that they start; and what they printed."""
    environment = os.environ | {"BENCHTOP_PROFILE": "smoke", "OMP_NUM_THREADS": "1"}
    bound = None if cores is None else lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    begin, before, printed = time.monotonic(), spent(), ""
    for words in commands:
        done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, preexec_fn=bound)
        if done.returncode:
            sys.exit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        printed += done.stdout
    wall = time.monotonic() - begin
    while True:  # processes that outlive their parent a little: this one has adopted them
        try:
            os.wait()
        except ChildProcessError:
            row = {"wall": round(wall, 1), "processor": round(spent() - before, 1)}
            print(f"{words[0].split('/')[-1]} {words[1]}: {row}", file=sys.stderr, flush=True)
            return row, printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chapters", type=int, default=6, help="how many small chapters are generated")
    parser.add_argument("--out", type=Path, help="write the numbers there, as JSON")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: count the forking server, which ends after its runner
    scripts = Path(sys.executable).parent
    run = [sys.executable, "-m", "benchtop.publish.cli", "run", "--all", "--profile", "smoke", "--json", "--jobs"]
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="benchtop-") as folder:
        root, cores = Path(folder), os.cpu_count() or 1
        notebooks = make_book(root, options.chapters)
        empty = [path.stem for path in notebooks if path.parent.name == "small"]
        rows["benchtop run, 1 empty chapter, 1 core"], _ = cost([[*run, "1", empty[0]]], root, cores=1)
        rows[f"benchtop run, {len(empty)} empty chapters, 1 core"], _ = cost([[*run, "1", *empty]], root, cores=1)
        one, many = (rows[name]["processor"] for name in rows)
        overhead = {"all": many / len(empty), "each further": (many - one) / max(1, len(empty) - 1)}
        rows[f"benchtop run, {cores} jobs"], printed = cost([[*run, str(cores)]], root)
        summary = json.loads(printed)
        share = summary["wall"] * summary["jobs"] / summary["chapter_seconds"]
        mill = [
            [
                str(scripts / "papermill"),
                str(p),
                str(root / "out.ipynb"),
                "-p",
                "profile",
                "smoke",
                "-k",
                "python3",
                "-l",
                "python",
            ]
            for p in notebooks
        ]
        rows["papermill, one after the other"], _ = cost(mill, root)
        build = [str(scripts / "jupyter-book"), "build", "--all", str(root)]
        rows["Jupyter Book, execute_notebooks: force"], _ = cost([build], root)
        (root / "_config.yml").write_text(CONFIG.format(how="off"))
        rows["Jupyter Book, pages only"], _ = cost([build], root)
    print(
        f"{len(notebooks)} chapters ({len(empty)} generated), {platform.processor() or platform.machine()}, {cores} cores"
    )
    for name, row in rows.items():
        print(f"{name:<48} {row['wall']:>7.1f} s wall {row['processor']:>7.1f} s processor")
    print(f"processor seconds an empty chapter: {overhead['all']:.1f} with the start of the runner shared among them, "
          f"{overhead['each further']:.1f} each further one (bar {OVERHEAD})")  # fmt: skip
    print(f"wall x jobs / sum of chapter seconds: {share:.2f} (bar {SHARE})")
    if options.out:
        numbers = {"rows": rows, "overhead": overhead, "share": share, "cores": cores, "load": os.getloadavg()[0]}
        options.out.write_text(json.dumps(numbers, indent=1) + "\n")
    if overhead["all"] > OVERHEAD or share > SHARE:
        sys.exit("a bar is missed")


if __name__ == "__main__":
    main()
