"""What stands in more than one file must agree: dependencies, address, version, licences."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from benchtop.publish.chapter import Book

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}  # PyPI name -> conda-forge name, where they differ


def requirement(text: str) -> tuple[str, str]:
    return re.match(r"([\w.-]+)(?:\[.*?\])?(.*)", text.replace(" ", "")).groups()


def test_conda_environment_lists_the_dependencies_of_the_package():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = dict(requirement(line) for line in listed if isinstance(line, str) and line != "pip")
    expected = {CONDA_NAMES.get(name, name): wanted for name, wanted in map(requirement, PROJECT["dependencies"])}
    assert conda == expected | {"python": PROJECT["requires-python"]}
    (pip,) = [line["pip"] for line in listed if isinstance(line, dict)]
    (extra,) = re.fullmatch(r"-e \.\[(\w+)\]", pip[0]).groups()
    assert extra in PROJECT["optional-dependencies"]


def test_metadata_has_ranges_and_constraints_exact_versions():
    for group in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]:
        for name, wanted in map(requirement, group):
            assert name == "benchtop" or wanted.startswith(">="), f"{name}{wanted}: metadata takes ranges"
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {}
    for line in lines:
        name, version = re.fullmatch(r"([\w.-]+)==([\w.!]+)", line).groups()
        pinned[name.lower().replace("_", "-")] = version
    assert pinned["torch"] == "2.13.0"
    missing = {name for name, _ in map(requirement, PROJECT["dependencies"])} - set(pinned)
    assert not missing, f"constraints.txt has no version for {missing}"


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_every_mention_of_the_repository_is_the_address_in_config():
    address = Book(ROOT).address
    owner, name = address.split("/")[-2:]
    stale = []
    for path in tracked():
        if path.suffix in {".py", ".md", ".cff", ".yml", ".toml", ".ipynb", ".html"}:
            for found in re.findall(r"https://(?:www\.)?github\.com/[\w.-]+/[\w.-]+", path.read_text(encoding="utf-8")):
                if found.split("/")[-1].removesuffix(".git") == name and found.removesuffix(".git") != address:
                    stale.append(f"{path.relative_to(ROOT)}: {found}")
                if found.split("/")[-2] == owner and found.removesuffix(".git") != address:
                    stale.append(f"{path.relative_to(ROOT)}: {found}")
    assert not stale, f"these say another address than _config.yml ({address}): {stale}"


def test_no_environment_no_generated_site_no_large_file_in_git():
    for path in tracked():
        parts = path.relative_to(ROOT).parts
        assert not {"_build", ".venv", "__pycache__", ".ipynb_checkpoints"} & set(parts), path
        assert path.stat().st_size <= 300_000, f"{path} has {path.stat().st_size} bytes"


@pytest.mark.parametrize("name", ["README.md", "CITATION.cff"])
def test_version_and_licence_agree(name):
    text = (ROOT / name).read_text()
    assert PROJECT["license"] in text
    if name == "CITATION.cff":
        assert yaml.safe_load(text)["version"] == PROJECT["version"]


def test_half_of_the_package_a_chapter_imports_never_imports_publish():
    for path in (ROOT / "src" / "benchtop").rglob("*.py"):
        if "publish" not in path.parts:
            assert "benchtop.publish" not in path.read_text(), path


def test_sizes_of_the_two_halves():
    def lines(paths):
        return sum(len(path.read_text().splitlines()) for path in paths)

    package = ROOT / "src" / "benchtop"
    readers = package / "data" / "public.py"  # a short function a file format: read one, when you use its set
    bench = [p for p in package.rglob("*.py") if "publish" not in p.parts and p != readers]
    assert lines(bench) <= 2_340, "the bench is to be read in an hour"
    assert lines([readers]) <= 620
    # A third of these are the runner: here or on a cluster, with Jupyter or without, and whatever dies meanwhile.
    assert lines((package / "publish").rglob("*.py")) <= 3_380
