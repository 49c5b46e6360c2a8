"""The demo page: what it finds and explains, and that a browser asks no other host for anything."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from command_line import refused
from pico_hf import PicoIndex, PicoRetriever
from pico_hf.demo import embedded
from pico_hf.demo.finder import Finder, add_images, compared_models, filter_values
from tiny import tiny_processor, tiny_refined, tiny_rows

gradio = pytest.importorskip("gradio")
ENCODER, BASE, PICO = "pooled cosine", "base, w = 1", "PICO"


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A folder with a model and photos in two folders."""
    folder = tmp_path_factory.mktemp("demo")
    for part in (tiny_refined(), tiny_processor()):
        part.save_pretrained(folder / "model")
    for number, row in enumerate(tiny_rows(8)):
        place = folder / "photos" / ("ink" if number % 2 else "oil")
        place.mkdir(parents=True, exist_ok=True)
        row["image"].resize((96, 96), Image.Resampling.NEAREST).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def finder(shop) -> Finder:
    index = PicoIndex.create(None, PicoRetriever.from_pretrained(shop / "model"))
    return Finder(index, add_images(index, shop / "photos"))


# ---- what is found -----------------------------------------------------------------------------


def test_each_scoring_ranks_as_that_model_scores(finder, shop):
    retriever = PicoRetriever.from_pretrained(shop / "model")
    files = sorted((shop / "photos").rglob("*.png"))
    images, texts = retriever.encode_images(files), retriever.encode_texts(["a red disc"])
    prototypes = retriever.model.prototypes
    sides = (
        prototypes.to_encoder_columns(images, "image"),
        prototypes.to_encoder_columns(texts, "text"),
    )
    pooled = torch.nn.functional.normalize(sides[0].pooled.float(), dim=-1) @ (
        torch.nn.functional.normalize(sides[1].pooled.float(), dim=-1).T
    )
    products = sides[0].features.float() @ sides[1].features[0][sides[1].mask[0]].float().T
    base = products.amax(dim=2).mean(dim=1) + products.amax(dim=1).mean(dim=1)
    wanted = {ENCODER: pooled[:, 0], BASE: base, PICO: retriever.score(images, texts)[:, 0]}
    assert finder.scorings == list(wanted)
    for name, scores in wanted.items():
        found = {Path(hit.path): hit.score for hit in finder.search("a red disc", name)}
        torch.testing.assert_close(
            torch.tensor([found[file] for file in files]), scores, atol=2e-3, rtol=0
        )
    assert not torch.allclose(wanted[BASE], wanted[PICO], atol=1e-2)


def test_models_that_are_compared_share_one_encoder_and_leave_the_model_alone():
    model = tiny_refined()
    before = {name: own.clone() for name, own in model.prototypes.state.items()}
    models = compared_models(model)
    assert models[PICO] is model
    assert all(own.encoder is model.encoder for own in models.values())
    assert models[ENCODER].pooled_share == 1.0
    assert torch.equal(models[BASE].column_weights, torch.ones_like(model.column_weights))
    after = model.prototypes.state
    assert all(torch.equal(after[name], own) for name, own in before.items())


@pytest.mark.parametrize("scoring", [ENCODER, BASE, PICO])
def test_heat_maps_explain_the_score_that_is_shown(finder, scoring):
    hit = finder.search("a red disc", scoring)[0]
    why = finder.explain(hit.id, "a red disc", scoring)
    assert why.score == pytest.approx(hit.score, abs=2e-3)
    assert float(why.weighted.columns.sum()) == pytest.approx(why.score, abs=1e-5)


def test_folders_and_columns_become_filters(finder, shop):
    assert finder.filters == ["folder: ink", "folder: oil"]
    hits = finder.search("a disc", PICO, ["folder: ink"])
    assert {Path(hit.path).parent.name for hit in hits} == {"ink"}
    assert len(finder.search("a disc", PICO, finder.filters)) == len(finder) == 8
    many = [{"id": number, "path": "p", "style": ["x", "y"]} for number in range(40)]
    assert list(filter_values(many)) == ["style: x", "style: y"]


def test_an_image_finds_itself(finder, shop):
    file = shop / "photos" / "ink" / "1.png"
    assert Path(finder.search(file, PICO)[0].path) == file


def test_images_of_a_table_have_pictures_too(shop, tmp_path):
    table = tmp_path / "pairs.parquet"
    tiny_rows(6).add_column("style", ["a", "b"] * 3).to_parquet(table)
    from pico_hf.cli.sources import image_rows

    index = PicoIndex.create(None, PicoRetriever.from_pretrained(shop / "model"))
    finder = Finder(index, add_images(index, image_rows(str(table))))
    assert {"style: a", "style: b"} <= set(finder.filters)
    hit = finder.search("a red disc", PICO, ["style: b"])[0]
    assert hit.payload["style"] == "b"
    assert finder.picture(hit.id).mode == "RGB"
    with pytest.raises(ValueError, match="at least one word"):
        finder.search("  ", PICO)
    with pytest.raises(ValueError, match="has no file"):
        Finder(index).picture(hit.id)


# ---- the command -------------------------------------------------------------------------------


def test_without_embedded_data_one_line_says_what_to_pass(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "CHECKOUT", tmp_path)
    for name in ("embedded_images", "embedded_model"):
        own = getattr(embedded, name)
        monkeypatch.setattr(embedded, name, lambda own=own: own(tmp_path))
    assert "pico-hf demo MODEL --images FOLDER" in refused("demo")
    assert "pico-hf demo MODEL --images FOLDER" in refused("demo", shop / "model")
    assert "Name a model" in refused("demo", "--images", shop / "photos")
    assert "no image" in refused("demo", shop / "model", "--images", tmp_path)
    assert "by --images" in refused("push", shop / "model", "me/page", "--space")
    assert "is for --space" in refused("push", shop / "model", "me/page", "--images", shop)


def test_the_embedded_drawings_come_with_a_checkout():
    images = embedded.embedded_images()
    assert images is not None
    assert images.name == "validation_unseen.parquet"


def test_an_untrained_embedded_model_is_none(tmp_path):
    assert embedded.embedded_model(tmp_path) is None


# ---- a Space -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_space_holds_all_that_the_page_needs(shop, tmp_path):
    from hub_client import run_client
    from hub_server import Hub

    hub = Hub()
    hub.tokens["writer"][1].add("me")
    words = ["push", str(shop / "model"), "me/page", "--space", "--images", str(shop / "photos")]
    script = (
        "import sys, pico_hf_command\n"
        "try:\n    pico_hf_command.main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert not end.code\n"
    )
    try:
        shown = run_client(hub, script, tmp_path, *words, timeout=300)
        repository = hub.repositories["me/page"]
        files = hub.files("me/page")
    finally:
        hub.close()
    assert "/spaces/me/page" in shown
    assert (repository.kind, repository.sdk) == ("space", "gradio")
    expected = {"app.py", "README.md", "requirements.txt", "pico_hf/__init__.py"}
    assert expected | {"model/config.json", "images/ink/1.png"} <= set(files)
    assert not [name for name in files if "__pycache__" in name]
    assert b"sdk: gradio\n" in files["README.md"]
    assert gradio.__version__.encode() in files["README.md"]
    assert {b"transformers>=", b"matplotlib>="} <= {
        line[: line.index(b">") + 2]
        for line in files["requirements.txt"].splitlines()
        if b">" in line
    }
    for name, content in files.items():
        path = tmp_path / "space" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    check = (
        "import json, sys; sys.path.insert(0, ''); import pico_hf, app; "
        "print(json.dumps([pico_hf.__file__, type(app.demo).__name__]))"
    )
    ran = run_in(tmp_path / "space", check)
    assert ran[0] == str(tmp_path / "space" / "pico_hf" / "__init__.py")
    assert ran[1] == "Blocks"


def run_in(folder: Path, script: str):
    """What a script prints as JSON that runs in a folder, whose modules come first."""
    places = [str(folder), *(p for p in sys.path if p and not p.endswith(("/src", "/tests")))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


# ---- in a browser ------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium, which logs every request."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromium-driver are not installed (apt-get install both)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.add_argument("--window-size=1280,1500")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(50)
    yield driver
    driver.quit()


def requested(driver) -> set[str]:
    """Addresses that the page has asked for."""
    logged = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    sent = [one["params"] for one in logged if one["method"] == "Network.requestWillBeSent"]
    # Chromium's own pages, such as an empty start page, are no business of this one.
    return {one["request"]["url"] for one in sent if one["documentURL"].startswith("http")}


class Page:
    """The page as a visitor sees it."""

    def __init__(self, driver, address: str) -> None:
        self.driver = driver
        driver.get(address)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def until(self, what, seconds: float = 60):
        """What a function returns as soon as it is true."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := what():
                    return value
            except StaleElementReferenceException:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not seen in {seconds} s: {self.driver.page_source[-3000:]}")

    def type_words(self, words: str) -> None:
        box = self.until(lambda: self.all("#words textarea"))[0]
        box.clear()
        box.send_keys(words)
        self.all("#search")[0].click()

    def status(self) -> str:
        return self.until(lambda: self.all("#status"))[0].text

    def captions(self) -> list[str]:
        return [one.text for one in self.all("#found .caption-label")]

    def choose(self, name: str) -> None:
        labels = self.all("#scoring label")
        next(one for one in labels if one.text.strip() == name).click()

    def filter_by(self, value: str) -> None:
        from selenium.webdriver.common.keys import Keys

        box = self.all("#filters input")[0]
        box.click()
        box.send_keys(value)
        self.until(lambda: len(self.all("[role=option]")) == 1)  # what is left of all
        box.send_keys(Keys.ENTER)

    def drop(self, file: Path) -> None:
        """Drops a file on the page, as from a folder of the desktop."""
        script = """
            const [zone, name, content] = arguments
            const bytes = Uint8Array.from(atob(content), one => one.charCodeAt(0))
            const data = new DataTransfer()
            data.items.add(new File([bytes], name, {type: "image/png"}))
            for (const kind of ["dragenter", "dragover", "drop"]) {
                const options = {dataTransfer: data, bubbles: true, cancelable: true}
                zone.dispatchEvent(new DragEvent(kind, options))
            }
        """
        (zone,) = self.all("#picture button[aria-dropeffect]")
        content = base64.b64encode(file.read_bytes()).decode()
        self.driver.execute_script(script, zone, file.name, content)

    def loaded(self, selector: str) -> list:
        """Images whose pixels are there."""
        width = "return arguments[0].naturalWidth"
        return [i for i in self.all(selector) if self.driver.execute_script(width, i) > 0]


def walk(
    driver, address: str, words: str, screenshot: Path, style: str, image: Path
) -> dict[str, list[str]]:
    """Visits the page: searches, switches, sees why, filters, drops an image, sees why again.

    The screenshot is of the first heat maps.
    """
    page, seen = Page(driver, address), {}
    page.type_words(words)
    page.until(lambda: "scored by PICO" in page.status())
    page.until(lambda: page.loaded("#found img"))
    seen["PICO"] = page.until(page.captions)
    for name in ("encoder", "base, w = 1"):
        page.choose(name)
        page.until(lambda name=name: f"scored by {name}" in page.status())
        seen[name] = page.until(page.captions)
    page.choose("PICO")
    page.until(lambda: "scored by PICO" in page.status())
    page.until(lambda: page.captions() == seen["PICO"])
    page.until(lambda: page.all("#found button"))[0].click()
    page.until(lambda: page.loaded("#maps img"))
    assert page.all("#why")[0].text.startswith(seen["PICO"][0].partition(" ")[0])
    time.sleep(0.5)  # gradio fades its progress out
    screenshot.parent.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(screenshot))
    page.filter_by(style)
    page.until(lambda: f"only {style}" in page.status())
    seen["filtered"] = page.until(page.captions)
    assert not page.loaded("#maps img")  # they were of another search
    page.drop(image)
    page.until(lambda: "for the image, scored by PICO, only" in page.status())
    page.until(lambda: page.loaded("#found img"))
    seen["image"] = page.until(page.captions)
    page.until(lambda: page.all("#found button"))[0].click()
    page.until(lambda: page.loaded("#maps img"))
    assert words in page.all("#why")[0].text  # of the words that stand in the box
    return seen


@pytest.mark.slow
def test_a_visitor_searches_switches_and_sees_why(shop, browser, tmp_path):
    from pico_hf.cli.commands.demo import demo_page
    from pico_hf.demo.serving import serve

    page = demo_page(shop / "model", shop / "photos")
    address = serve(page)
    screenshot = tmp_path / "demo.png"
    try:
        image = shop / "photos" / "ink" / "3.png"
        seen = walk(browser, address, "a red disc", screenshot, "folder: ink", image)
        asked = requested(browser)
    finally:
        page.close(verbose=False)
    whole = [seen[name] for name in ("encoder", "base, w = 1", "PICO")]
    assert all(len(captions) == 8 for captions in whole)
    assert all(".png" in caption and "·" in caption for caption in seen["PICO"])
    assert len({tuple(captions) for captions in whole}) == 3  # scores differ
    names = {part for caption in seen["filtered"] for part in caption.split() if ".png" in part}
    assert names == {f"{number}.png" for number in (1, 3, 5, 7)}
    assert "3.png" in seen["image"][0]
    assert len(seen["image"]) == 4
    assert Image.open(screenshot).size[0] >= 1000
    outside = {url for url in asked if not url.startswith((address, "data:", "blob:"))}
    assert asked
    assert not outside


@pytest.mark.slow
def test_the_embedded_drawings_are_found_and_explained(browser, tmp_path):
    """Where `make demo` has trained the model; the picture of the README is made here."""
    if embedded.embedded_model() is None:
        pytest.skip("the embedded model is not trained: make demo")
    from pico_hf.cli.commands.demo import demo_page
    from pico_hf.demo.serving import serve

    heart = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(heart)
    for box in ((20, 24, 68, 72), (60, 24, 108, 72)):
        draw.ellipse(box, fill="#e02030")
    draw.polygon([(24, 60), (104, 60), (64, 112)], fill="#e02030")
    heart.save(tmp_path / "heart.png")
    page = demo_page()
    screenshot = Path(os.environ.get("PICO_DEMO_SCREENSHOT", tmp_path / "demo.png"))
    try:
        style = "style: fluent-emoji-flat"
        image = tmp_path / "heart.png"
        seen = walk(browser, serve(page), "red heart", screenshot, style, image)
    finally:
        page.close(verbose=False)
    for name in ("PICO", "filtered", "image"):
        assert any("heart" in caption for caption in seen[name][:6]), seen
    assert seen["filtered"] != seen["PICO"]
    assert screenshot.stat().st_size > 50_000


@pytest.mark.slow
def test_the_served_page_names_no_other_host(shop):
    import httpx

    from pico_hf.cli.commands.demo import demo_page
    from pico_hf.demo.serving import POLICY, serve

    page = demo_page(shop / "model", shop / "photos")
    address = serve(page)
    try:
        with httpx.Client(trust_env=False) as client:
            answer = client.get(address)
    finally:
        page.close(verbose=False)
    assert address.startswith("http://127.0.0.1:")
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == POLICY
    head = answer.text.partition("<body")[0]
    tags = [part for part in head.split("<") if part.startswith(("meta", "link", "script src"))]
    assert not [tag for tag in tags if "https://" in tag]
    assert "fonts.googleapis.com" not in answer.text
