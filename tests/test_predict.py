"""Predictions and metrics of the user's own: whole score matrices, in raw rows or in splits."""

import numpy as np
import pytest
import torch
from PIL import Image

from pico_hf.core.metrics import retrieval_metrics
from pico_hf.data.dataset import ImageTextDataset
from tiny import tiny_rows
from tiny_trainer import tiny_trainer

EXPECTED_LABELS = np.repeat(np.arange(12), 2)


@pytest.mark.parametrize("wrap", [lambda rows: rows, ImageTextDataset])
def test_predict_gives_scores_labels_and_metrics_of_rows_as_they_are(tmp_path, wrap):
    trainer = tiny_trainer(tmp_path)
    rows = wrap(tiny_rows(12))
    found = trainer.predict(rows)
    assert found.predictions.shape == (12, 24)
    assert found.predictions.dtype == np.float32
    np.testing.assert_array_equal(found.label_ids, EXPECTED_LABELS)
    scores = torch.from_numpy(found.predictions)
    for name, value in retrieval_metrics(scores, torch.from_numpy(found.label_ids)).items():
        assert found.metrics[f"test_{name}"] == pytest.approx(value)
    assert found.metrics["test_rsum"] == trainer.evaluate(rows)["eval_rsum"]
    assert {"test_runtime", "test_samples_per_second"} <= found.metrics.keys()


def test_predicted_scores_are_those_of_the_model(tmp_path):
    trainer = tiny_trainer(tmp_path, per_device_eval_batch_size=5)
    rows = ImageTextDataset(tiny_rows(12))
    batch = trainer.data_collator([{"image": rows.images()[n]["image"]} for n in (3, 7)])
    words = trainer.data_collator([rows.captions()[n] for n in (0, 15, 23)])
    with torch.no_grad():
        model = trainer.model.eval()
        images = model.encode_images(**batch)
        scores = model.score(images, model.encode_texts(**words))
    found = trainer.predict(rows).predictions[[3, 7]][:, [0, 15, 23]]
    np.testing.assert_allclose(found, scores.numpy(), atol=1e-5)


def test_predict_works_with_cached_features_and_its_own_prefix(tmp_path):
    trainer = tiny_trainer(tmp_path, freeze_encoder=True)
    found = trainer.predict(tiny_rows(12), metric_key_prefix="mine")
    assert found.predictions.shape == (12, 24)
    assert "mine_rsum" in found.metrics


def test_scores_across_galleries_are_minus_infinity(tmp_path):
    rows = tiny_rows(12).add_column("style", ["one", "two"] * 6)
    split = ImageTextDataset(rows)
    split.gallery = torch.arange(12) % 2
    trainer = tiny_trainer(tmp_path)
    found = trainer.predict(split)
    other = (np.arange(12)[:, None] + EXPECTED_LABELS[None]) % 2 == 1
    assert np.isneginf(found.predictions[other]).all()
    assert np.isfinite(found.predictions[~other]).all()
    whole = trainer.predict(ImageTextDataset(rows)).predictions
    np.testing.assert_allclose(found.predictions[~other], whole[~other], atol=1e-6)


def test_metrics_of_ones_own_join_ours_in_every_evaluation(tmp_path):
    seen = []

    def spread(prediction):
        seen.append(prediction)
        return {"spread": np.ptp(prediction.predictions), "eval_named": torch.tensor(2.0)}

    trainer = tiny_trainer(tmp_path, {"compute_metrics": spread}, metric_for_best_model="spread")
    found = trainer.evaluate()
    (prediction,) = seen
    assert prediction.predictions.shape == (12, 24)
    np.testing.assert_array_equal(prediction.label_ids, EXPECTED_LABELS)
    assert found["eval_spread"] == pytest.approx(np.ptp(prediction.predictions))
    assert found["eval_named"] == 2.0
    assert "eval_rsum" in found
    trainer.train()
    logged = [e["eval_spread"] for e in trainer.state.log_history if "eval_spread" in e]
    assert (
        trainer.state.best_metric == logged[0]
    )  # of the only epoch; the last one is of the aligned model


def test_scores_may_be_preprocessed_before_metrics_of_ones_own(tmp_path):
    options = {
        "preprocess_logits_for_metrics": lambda scores, labels: (scores.argmax(dim=0), labels),
        "compute_metrics": lambda p: {"top": float((p.predictions[0] == p.label_ids).mean())},
    }
    trainer = tiny_trainer(tmp_path, options)
    found = trainer.predict(tiny_rows(12))
    top = (found.predictions.argmax(axis=0) == found.label_ids).mean()
    assert found.metrics["test_top"] == pytest.approx(top)


def test_a_dict_of_dev_splits_has_metrics_of_ones_own_for_each(tmp_path):
    splits = {"seen": tiny_rows(12), "unseen": tiny_rows(16)}
    options = {"compute_metrics": lambda p: {"images": len(p.predictions)}, "eval_dataset": splits}
    found = tiny_trainer(tmp_path, options).evaluate()
    assert (found["eval_seen_images"], found["eval_unseen_images"]) == (12, 16)


def test_a_split_without_captions_cannot_be_predicted(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))] * 12})
    with pytest.raises(ValueError, match="`caption_column` could not be found"):
        tiny_trainer(tmp_path).predict(rows)
