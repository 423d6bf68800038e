"""The package as it is shipped, and the floors its imports keep."""

import ast
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("train", "quant", "dflash", "runtime", "eval")
# What each folder may import of ours; its own files always. The floors of the house, ground floor first.
MAY_IMPORT: dict[str, set[str]] = {
    "speedstack/support": set(),
    "quant": {"support"},
    "dflash": {"support"},
    "runtime": {"support", "quant", "dflash"},
    "eval": {"support", "quant", "dflash", "runtime"},
    "train": {"support", "quant", "dflash", "runtime", "eval"},
}


def run(command: list[str], cwd: Path) -> str:
    """Output of a command; fails the test when it fails."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    return result.stdout


def imported_modules(file: Path) -> set[str]:
    """Dotted names of the modules that `file` imports anywhere, in functions and under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_only_go_down(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for name in imported_modules(file):
            parts = name.split(".")
            if parts[0] != "speedstack":
                assert parts[0] not in PACKAGES, f"{file.relative_to(ROOT)} imports bare {parts[0]}"
                continue
            floor = parts[1] if len(parts) > 1 else ""
            allowed = MAY_IMPORT[package] | {Path(package).name, "__version__"}
            assert floor in allowed, f"{file.relative_to(ROOT)} imports {name}: not below {package}/"


@pytest.mark.parametrize("package", ["quant", "dflash"])
def test_ground_floor_reads_no_config_files_and_no_datasets(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        roots = {name.split(".")[0] for name in imported_modules(file)}
        assert not roots & {"yaml", "datasets", "pydantic", "tyro", "lm_eval", "deepspeed", "wandb"}, file


def test_import_speedstack_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, speedstack, speedstack.cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert run([sys.executable, "-c", code], tmp_path).strip() == "[]"


def test_runtime_needs_neither_training_nor_evaluation_packages(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('lm_eval', 'datasets', 'deepspeed', 'wandb'):\n"
        "    sys.modules[name] = None\n"  # an import of it raises ImportError
        "from speedstack.runtime import Engine\n"
        "print(Engine.__name__)\n"
    )
    assert run([sys.executable, "-c", code], tmp_path).strip() == "Engine"


def install_from_sdist(directory: Path) -> Path:
    """A virtual environment with the wheel made from the sdist; dependencies come from the running environment."""
    # `build` makes the sdist and the wheel from it. Without isolation it uses the setuptools at hand, and no network.
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory / "dist"), str(ROOT)], directory)
    (wheel,) = (directory / "dist").glob("*.whl")
    environment = directory / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)], directory)
    # A path file lends the dependencies; path files inside a lent directory are not read, so this checkout's editable
    # install stays out.
    (site_packages,) = (environment / "lib").glob("python*/site-packages")
    (site_packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def check_holds_every_file(installed: Path) -> None:
    (shipped,) = (installed / "lib").glob("python*/site-packages/speedstack")
    kept = {"", ".py", ".typed", ".yaml", ".html", ".css", ".js", ".cpp", ".h"}
    expected = {
        file.relative_to(ROOT / "speedstack")
        for file in (ROOT / "speedstack").glob("*.*")
        if file.suffix in kept and file.is_file()
    }
    for package in (*PACKAGES, "configs"):
        expected |= {
            file.relative_to(ROOT)
            for file in (ROOT / package).rglob("*.*")
            if file.suffix in kept and "__pycache__" not in file.parts
        }
    assert expected
    missing = sorted(str(file) for file in expected if not (shipped / file).is_file())
    assert missing == []


def check_imports_by_its_own_name_only(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, importlib.util, speedstack\n"
        f"for name in {PACKAGES}:\n"
        "    module = importlib.import_module(f'speedstack.{name}')\n"
        "    print(module.__file__)\n"
        "    spec = importlib.util.find_spec(name)\n"
        "    assert spec is None or 'speedstack' not in str(spec.origin), f'{name} is importable bare'\n"
    )
    lines = run([str(installed / "bin" / "python"), "-c", code], tmp_path).splitlines()
    assert len(lines) == len(PACKAGES)
    assert all(Path(line).is_relative_to(installed) for line in lines), lines


@pytest.mark.slow
def test_sdist_wheel_install_import(tmp_path: Path) -> None:
    # One test, not three with a fixture: two test processes must not build in this checkout at the same time.
    installed = install_from_sdist(tmp_path)
    check_holds_every_file(installed)
    check_imports_by_its_own_name_only(installed, tmp_path)
    assert "generate" in run([str(installed / "bin" / "speedstack"), "--help"], tmp_path)
