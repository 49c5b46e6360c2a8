"""The numbered examples do what their first lines say, on tiny models and without a network."""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from hub_client import run_client
from hub_server import Hub
from pico_hf import PicoModel
from tiny import tiny_encoder, tiny_processor, tiny_rows

FOLDER = Path(__file__).parents[1] / "examples"


def example(name: str):
    """The module of an example; its name begins with a digit, so `import` cannot take it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clip(tmp_path):
    """A folder with a plain encoder and its processor, as a repository of the Hub has them."""
    tiny_encoder().save_pretrained(tmp_path / "clip")
    tiny_processor().save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


def write_rows(path: Path, images: int) -> str:
    tiny_rows(images).to_parquet(path)
    return str(path)


def test_every_numbered_example_is_tested_here():
    names = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))
    assert names == ["01_wrap_and_score", "02_align_pretrained", "03_lora_and_push"]


def test_the_first_example_prints_the_scores_of_images_and_texts(clip, tmp_path, capsys):
    paths = []
    for colour in ("red", "navy"):
        paths.append(str(tmp_path / f"{colour}.png"))
        Image.new("RGB", (40, 30), colour).save(paths[-1])
    texts = ["red square", "a big white disc", "blue"]
    scores = example("01_wrap_and_score").main(paths, texts, encoder=clip)
    model = PicoModel.from_pretrained(clip)
    processor = tiny_processor()
    pixels = processor.image_processor([Image.open(path) for path in paths], return_tensors="pt")
    ids = processor.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.score(model.encode_images(**pixels), model.encode_texts(**ids))
    torch.testing.assert_close(scores, expected)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.split("\t") == ["", *texts]
    assert [line.split("\t")[0] for line in lines] == paths
    assert lines[1].split("\t")[1:] == [f"{score:.3f}" for score in expected[1].tolist()]


def test_the_second_example_saves_an_encoder_with_new_columns_and_old_weights(clip, tmp_path):
    pairs, test = (
        write_rows(tmp_path / "pairs.parquet", 260),
        write_rows(tmp_path / "t.parquet", 20),
    )
    folder = str(tmp_path / "aligned")
    before, after = example("02_align_pretrained").main(pairs, test, folder, encoder=clip)
    aligned = PicoModel.from_pretrained(folder)
    assert before != after
    assert float(aligned.column_weights.std()) > 0
    for name, value in tiny_encoder().state_dict().items():
        assert torch.equal(value, aligned.encoder.state_dict()[name]), name


PUSH = """
import importlib.util, sys
from tiny import tiny_encoder, tiny_processor, tiny_rows
from pico_hf import load_adapter_model
import torch

for part in (tiny_encoder(), tiny_processor()):
    part.push_to_hub("openai/clip-vit-base-patch32")
for name, images in (("train.parquet", 64), ("dev.parquet", 12)):
    tiny_rows(images).to_parquet(name)
spec = importlib.util.spec_from_file_location("example", sys.argv[1])
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
trainer = example.main(
    "train.parquet", "dev.parquet", "me/pico-adapter", num_train_epochs=2, use_cpu=True,
    load_best_model_at_end=False,  # the best one may be the first: its loss has not begun
)
pulled = load_adapter_model("me/pico-adapter").state_dict()
live = {name: value for name, value in trainer.model.state_dict().items() if "lora" in name}
assert live and any(value.any() for name, value in live.items() if "lora_B" in name)
for name, value in live.items():
    assert torch.equal(value, pulled[name]), name
"""


def test_the_third_example_pushes_an_adapter_that_can_be_pulled(tmp_path):
    hub = Hub()
    hub.tokens["writer"][1].update({"me", "openai"})
    try:
        run_client(hub, PUSH, tmp_path, str(FOLDER / "03_lora_and_push.py"))
        files = hub.files("me/pico-adapter")
    finally:
        hub.close()
    assert {"adapter_config.json", "config.json", "tokenizer.json", "README.md"} <= files.keys()
    assert load(files["prototypes.safetensors"])
    assert "model.safetensors" not in files
    assert b"base_model: openai/clip-vit-base-patch32" in files["README.md"]
