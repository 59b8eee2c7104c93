"""The book as pages: a small Sphinx extension, and the build that uses it."""

import io
import re
from pathlib import Path

from benchtop.publish.chapter import Book, BookError


def build(book: Book, out: Path | None = None) -> Path:
    """Write the HTML pages (``_build/html``) and return the one to open; only what has changed is made anew.

    Every warning is an error, with unresolved references among the warnings. Raises BookError with one line a problem.
    """
    from jupyter_book.config import get_final_config
    from sphinx.application import Sphinx
    from sphinx.errors import SphinxError
    from sphinx.util.console import nocolor
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    out = out or book.root / "_build" / "html"
    config, _ = get_final_config(
        user_yaml=book.root / "_config.yml",
        sourcedir=book.root,
        cli_config={"latex_individualpages": False, "external_toc_path": str(book.root / "_toc.yml"), "nitpicky": True},
        raise_on_invalid=True,
    )
    problems = io.StringIO()
    nocolor()
    with patch_docutils(), docutils_namespace():
        try:
            app = Sphinx(book.root, None, out, out.parent / ".doctrees", "html", config, status=None, warning=problems)
            app.build()
        except SphinxError as error:
            raise BookError(f"the book cannot be built: {' '.join(str(error).split())}") from None
    if lines := one_line_each(problems.getvalue(), book.root):
        raise BookError("\n".join(lines))
    return out / "index.html"


def one_line_each(text: str, root: Path) -> list[str]:
    """Sphinx' warnings, each as one line that begins with the page, as seen from the book's folder."""
    starts = re.split(r"^(?=.*(?:WARNING|ERROR|CRITICAL|SEVERE): )", text, flags=re.M)
    lines = [" ".join(entry.split()).replace(f"{root}/", "") for entry in starts if entry.strip()]
    return [re.sub(r"(?:WARNING|ERROR|CRITICAL|SEVERE): ", "", line) for line in lines]


def setup(app):
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
