"""The README and docs/ say what is there: every verb, and only files, modules and folders that exist."""

import importlib.util
import re
from pathlib import Path

import pytest

from speedstack.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_every_verb_is_described() -> None:
    table = README.split("## Commands")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == set(VERBS)


@pytest.mark.parametrize("page", PAGES)
def test_every_named_file_exists(page: str) -> None:
    names = re.findall(
        r"configs/[\w/-]+\.yaml|docs/[\w-]+\.\w+|results/[\w.-]+\.json|constraints-cpu\.txt", PAGES[page]
    )
    for name in names:
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(([\w./-]+)\)", PAGES[page]):
        assert ((ROOT if page == "README.md" else ROOT / "docs") / name).is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_every_named_module_exists(page: str) -> None:
    for name in re.findall(r"python -m (speedstack[\w.]*)", PAGES[page]):
        assert importlib.util.find_spec(name) is not None, name


def test_architecture_names_every_folder() -> None:
    """In the section of its folder at the top, as `name/`."""
    page = PAGES["architecture.md"]
    for top in ("speedstack", "train", "eval", "runtime"):
        section = page.split(f"## {top}/")[1].split("\n## ")[0]
        folders = {path.parent.name for path in (ROOT / top).glob("*/__init__.py") if not path.parent.is_symlink()}
        assert not [folder for folder in sorted(folders) if f"`{folder}/`" not in section], top
