"""The same data in four forms trains, feeds back and ranks alike, to the last bit."""

import io
import itertools
import random

import datasets
import pytest
import torch
from PIL import Image

from pico_hf import PicoModel, PicoTrainer, PicoTrainingArguments
from pico_hf.data.loading import load_image_text
from pico_hf.training.feedback_log import logged_refinements
from tiny import WORDS, tiny_encoder, tiny_processor

IMAGES, CAPTIONS = 40, 5
FORMS = ("nested", "exploded", "csv", "parquet")


def pictures(count: int, seed: int) -> list[bytes]:
    generator = torch.Generator().manual_seed(seed)
    files = []
    for _ in range(count):
        pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def captions(count: int, seed: int) -> list[list[str]]:
    chosen = random.Random(seed)
    return [
        [" ".join(chosen.sample(WORDS, chosen.randint(1, 6))) for _ in range(CAPTIONS)]
        for _ in range(count)
    ]


def encoded(images: list[bytes], texts: list) -> datasets.Dataset:
    rows = {"image": [{"bytes": image, "path": None} for image in images], "caption": texts}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def in_form(form: str, folder, images: list[bytes], texts: list[list[str]], seed: int):
    if form == "nested":
        return encoded(images, texts)
    pairs = [(n, text) for n, own in enumerate(texts) for text in own]
    random.Random(f"{form}/{seed}").shuffle(pairs)
    if form == "csv":
        for number, image in enumerate(images):
            (folder / f"{seed}-{number}.png").write_bytes(image)
        lines = [f"{seed}-{number}.png,{text}" for number, text in pairs]
        (folder / f"{seed}.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
        return load_image_text(files=folder / f"{seed}.csv")
    rows = encoded([images[number] for number, _ in pairs], [text for _, text in pairs])
    if form == "exploded":
        return rows
    rows.to_parquet(folder / f"{seed}.parquet")
    return load_image_text(files=folder / f"{seed}.parquet")


def run(form: str, folder, estimators: list[str], freeze: bool):
    """Metrics of all evaluations and the final weights."""
    folder.mkdir()
    train, dev = (
        in_form(form, folder, pictures(IMAGES, seed), captions(IMAGES, seed), seed)
        for seed in (1, 2)
    )
    torch.manual_seed(0)
    trainer = PicoTrainer(
        PicoModel.from_encoder(
            tiny_encoder(), num_prototypes=3, probe_size=16, estimators=estimators
        ),
        PicoTrainingArguments(
            output_dir=str(folder / "run"),
            num_train_epochs=3,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            learning_rate=1e-2,
            alignment_images=30,
            freeze_encoder=freeze,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=dev,
        processing_class=tiny_processor(),
    )
    trainer.train()
    metrics = [
        {key: value for key, value in entry.items() if "eval_" in key and "_r" in key}
        | {key: value for key, value in entry.items() if key.startswith("pico_")}
        for entry in trainer.state.log_history
    ]
    speeds = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    kept = [{k: v for k, v in entry.items() if k not in speeds} for entry in metrics]
    return kept, trainer.pico_model.state_dict()


@pytest.mark.parametrize(
    ("estimators", "freeze"),
    [(["style"], False), (["style"], True), (["canonical", "pooled"], True)],
)
def test_one_caption_a_row_or_five_from_memory_or_files_all_train_alike(
    tmp_path, estimators, freeze
):
    results = {form: run(form, tmp_path / form, estimators, freeze) for form in FORMS}
    assert any("eval_rsum" in entry for entry in results["nested"][0])
    assert logged_refinements(results["nested"][0])
    for one, other in itertools.pairwise(FORMS):
        assert results[one][0] == results[other][0]
        for name, value in results[one][1].items():
            assert torch.equal(value, results[other][1][name]), name
