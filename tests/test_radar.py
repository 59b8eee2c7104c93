"""The upgrade radar: what it says of versions, that it leaves the book alone, and that a failure is one line."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchtop.publish import radar as module
from benchtop.publish.chapter import Book, BookError


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book" / "part").mkdir(parents=True)
    (tmp_path / "_config.yml").write_text("repository: {url: https://x.y/z}\n")
    (tmp_path / "constraints.txt").write_text("# exact\ntorch==2.13.0\nnumpy==2.4.6\nruamel.yaml==1\n")
    for slug in ("good", "bad"):
        (tmp_path / "book" / "part" / f"{slug}.ipynb").write_text(
            '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
        )
    return Book(tmp_path)


@pytest.fixture
def calls(monkeypatch):
    """Stand in for pip and the runner: record what would be called, with which environment and where."""
    seen = []

    def run(command, *, cwd, env, **_):
        words = [str(w) for w in command]
        seen.append((words, cwd, env))
        if "freeze" in words:
            return SimpleNamespace(
                returncode=0, stdout="torch==2.14.1+cpu\nnumpy==2.4.6\nruamel_yaml==2\nnew==1\n", stderr=""
            )
        if "bad" in words:
            return SimpleNamespace(
                returncode=1, stdout="bad: cell 7: TypeError: gone (1.0 s)\n1 run, 1 failed\n", stderr=""
            )
        return SimpleNamespace(returncode=0, stdout="good: not measured (1.0 s)\n", stderr="")

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module.venv, "create", lambda place, with_pip: None)
    return seen


def test_first_breaking_cell_of_each_chapter(book, calls, monkeypatch):
    monkeypatch.setenv("BENCHTOP_PROFILE", "laptop")
    monkeypatch.setenv("PIP_CONSTRAINT", "torch.txt")
    lines = list(module.radar(book))
    assert lines[0][1].startswith("2 of 4 packages moved: ruamel-yaml 1 -> 2, torch 2.13.0 -> 2.14.1")
    assert lines[1:] == [(False, "bad: cell 7: TypeError: gone (1.0 s)"), (True, "good: not measured (1.0 s)")]
    for _, cwd, env in calls:
        assert book.root not in (cwd, *cwd.parents), "the book itself is never run or written"
        assert "BENCHTOP_PROFILE" not in env
        assert env["PIP_CONSTRAINT"] == "torch.txt"
        assert cwd.is_relative_to(env["TMPDIR"]), "what pip unpacks goes with the rest"
        assert not Path(env["TMPDIR"]).exists(), "nothing is left behind"
    assert all("constraints.txt" not in " ".join(words) for words, _, _ in calls)


def test_only_the_chapters_that_are_named(book, calls):
    assert [line for _, line in module.radar(book, ["good"])][1:] == ["good: not measured (1.0 s)"]


@pytest.mark.slow
def test_releases_that_cannot_be_installed_are_one_line(book, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(BookError, match=r"the newest releases cannot be installed: .*PIP_CONSTRAINT") as error:
        list(module.radar(book))
    assert "\n" not in str(error.value)
