"""Modules form one line: each imports only modules above it, at any depth, lazily or not."""

import ast
import sys
from pathlib import Path

import pytest

import pico_hf

PACKAGE = Path(pico_hf.__file__).parent

# The tensor core: every equation, on torch and the numeric libraries alone.
CORE = (
    "packing",
    "late_interaction",
    "interaction_gradient",
    "fused_kernels",
    "fused_interaction",
    "similarity",
    "semantic",
    "fusion",
    "prototypes",
    "canonical",
    "alignment",
    "calibration",
    "losses",
    "metrics",
)
# The configuration comes after the core, whose dicts say which values are valid.
ORDER = (
    *CORE,
    "configuration_pico",
    "encoder_features",
    "encoder_spec",
    "encoder_table",
    "encoders",
    "encoder_check",
    "checked_files",
    "prototype_files",
    "remote_code",
    "loading",
    "adapter_files",
    "adapter_loading",
    "model_files",
    "token_model",
    "modeling_pico",
    "image_files",
    "columns",
    "data_loading",
    "data",
    "pipelines",
    "evaluation",
    "feature_cache",
    "callbacks",
    "training_args",
    "run_splits",
    "plots",
    "model_card",
    "publishing",
    "trainer",
    "lora",
    "export",
    "cli",
    "__init__",
)
CORE_LIBRARIES = {"torch", "numpy", "scipy", "sklearn", "jaxtyping", "tqdm", "triton", "pico_hf"}


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    """Full names of what a module imports when it runs; a block for type checkers never does."""
    names, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            names |= {f"{origin}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    return names


def siblings(tree: ast.Module) -> set[str]:
    own = {name for name in imported(tree) if name.startswith("pico_hf.")}
    return {name.split(".")[1] for name in own}


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def test_every_module_has_a_place_in_the_order():
    assert set(MODULES) <= set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_each_module_imports_only_modules_above_it(module):
    above = set(ORDER[: ORDER.index(module)])
    assert siblings(parse(module)) <= above


@pytest.mark.parametrize("module", MODULES)
def test_no_import_is_relative(module):
    assert not [name for name in imported(parse(module)) if name.startswith(".")]


@pytest.mark.parametrize("module", CORE)
def test_the_tensor_core_knows_numeric_libraries_only(module):
    roots = {name.split(".")[0] for name in imported(parse(module))}
    assert roots - sys.stdlib_module_names <= CORE_LIBRARIES


def test_imports_are_found_inside_functions_and_not_in_type_checking_blocks():
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from pico_hf.trainer import PicoTrainer\n"
        "def late():\n    from pico_hf import losses\n    import pico_hf.plots\n"
    )
    assert siblings(tree) == {"losses", "plots"}
