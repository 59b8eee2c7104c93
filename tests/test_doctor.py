"""`benchtop doctor`: each problem is caused, and named with its cure."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.specifiers import SpecifierSet

from benchtop.publish import doctor
from benchtop.publish.chapter import Book
from benchtop.publish.cli import app


@pytest.fixture
def book(tmp_path, monkeypatch):
    (tmp_path / "book").mkdir()
    (tmp_path / "_config.yml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENCHTOP_DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BENCHTOP_DATA_MIRROR", raising=False)
    monkeypatch.setattr(doctor, "BROWSERS", ("sh",))  # a machine without a browser is no fault of these tests
    return Book(tmp_path)


def test_a_machine_on_which_the_tests_run_is_fine_and_all_rows_are_there(book, capsys):
    app(["doctor"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    named = ("Python", "torch", "device", "Jupyter", "ipywidgets", "browser", "data cache", "disk", "book")
    assert all(any(line.startswith(name) for line in lines) for name in named)
    assert all("  OK  " in line for line in lines), lines


def test_a_problem_is_exit_code_1_and_has_its_cure(book, monkeypatch, capsys):
    monkeypatch.setenv("BENCHTOP_DATA_MIRROR", "/no/such/folder")
    assert app(["doctor"], standalone_mode=False) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "  problem  " in line]
    assert line.split() == [
        "data",
        "mirror",
        "problem",
        "/no/such/folder",
        "set",
        "BENCHTOP_DATA_MIRROR",
        "to",
        "a",
        "folder",
        "that",
        "exists,",
        "or",
        "unset",
        "it",
    ]


def test_what_is_missing_or_too_old_is_named():
    wanted = {"torch": SpecifierSet(">=99"), "numpy": SpecifierSet(">=1")}
    assert doctor.packages("x", ("torch",), wanted, "cure").cure == "cure"
    assert doctor.packages("x", ("numpy",), wanted, "cure").cure == ""
    assert doctor.packages("x", ("no-such-package",), wanted, "cure") == ("x", "no-such-package missing", "cure")


def test_a_gpu_that_torch_cannot_use_is_a_problem_and_no_gpu_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "driver", lambda: "")
    assert doctor.device().cure == ""
    monkeypatch.setattr(doctor, "driver", lambda: ", driver 550.1")
    assert "install a torch that is built for this driver" in doctor.device().cure
    assert "driver 550.1" in doctor.device().found


def test_the_driver_is_read_from_its_own_tool(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.driver() == ""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '| NVIDIA-SMI 550.1  Driver Version: 550.1.2  CUDA |'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert doctor.driver() == ", driver 550.1.2"


def test_a_folder_that_cannot_be_written_and_a_full_disk(monkeypatch):
    assert doctor.writable("x", Path("/proc/none"), "cure").cure == "cure"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e9))
    row = doctor.room("x", Path("/"))
    assert row.found == "1.0 GB free" and row.cure.startswith("free 2 GB")
