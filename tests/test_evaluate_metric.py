"""The metric for 🤗 Evaluate gives what the package's own metrics give."""

from pathlib import Path

import pytest
import torch

import pico_hf
from pico_hf.core.metrics import retrieval_metrics
from test_metrics import random_retrieval


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads the metric with all caches in a temporary folder."""
    import evaluate

    kept = evaluate.config.HF_MODULES_CACHE
    evaluate.config.HF_MODULES_CACHE = tmp_path_factory.mktemp("modules")
    folder = str(tmp_path_factory.mktemp("cache"))
    yield lambda **options: evaluate.load(
        pico_hf.retrieval_metric_path(), cache_dir=folder, **options
    )
    evaluate.config.HF_MODULES_CACHE = kept


@pytest.mark.parametrize("levels", [None, 1], ids=["distinct", "many ties"])
@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_those_of_the_package(load, seed, levels):
    scores, index = random_retrieval(9, 31, seed, levels)
    expected = retrieval_metrics(scores, index)
    assert load().compute(predictions=scores.t(), references=index) == expected
    lists = load().compute(predictions=scores.t().tolist(), references=index.tolist())
    assert lists == expected


def test_batches_add_up_to_the_whole(load):
    scores, index = random_retrieval(9, 31, seed=0, levels=2)
    metric = load(keep_in_memory=True)
    for rows, images in zip(scores.t().split(7), index.split(7), strict=True):
        metric.add_batch(predictions=rows.numpy(), references=images.numpy())
    assert metric.compute() == retrieval_metrics(scores, index)


def test_captions_are_added_one_by_one(load):
    scores, index = random_retrieval(3, 5, seed=0)
    metric = load()
    for row, image in zip(scores.t(), index, strict=True):
        metric.add(prediction=row, reference=image)
    assert metric.compute() == retrieval_metrics(scores, index)


def test_a_second_use_starts_from_nothing(load):
    metric = load()
    for seed in (0, 1):
        scores, index = random_retrieval(4, 6, seed)
        result = metric.compute(predictions=scores.t(), references=index)
        assert result == retrieval_metrics(scores, index)


def test_embeddings_are_compared_by_their_cosine(load):
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(n, 6, generator=generator) for n in (5, 12))
    index = torch.cat([torch.arange(5), torch.randint(5, (7,), generator=generator)])
    cosines = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1)
    result = load().compute(predictions=texts, references=index, image_embeddings=images)
    assert result == retrieval_metrics(cosines, index)


def test_images_of_one_identity_do_not_compete(load):
    scores, index = random_retrieval(6, 14, seed=0, levels=2)
    names = ["mug", None, "mug", float("nan"), "pen", ""]
    expected = retrieval_metrics(scores, index, torch.tensor([0, 1, 0, 2, 3, 4]))
    assert expected != retrieval_metrics(scores, index)
    result = load().compute(predictions=scores.t(), references=index, image_ids=names)
    assert result == expected
    numbers = torch.tensor([5, 1, 5, 2, 3, 4])
    assert load().compute(predictions=scores.t(), references=index, image_ids=numbers) == expected


def test_logits_of_a_model_are_scored_as_they_are(load):
    logits = torch.randn(4, 4, requires_grad=True)
    result = load().compute(predictions=logits.t(), references=range(4))
    assert result == retrieval_metrics(logits.detach(), torch.arange(4))


def test_captions_scored_against_their_batch_only_are_refused(load):
    metric = load(keep_in_memory=True)
    metric.add_batch(predictions=torch.eye(3), references=[0, 1, 2])
    metric.add_batch(predictions=torch.eye(2), references=[3, 4])
    with pytest.raises(ValueError, match=r"rows of one length.* got rows of 2, 3\. Score every"):
        metric.compute()


def test_embeddings_of_another_width_are_refused(load):
    with pytest.raises(ValueError, match=r"must be \(images, 3\).* got \(3, 2\)"):
        load().compute(
            predictions=torch.eye(3), references=range(3), image_embeddings=torch.ones(3, 2)
        )


def test_an_index_that_does_not_fit_is_answered_as_by_the_package(load):
    with pytest.raises(ValueError, match=r"must hold rows from 0 to 2, got 0 to 3"):
        load().compute(predictions=torch.eye(3), references=[0, 1, 3])


def test_the_script_has_one_import_per_line():
    lines = Path(pico_hf.retrieval_metric_path()).read_text(encoding="utf-8").splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert len(imports) == 5
    assert not [line for line in imports if "," in line or "(" in line or "from ." in line]
