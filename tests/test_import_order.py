"""Modules stand on floors: each imports only modules below it, lazily or for types or not."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

import pico_hf

PACKAGE = Path(pico_hf.__file__).parent
MAX_FLOORS = 9
# The tensor core: every equation, on torch and the numeric libraries alone.
CORE_ROOMS = ("core", "kernels")
CORE_LIBRARIES = {"torch", "numpy", "scipy", "sklearn", "jaxtyping", "tqdm", "triton", "pico_hf"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
MODULES = sorted(FILES)
CORE = [name for name in MODULES if name.split(".")[1:2] and name.split(".")[1] in CORE_ROOMS]


def parse(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    """Full names of all that a module imports: inside functions and for type checkers too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def siblings(tree: ast.Module) -> set[str]:
    """Modules of this package that a module imports, or imports names of."""
    found = set()
    for name in imported(tree):
        origin = name if name in FILES else name.rpartition(".")[0]
        found |= {origin} & FILES.keys()
    return found


GRAPH = {module: siblings(parse(module)) - {module} for module in MODULES}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first of them twice; empty if none do."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for below in sorted(graph[module]):
            if found := visit(below, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def floors(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import none of the package, modules that import only those, and so on."""

    @cache
    def floor(module: str) -> int:
        return 1 + max((floor(below) for below in graph[module]), default=0)

    highest = max(floor(module) for module in graph)
    return [
        sorted(module.removeprefix("pico_hf.") for module in graph if floor(module) == number)
        for number in range(1, highest + 1)
    ]


def test_no_modules_import_each_other_in_a_circle():
    assert circle(GRAPH) == []


def test_the_package_has_few_floors(capsys):
    stand = floors(GRAPH)
    with capsys.disabled():
        print(f"\n{len(MODULES)} modules on {len(stand)} floors, no circle:")
        for number, modules in enumerate(stand, start=1):
            print(f"  {number}  {'  '.join(modules)}")
    assert len(stand) <= MAX_FLOORS


def test_rooms_have_no_code_in_their_init():
    rooms = [
        path for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "evaluate_metric"
    ]
    assert len(rooms) >= 7
    assert [path for path in rooms if path.read_text(encoding="utf-8").strip()] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_import_is_relative(module):
    assert not [name for name in imported(parse(module)) if name.startswith(".")]


@pytest.mark.parametrize("module", CORE)
def test_the_tensor_core_knows_numeric_libraries_only(module):
    roots = {name.split(".")[0] for name in imported(parse(module))}
    assert roots - sys.stdlib_module_names <= CORE_LIBRARIES


@pytest.mark.parametrize("module", CORE)
def test_the_tensor_core_stands_on_itself(module):
    assert all(below.split(".")[1] in CORE_ROOMS for below in GRAPH[module] - {"pico_hf"})


def test_imports_are_found_inside_functions_and_in_type_checking_blocks():
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from pico_hf.training_args import PicoTrainingArguments\n"
        "def late():\n    from pico_hf.core import losses\n    import pico_hf.cards.plots\n"
    )
    assert siblings(tree) == {
        "pico_hf.training_args",
        "pico_hf.core.losses",
        "pico_hf.cards.plots",
    }


def test_a_circle_is_found_and_floors_are_counted():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b"}, "b": set()}) == []
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == [["c"], ["b"], ["a"]]
