"""What `import pico_hf` must not cost: seconds of libraries that only some users need."""

import json
import os
import subprocess
import sys

import pytest

import pico_hf

COSTLY = (
    "transformers.trainer",
    "peft",
    "evaluate",
    "datasets",
    "sklearn",
    "matplotlib",
    "transformers.pipelines",
)


def loaded_after(statement: str) -> set[str]:
    """Names of all modules loaded in a fresh interpreter after a statement."""
    script = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    return loaded_after("import pico_hf")


@pytest.fixture(scope="module")
def loaded_by_transformers() -> set[str]:
    return loaded_after("from transformers import AutoModel")  # scikit-learn, in 5.20


@pytest.mark.parametrize("name", COSTLY)
def test_importing_the_package_does_not_import(name, loaded, loaded_by_transformers):
    assert name not in loaded - loaded_by_transformers


def test_importing_the_package_imports_no_scipy_beyond_what_transformers_imports(loaded):
    # transformers imports scipy with every model class, so the name alone says nothing of ours.
    stock = loaded_after("from transformers import AutoModel, PreTrainedModel")
    assert [name for name in loaded - stock if name.partition(".")[0] == "scipy"] == []


def test_importing_the_package_does_import_the_model(loaded):
    assert "pico_hf.modeling_pico" in loaded


def test_a_model_is_built_and_scored_without_scikit_learn_and_scipy():
    """They build prototypes alone; transformers imports scipy too, but only where it finds it."""
    script = """
import sys

sys.modules |= {"sklearn": None, "scipy": None}  # as if they were not installed
import torch
from tiny import tiny_encoder, tiny_inputs
from pico_hf import PicoModel

model = PicoModel.from_encoder(tiny_encoder())
print(tuple(model(**tiny_inputs()).logits_per_image.shape))
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "(3, 3)"


def test_every_public_name_can_be_imported():
    for name in pico_hf.__all__:
        assert getattr(pico_hf, name).__module__.startswith("pico_hf."), name
