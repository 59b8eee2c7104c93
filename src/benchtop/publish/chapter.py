"""A chapter as data: front matter, cells by tag, freshness key, record."""

import ast
import functools
import hashlib
import io
import json
import os
import re
import tempfile
import threading
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

import benchtop
from benchtop.profile import NAMES

PARSING = threading.Lock()  # before Python 3.12, `ast` in two threads at once fails ("recursion depth mismatch")
PACKAGE = Path(benchtop.__file__).parent
SECONDS = {"smoke": 8, "laptop": 90, "gpu": 600}  # budget of a chapter after imports
MEMORY = {"smoke": 2, "laptop": 4, "gpu": 64}  # GB at the peak, likewise


class BookError(Exception):
    """Something in the book is not as it must be; the message is one line and says how to repair it."""


@dataclass(frozen=True)
class Book:
    """The folder that holds ``_config.yml`` and ``book/``."""

    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> "Book":
        """The book at or above ``start`` (default: the working directory)."""
        start = (start or Path.cwd()).resolve()
        for folder in (start, *start.parents):
            if (folder / "_config.yml").exists() and (folder / "book").is_dir():
                return cls(folder)
        raise BookError(f"no book at or above {start}: change into a clone of the book, the folder with _config.yml")

    def chapters(self) -> dict[str, "Chapter"]:
        """Every notebook under ``book/<part>/``, by slug, in the order of the parts."""
        return {path.stem: Chapter(path) for path in sorted(self.root.glob("book/*/*.ipynb"))}

    def select(self, names: list[str] | None = None) -> list["Chapter"]:
        """The chapters of these slugs or parts; all of them for no name."""
        chapters = self.chapters()
        if not names:
            return list(chapters.values())
        chosen = {}
        for name in names:
            found = {slug: c for slug, c in chapters.items() if name in (slug, c.path.parent.name)}
            if not found:
                raise BookError(f"unknown chapter or part {name!r}: `benchtop list` shows what there is")
            chosen |= found
        return list(chosen.values())

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.root / "_config.yml").read_text(encoding="utf-8"))

    @property
    def address(self) -> str:
        """The repository's address; ``_config.yml`` is the one place where it stands."""
        return self.config["repository"]["url"].rstrip("/")

    @functools.cached_property
    def papers(self) -> list[dict[str, Any]]:
        """The rows of ``book/papers.yml``: id, title, year, part, chapter (slug or null)."""
        fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # half a second less, where PyYAML was built with it
        return yaml.load((self.root / "book" / "papers.yml").read_text(encoding="utf-8"), Loader=fast)


@dataclass(frozen=True)
class Chapter:
    """One notebook and what is known of its runs."""

    path: Path

    @property
    def slug(self) -> str:
        return self.path.stem

    @property
    def part(self) -> str:
        return self.path.parent.name

    @property
    def record_path(self) -> Path:
        return self.path.parents[1] / "records" / f"{self.slug}.json"

    @functools.cached_property
    def notebook(self) -> nbformat.NotebookNode:
        try:
            return nbformat.read(self.path, as_version=4)
        except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError, AttributeError, KeyError):
            raise BookError(
                f"{self.path.name} is not a notebook: restore it with `git checkout {self.path.name}`"
            ) from None

    @property
    def meta(self) -> dict[str, Any]:
        """The notebook's ``benchtop`` metadata: slug, part, papers, title, prerequisites, minutes, ..."""
        return self.notebook.metadata.get("benchtop", {})

    def cells(self, *tags: str) -> list[nbformat.NotebookNode]:
        """Code cells that have one of the tags; all code cells for no tag."""
        code = [cell for cell in self.notebook.cells if cell.cell_type == "code"]
        return [c for c in code if set(tags) & set(c.metadata.get("tags", []))] if tags else code

    def source(self, *tags: str) -> str:
        return "\n\n".join(cell.source for cell in self.cells(*tags))

    # ---- freshness ----

    def key(self, profile: str, parameters: dict[str, Any] | None = None) -> str:
        """Hash of everything a result depends on: code, the helpers it uses, parameters, data.

        Comments, docstrings and layout do not count, in the chapter and in the helpers alike.
        """
        with PARSING:
            parts = [*self._used, profile, json.dumps(parameters or {}, sort_keys=True)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @functools.cached_property
    def _used(self) -> list[str]:
        """What `key` is made of, whatever the profile."""
        sources = []
        for cell in self.cells():
            try:
                sources.append(bare_code(cell.source))
            except (SyntaxError, tokenize.TokenError) as error:
                number = self.notebook.cells.index(cell) + 1
                raise BookError(f"{self.path.name} cell {number} is not Python: {error.args[0]}; correct it") from None
        modules = used_modules("\n".join(sources))
        parts = [*sources, *(module_digest(module) for module in modules)]
        parts += [f"{name}:{checksum}" for name, checksum in self.data().items()]
        return parts + [
            bare_code(cell.source) for other in self.borrows() for cell in other.cells("setup", "technique")
        ]

    def borrows(self) -> list["Chapter"]:
        """The chapters whose technique this one uses, directly or through one another: ``technique("slug")``."""
        todo, seen = [self], {}
        while todo:
            for slug in re.findall(r"\btechnique\(\s*[\"']([\w-]+)[\"']", todo.pop().source()):
                for path in sorted(self.path.parents[1].glob(f"*/{slug}.ipynb")):
                    if path != self.path and path not in seen:
                        seen[path] = Chapter(path)
                        todo.append(seen[path])
        return [seen[path] for path in sorted(seen)]

    def data(self) -> dict[str, str]:
        """Checksums of the data sets whose names stand in the code as whole string constants."""
        from benchtop import data

        words = {
            node.value
            for cell in self.cells()
            for node in ast.walk(parse(cell.source))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        return data.checksums(sorted(words & set(data.names())))

    def record(self, profile: str) -> dict[str, Any] | None:
        """What the last run in this profile measured."""
        return self.records().get(profile)

    def records(self) -> dict[str, Any]:
        if not self.record_path.exists():
            return {}
        try:
            return json.loads(self.record_path.read_text(encoding="utf-8"))
        except ValueError:
            raise BookError(
                f"{self.record_path.name} is not JSON: delete it and run `benchtop run {self.slug}`"
            ) from None

    def save_record(self, profile: str, entry: dict[str, Any]) -> None:
        """Put one profile's entry into the record, keep the others."""
        entries = self.records() | {profile: entry}
        ordered = {name: entries[name] for name in NAMES if name in entries}
        write_atomically(self.record_path, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")

    def status(self, profile: str) -> str:
        """fresh, stale (the key has changed since) or missing (never run)."""
        entry = self.record(profile)
        if entry is None:
            return "missing"
        return "fresh" if entry["key"] == self.key(profile, entry.get("parameters")) else "stale"


NAMING = ast.Import | ast.ImportFrom | ast.Attribute  # nodes that can name a module of the package


def parse(source: str) -> ast.Module:
    """The syntax tree of a cell; lines that are IPython magics count as blank."""
    return ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M))


@functools.lru_cache(4096)  # each profile's key asks for the same cells
def bare_code(source: str) -> str:
    """Source without comments, docstrings, blank lines and trailing space: what can change a result."""
    lines = re.sub(r"^\s*[%!].*$", "", source, flags=re.M).splitlines()
    if not "".join(lines).strip():
        return ""
    text = "\n".join(lines) + "\n"
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            doc = node.body[0]
            for row in range(doc.lineno, doc.end_lineno + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def used_modules(source: str) -> list[str]:
    """The modules of ``benchtop`` that this code uses, directly or through one another, sorted."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, NAMING)]
    names = [name for node in found if isinstance(node, ast.Import) for name in node.names]
    aliases = {name.asname or "benchtop" for name in names if name.name == "benchtop"}
    direct = {
        f"benchtop.{benchtop.EXPORTS[node.attr]}"
        for node in found
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases
        if node.attr in benchtop.EXPORTS
    }
    todo, seen = direct | imported(found), set()
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo |= imported_by(module)
    return sorted(seen)


@functools.cache  # the package does not change while it runs
def imported_by(module: str) -> set[str]:
    return imported(ast.walk(ast.parse(module_path(module).read_text(encoding="utf-8"))))


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Modules of ``benchtop`` named in the import statements among the nodes of a tree."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "benchtop":
            if node.module == "benchtop":
                found |= {f"benchtop.{benchtop.EXPORTS.get(name.name, name.name)}" for name in node.names}
            else:
                found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return {name for name in found if name.startswith("benchtop.") and module_path(name).exists()}


def module_path(module: str) -> Path:
    base = PACKAGE.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


@functools.cache
def module_digest(module: str) -> str:
    return hashlib.sha256(bare_code(module_path(module).read_text(encoding="utf-8")).encode()).hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or leave the old one: a killed run or a full disk never tears it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
