"""What `import pico_hf` must not cost: seconds of libraries that only some users need."""

import json
import subprocess
import sys

import pytest

COSTLY = (
    "transformers.trainer",
    "peft",
    "evaluate",
    "datasets",
    "scipy",
    "sklearn",
    "matplotlib",
    "transformers.pipelines",
)


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """Names of all modules loaded in a fresh interpreter after `import pico_hf`."""
    script = "import json, sys, pico_hf; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", COSTLY)
def test_importing_the_package_does_not_import(name, loaded):
    assert name not in loaded


def test_importing_the_package_does_import_the_model(loaded):
    assert "pico_hf.modeling_pico" in loaded
