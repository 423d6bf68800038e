"""Imports go down only and never round in a circle, and what they lead to is small: files and folders.

Read from the source, so that imports in functions, under TYPE_CHECKING and of names as text ("module:name", as the
command line has its verbs) count like all others.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.import_graph import PACKAGES, ROOT, Graph, import_graph, imported_names, product_files

MAX_FILES, MAX_LINES = 15, 400
# Ground floor first. A module belongs to the longest of these names that its own begins with; those that share a floor
# do not import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("speedstack",),
    ("speedstack.support",),
    ("speedstack.quant", "speedstack.dflash"),
    ("speedstack.runtime.model",),
    ("speedstack.runtime.rounds",),
    ("speedstack.runtime.plan",),
    ("speedstack.runtime.perf",),
    ("speedstack.runtime.backends",),
    ("speedstack.runtime.decoding",),
    ("speedstack.runtime",),
    ("speedstack.eval",),
    ("speedstack.train",),
    ("speedstack.verbs",),
    ("speedstack.ablation", "speedstack.demo"),
    ("speedstack.cli",),
    ("speedstack.__main__",),
)


def floor_of(module: str) -> tuple[int, str]:
    """Which floor a module is on, and of which of those that share it."""
    names = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    while module not in names:
        module = module.rpartition(".")[0]
    return names[module], module


def upward_imports(graph: Graph) -> list[str]:
    """Imports of a higher floor, or of another part of the same one."""
    return [
        f"{module} imports {target}"
        for module, targets in sorted(graph.items())
        for target in sorted(targets)
        if (below := floor_of(target)) != (own := floor_of(module)) and below[0] >= own[0]
    ]


def circles(graph: Graph) -> list[list[str]]:
    """Modules that import each other: the strongly connected components of two and more, by Tarjan's algorithm."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for target in graph[module]:
            if target not in number:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], number[target])
        if lowest[module] == number[module]:
            first = stack.index(module)
            if len(stack) - first > 1:
                found.append(sorted(stack[first:]))
            del stack[first:]

    for module in graph:
        if module not in number:
            visit(module)
    return found


def full_folders(files: list[Path], root: Path = ROOT) -> list[str]:
    """Folders with more Python files than somebody finds their way about in."""
    counts = Counter(file.parent.relative_to(root).as_posix() for file in files)
    return [f"{folder}: {count} files" for folder, count in sorted(counts.items()) if count > MAX_FILES]


def long_files(files: list[Path], root: Path = ROOT) -> list[str]:
    counts = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    return [f"{file.relative_to(root)}: {count} lines" for file, count in counts.items() if count > MAX_LINES]


@pytest.fixture(scope="module")
def graph() -> Graph:
    found = import_graph(product_files())
    assert len(found) > 200 and sum(map(len, found.values())) > 1000, "all of the product is read"
    return found


def test_imports_go_down_only(graph: Graph) -> None:
    assert upward_imports(graph) == []


def test_no_files_import_each_other(graph: Graph) -> None:
    assert circles(graph) == []


def test_nothing_of_ours_is_imported_by_its_bare_name() -> None:
    bare = [
        f"{module} imports {name}"
        for module, file in product_files().items()
        for name in imported_names(file)
        if name.partition(".")[0] in PACKAGES
    ]
    assert bare == []


@pytest.mark.parametrize("package", ["quant", "dflash"])
def test_ground_floor_reads_no_config_files_and_no_datasets(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        roots = {name.partition(".")[0] for name in imported_names(file)}
        assert not roots & {"yaml", "datasets", "pydantic", "tyro", "lm_eval", "deepspeed", "wandb"}, file


def test_no_folder_is_too_full() -> None:
    assert full_folders([*product_files().values(), *(ROOT / "tests").rglob("*.py")]) == []


def test_no_file_is_too_long() -> None:
    assert long_files(list(product_files().values())) == []


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], None]:
    """`write(path, text)`: a file of a small product of its own."""

    def write_file(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    return write_file


@pytest.mark.parametrize(
    ("file", "text", "target"),
    [
        ("quant/a.py", "import speedstack.dflash.b", "speedstack.dflash.b"),
        ("quant/a.py", "def f():\n    from speedstack.dflash import b", "speedstack.dflash.b"),
        ("runtime/model/a.py", "if T:\n    import speedstack.runtime.plan.c", "speedstack.runtime.plan.c"),
        ("eval/a.py", "load('speedstack.cli:main')", "speedstack.cli"),
        ("speedstack/support/a.py", "from speedstack.quant.e import f", "speedstack.quant.e"),
    ],
)  # fmt: skip
def test_an_import_that_goes_up_is_seen(
    file: str, text: str, target: str, tmp_path: Path, write: Callable[[str, str], None]
) -> None:
    for other in ("dflash/b.py", "runtime/plan/c.py", "speedstack/cli.py", "quant/e.py"):
        write(other, "")
    write(file, text)
    module = "speedstack." + file.removesuffix(".py").replace("/", ".").removeprefix("speedstack.")
    assert upward_imports(import_graph(product_files(tmp_path))) == [f"{module} imports {target}"]


def test_a_circle_is_seen_however_long(tmp_path: Path, write: Callable[[str, str], None]) -> None:
    write("quant/a.py", "from speedstack.quant.b import x")
    write("quant/b.py", "def f():\n    from speedstack.quant import c")
    write("quant/c.py", "import speedstack.quant.d")
    write("quant/d.py", "")
    assert circles(import_graph(product_files(tmp_path))) == []
    write("quant/d.py", "if TYPE_CHECKING:\n    from speedstack.quant.b import y")
    names = [f"speedstack.quant.{name}" for name in "bcd"]
    assert circles(import_graph(product_files(tmp_path))) == [names]


def test_what_is_too_large_is_seen(tmp_path: Path, write: Callable[[str, str], None]) -> None:
    for number in range(MAX_FILES):
        write(f"quant/f{number}.py", "x = 1\n" * MAX_LINES)
    files = list(product_files(tmp_path).values())
    assert full_folders(files, tmp_path) == [] and long_files(files, tmp_path) == []
    write("quant/last.py", "x = 1\n" * (MAX_LINES + 1))
    files = list(product_files(tmp_path).values())
    assert full_folders(files, tmp_path) == ["quant: 16 files"]
    assert long_files(files, tmp_path) == ["quant/last.py: 401 lines"]
