"""What a built wheel would hold and ask for, without building one."""

from pathlib import Path

import pytest

import pico_hf

ROOT = Path(__file__).parents[1]


@pytest.fixture
def options(monkeypatch):
    setupcfg = pytest.importorskip("setuptools.config.setupcfg")
    monkeypatch.chdir(ROOT)  # `where = src` is relative
    return setupcfg.read_configuration("setup.cfg")["options"]


def test_every_folder_with_code_is_a_package_of_the_wheel(options):
    source = ROOT / "src"
    files = set(source.rglob("*.py")) - set(source.glob("*.py"))
    folders = {path.parent.relative_to(source).as_posix() for path in files}
    assert {folder.replace("/", ".") for folder in folders} == set(options["packages"])


def test_every_module_outside_the_package_is_in_the_wheel(options):
    found = {path.stem for path in (ROOT / "src").glob("*.py")}
    assert found == set(options["py_modules"])


def test_the_metric_lies_beside_the_package():
    assert Path(pico_hf.__file__).parent in Path(pico_hf.retrieval_metric_path()).parents


def test_extras_are_read_as_requirements(options):
    marked = options["extras_require"]["triton"]
    assert [entry.partition(";")[0].strip() for entry in marked] == ["triton>=3.2"]
