"""The runner on small books made here: records, freshness, faults."""

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

from benchtop.publish.chapter import Book, BookError, Chapter, bare_code, used_modules, write_atomically
from benchtop.publish.cli import app
from benchtop.publish.run import record_entry, run

SETUP = "import benchtop as bt\nprofile = bt.Profile(profile)"
CLAIM = (
    'bt.Claim("small", paper="none").at_most([0.1, 0.2, 0.3, 0.1, 0.2, 0.15, 0.25, 0.12], 1.0, seeds=range(100, 108))'
)


def write(root, slug, *cells, setup=SETUP):
    notebook = new_notebook(
        metadata={"benchtop": {"slug": slug}, "kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )
    notebook.cells = [
        new_markdown_cell("# Title"),
        new_code_cell('profile = "laptop"', metadata={"tags": ["parameters"]}),
        new_code_cell(setup, metadata={"tags": ["setup"]}),
        *[new_code_cell(source) for source in cells],
    ]
    path = root / "book" / "part" / f"{slug}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return Chapter(path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "_config.yml").write_text("repository: {url: https://example.org/a/b}\n")
    monkeypatch.setenv("BENCHTOP_PROFILE", "smoke")  # as under `make test`: the runner's parameter must win over it
    (tmp_path / "book").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_laptop_run_stores_record_and_outputs_and_is_then_fresh(root):
    chapter = write(root, "good", "print(6 * 7)", 'data = bt.load("digits")', CLAIM)
    (result,) = run([chapter], "laptop")
    assert (result.slug, result.outcome, result.error) == ("good", "holds", "")
    entry = Chapter(chapter.path).record("laptop")
    assert entry["claims"][0]["statement"] == "small"
    assert entry["claims"][0]["n"] == 8
    assert set(entry["data"]) == {"digits"}
    assert 0 < entry["seconds"] < 60
    assert entry["peak_bytes"] > 50e6
    stored = nbformat.read(chapter.path, as_version=4)
    assert stored.cells[3].outputs[0].text.strip() == "42"
    assert [c.source for c in stored.cells] == [c.source for c in chapter.notebook.cells]
    assert "papermill" not in json.dumps(stored.metadata)
    assert Chapter(chapter.path).status("laptop") == "fresh"
    assert list(run([Chapter(chapter.path)], "laptop")) == []


def test_smoke_gives_no_verdict_and_leaves_the_notebook_alone(root):
    chapter = write(root, "good", CLAIM)
    before = chapter.path.read_bytes()
    (result,) = run([chapter], "smoke")
    assert (result.outcome, result.error) == ("not measured", "")
    assert chapter.path.read_bytes() == before


def test_a_failing_chapter_is_named_keeps_its_files_and_lets_the_others_go_on(root):
    write(root, "bad", "1 / 0")
    write(root, "good", CLAIM)
    before = (root / "book/part/bad.ipynb").read_bytes()
    result = CliRunner().invoke(app, ["run", "--profile", "smoke", "--jobs", "2"])
    assert result.exit_code == 1
    assert "bad: bad cell 4: ZeroDivisionError: division by zero" in result.output.replace("cell 5", "cell 4")
    assert "good: not measured" in result.output
    assert "2 run, 0 fresh, 1 failed" in result.output
    assert (root / "book/part/bad.ipynb").read_bytes() == before
    assert not (root / "book/records/bad.json").exists()


def test_a_chapter_that_ignores_the_parameter_is_an_error(root):
    chapter = write(root, "deaf", setup='import benchtop as bt\nbt.Profile("laptop")')
    (result,) = run([chapter], "smoke")
    assert "profile 'smoke' was asked for and laptop was used" in result.error
    with pytest.raises(BookError, match="and none was used"):
        record_entry([], "smoke", "key", 0.0)


def test_prose_comments_and_docstrings_do_not_make_a_chapter_stale(root):
    one = write(root, "one", 'def f():\n    """Doc."""\n    return 1  # why\n').key("laptop")
    assert write(root, "one", "def f():\n\n    return 1").key("laptop") == one
    assert write(root, "one", "def f():\n    return 2").key("laptop") != one
    assert write(root, "one", "def f():\n    return 1").key("smoke") != one
    assert bare_code('x = "# no comment"  # comment\n') == 'x = "# no comment"'


def test_the_key_covers_helpers_through_one_another_and_data(root, monkeypatch):
    from benchtop import data
    from benchtop.publish import chapter as module

    assert {"benchtop.claims", "benchtop.plots", "benchtop.report"} <= set(
        used_modules("import benchtop as bt\nbt.Claim")
    )
    assert "benchtop.train" not in used_modules("import benchtop as bt\nbt.show")
    chapter = write(root, "one", "bt.show", 'data = bt.load("digits")')
    before, digest = chapter.key("laptop"), module.module_digest
    monkeypatch.setattr(module, "module_digest", lambda m: "changed" if m == "benchtop.report" else digest(m))
    assert chapter.key("laptop") != before
    monkeypatch.setattr(module, "module_digest", digest)
    monkeypatch.setattr(data, "checksums", lambda names: dict.fromkeys(names, "other"))
    assert chapter.key("laptop") != before


def test_writes_are_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomically(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("arguments", "words"), [
    (["run", "nowhere"], "unknown chapter or part 'nowhere'"),
    (["run", "--profile", "desktop"], "unknown profile 'desktop': expected one of smoke, laptop, gpu"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_1(root, arguments, words):
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", "from benchtop.publish.cli import main; main()", *arguments],
                          cwd=root, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_torn_notebook_and_a_place_without_a_book_are_named(root, tmp_path_factory):
    path = root / "book" / "part" / "torn.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text('{"cells": [')
    with pytest.raises(BookError, match=r"torn\.ipynb is not a notebook"):
        Chapter(path).meta  # noqa: B018
    with pytest.raises(BookError, match="no book at or above"):
        Book.find(tmp_path_factory.mktemp("elsewhere"))
