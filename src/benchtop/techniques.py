"""The technique of a chapter as a module: tests, other chapters and readers use it, nobody copies it."""

import ast
import functools
import json
import linecache
import os
import sys
import types
from pathlib import Path


def technique(slug: str) -> types.ModuleType:
    """The module made of the cells tagged ``technique`` in a chapter: ``technique("pissa").PiSSALinear``.

    The book is looked for in ``BENCHTOP_BOOK``, above the working directory and beside the installed sources.
    Raises LookupError if there is no such chapter or it has no technique cell.
    """
    return _load(find_notebook(slug))


def find_notebook(slug: str) -> Path:
    """The path of a chapter's notebook."""
    for root in _places():
        if found := sorted((root / "book").glob(f"*/{slug}.ipynb")):
            return found[0]
    raise LookupError(
        f"no chapter {slug!r} here: clone the book and set BENCHTOP_BOOK to its folder, or correct the slug"
    )


def _places() -> list[Path]:
    named = [Path(os.environ["BENCHTOP_BOOK"])] if "BENCHTOP_BOOK" in os.environ else []
    here = Path.cwd()
    return [*named, here, *here.parents, Path(__file__).parents[2]]


def cells(notebook: dict, *tags: str) -> list[str]:
    """The source of each code cell that has one of the tags, in order."""
    wanted = set(tags)
    return [
        "".join(cell["source"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and wanted & set(cell.get("metadata", {}).get("tags", []))
    ]


def imports(source: str) -> str:
    """Only the import statements at the top level of a cell: set-up without its side effects."""
    kept = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(ast.unparse(node) for node in kept)


def source(notebook: dict, name: str = "notebook") -> str:
    """What the module executes: the imports of the set-up cells, then the technique cells."""
    technique_cells = cells(notebook, "technique")
    if not technique_cells:
        raise LookupError(f'{name} has no technique cell: tag the cells of "Build it" with "technique"')
    return "\n\n".join([*map(imports, cells(notebook, "setup")), *technique_cells])


@functools.lru_cache
def _load(path: Path) -> types.ModuleType:
    text = source(json.loads(path.read_text(encoding="utf-8")), path.name)
    name = f"benchtop.technique.{path.stem.replace('-', '_')}"
    module = types.ModuleType(name, f"The technique of the chapter {path.stem}.")
    module.__file__ = f"{path}#technique"
    linecache.cache[module.__file__] = (len(text), None, text.splitlines(keepends=True), module.__file__)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up by name
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return module
