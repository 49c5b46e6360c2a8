"""What README and guides say is true of the code: blocks run, links and names exist."""

import configparser
import importlib.util
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

import run_pico
from command_line import parse
from hub_client import run_client
from hub_server import Hub
from pages import PAGES, ROOT, blocks

NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# Pages whose code needs an extra that may be missing.
NEEDS = {
    "docs/mteb.md": "mteb",
    "docs/qdrant.md": "qdrant_edge",
    "docs/sentence_transformers.md": "sentence_transformers",
}
WITH_PYTHON = [name for name in NAMES if blocks(ROOT / name, "python")]
RUNNABLE = [name for name in WITH_PYTHON if name not in NEEDS or find_spec(NEEDS[name])]
COMMANDS = [
    (name, command.strip())
    for name in NAMES
    for _, code in blocks(ROOT / name, "bash")
    for command in code.replace("\\\n", " ").splitlines()
    if command.strip()
]
PACKAGE = ROOT / "src" / "pico_hf"


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    """Page → why its Python could not be run; one process for all pages, since it takes seconds."""
    hub, folder = Hub(), tmp_path_factory.mktemp("pages")
    hub.tokens["writer"][1].update({"me", "openai", "google", "google-bert"})
    script = (
        "import json, sys; from pathlib import Path; from pages import run_pages; "
        "print(json.dumps(run_pages(sys.argv[1:], Path.cwd())))"
    )
    try:
        output = run_client(hub, script, folder, *RUNNABLE, timeout=300)
        return json.loads(output.splitlines()[-1])
    finally:
        hub.close()


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_the_python_of_a_page_runs(name, failures):
    if name not in RUNNABLE:
        pytest.skip(f"{NEEDS[name]} is not installed")
    assert not failures[name], failures[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_code_block_is_in_a_language_that_is_tested(name):
    fences = (ROOT / name).read_text(encoding="utf-8").count("\n```")
    assert fences == 2 * sum(len(blocks(ROOT / name, kind)) for kind in ("python", "bash"))


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_a_command_of_a_page_is_one_that_exists(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("output_dir: out\n")
    program, *arguments = shlex.split(command, comments=True)
    if program == "make":
        assert set(arguments) <= make_targets()
    elif program == "pip":
        assert arguments[0] == "install"
        assert set(re.findall(r"[\w-]+", arguments[1])) <= extras()
    elif program == "pico-hf":
        parse(arguments)
    else:
        assert program == "python"
        parse_script(*arguments)


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


def extras() -> set[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return set(config["options.extras_require"])


def parse_script(path: str, *arguments: str) -> None:
    """Parses the options of an example; one that it does not know raises."""
    if path == "examples/run_pico.py":
        if arguments != ("--help",):
            run_pico.parse_arguments(list(arguments))
        return
    spec = importlib.util.spec_from_file_location("example", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.parse_arguments(arguments)


@pytest.mark.parametrize("name", NAMES)
def test_the_links_of_a_page_lead_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_table_of_files_names_every_file_of_the_package_and_no_other():
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.(?:py|md))`", text))
    source = {path for path in PACKAGE.rglob("*") if path.suffix in {".py", ".md"}}
    written = {p.relative_to(PACKAGE).as_posix() for p in source if p.stat().st_size}
    assert named == written


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90


@pytest.mark.parametrize("name", NAMES)
def test_no_page_links_to_a_package_registry(name):
    assert not re.search(r"pypi\.|anaconda\.org", (ROOT / name).read_text(encoding="utf-8"))
