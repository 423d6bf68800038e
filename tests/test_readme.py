"""The README says what is there: every file of the layout, every verb, and only configs that exist."""

import re
from pathlib import Path

import pytest

from speedstack.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def layout() -> dict[str, set[str]]:
    """Folder -> names below it, as the README's tree lists them."""
    tree: dict[str, set[str]] = {}
    folder = ""
    block = README.split("## Layout")[1].split("```")[1]
    for line in block.strip().splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            tree[folder].add(name.rstrip("/"))
        else:
            folder = name.rstrip("/")
            tree[folder] = set()
    return tree


@pytest.mark.parametrize("folder", ["speedstack", "quant", "dflash", "runtime", "eval", "train"])
def test_layout_lists_every_file(folder: str) -> None:
    here = {
        path.name
        for path in (ROOT / folder).iterdir()
        if not path.is_symlink()
        and not path.name.startswith("_")
        and (path.suffix == ".py" or (path.is_dir() and any(path.glob("*.*"))))
    }
    assert layout()[folder] == here


def test_every_verb_is_described() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)) == set(VERBS)


def test_every_named_file_exists() -> None:
    for name in re.findall(r"configs/\w+/[\w-]+\.yaml|docs/[\w.-]+|constraints-cpu\.txt", README):
        assert (ROOT / name).is_file(), name
