"""The wheel holds what the checkout holds: packages, configuration, assets, one version."""

import ast
import configparser
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

import dqss

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    assert parser.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def folders(parser: configparser.ConfigParser) -> dict[str, Path]:
    """Installed top-level packages and the folders that they come from."""
    pairs = (line.split("=") for line in lines(parser["options"]["package_dir"]))
    return {name.strip(): REPOSITORY / folder.strip() for name, folder in pairs}


def packages_on_disk(parser: configparser.ConfigParser) -> dict[str, Path]:
    """Every folder below an installed top-level package that holds Python files."""
    found = {}
    for top, root in folders(parser).items():
        for folder in {file.parent for file in root.rglob("*.py")}:
            found[".".join((top, *folder.relative_to(root).parts))] = folder
    return found


def data_files(parser: configparser.ConfigParser) -> dict[Path, bool]:
    """Every file that is not code below an installed package: does ``package_data`` cover it?"""
    covered = set()
    for package, patterns in parser["options.package_data"].items():
        for pattern in patterns.split(","):
            covered |= set(packages_on_disk(parser)[package].glob(pattern.strip()))
    return {
        file: file in covered
        for root in folders(parser).values()
        for file in root.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix not in {".py", ".pyc"}
    }


def test_package_list_is_what_stands_on_disk(setup_cfg: configparser.ConfigParser) -> None:
    listed = lines(setup_cfg["options"]["packages"])
    assert sorted(listed) == sorted(packages_on_disk(setup_cfg))


def test_every_package_has_an_init(setup_cfg: configparser.ConfigParser) -> None:
    bare = [
        name for name, path in packages_on_disk(setup_cfg).items() if not (path / "__init__.py").is_file()
    ]
    assert not bare


def test_package_data_covers_every_file_that_is_not_code(setup_cfg: configparser.ConfigParser) -> None:
    files = data_files(setup_cfg)
    assert any(file.suffix == ".yaml" for file in files)
    assert [str(file.relative_to(REPOSITORY)) for file, covered in files.items() if not covered] == []


def test_one_version(setup_cfg: configparser.ConfigParser) -> None:
    assert dqss.__version__ == setup_cfg["metadata"]["version"]
    assert dqss.__version__ == importlib.metadata.version("dqss")


def test_pyproject_names_the_build_system_only() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("[")] == ["[build-system]"]


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, relative imports excluded."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "above", ["dqss.search_spaces", "search_spaces", "dqss.conf", "experiments", "tests"]
)
def test_the_library_never_imports_what_is_built_on_it(above: str) -> None:
    # import-linter cannot see these: they lie outside of the folder dqss.
    guilty = [
        f"{file.relative_to(REPOSITORY)}: {name}"
        for file in (REPOSITORY / "dqss").rglob("*.py")
        for name in imported(ast.parse(file.read_text(encoding="utf-8")))
        if name == above or name.startswith(f"{above}.")
    ]
    assert guilty == []
