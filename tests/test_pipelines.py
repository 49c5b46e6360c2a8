"""Pipelines give the model's own numbers, whatever it wraps."""

import base64

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPProcessor,
    Siglip2Processor,
    SiglipProcessor,
    pipeline,
)

import pico_hf
from pico_hf import PicoCollator, PicoModel
from tiny import tiny_encoder, tiny_processor

LABELS = ["red square", "blue", "a big white disc"]
TASK = "zero-shot-image-classification"
IMAGES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "navy", "white")]
ENCODERS = ["clip", "siglip", "siglip2", "vit+bert"]


def parts(encoder: str, **knobs):
    """A wrapped model with a scale that tells labels apart, and what the pipelines need."""
    model = PicoModel.from_encoder(
        tiny_encoder(encoder), num_prototypes=3, pooled_share=0.0, **knobs
    )
    model.logit_scale.data.fill_(3.0)
    processor = tiny_processor(encoder)
    return model, {
        "model": model,
        "tokenizer": processor.tokenizer,
        "image_processor": processor.image_processor,
        "device": "cpu",
    }


def zero_shot(**given):
    return pipeline(TASK, pipeline_class=pico_hf.PicoZeroShotImageClassificationPipeline, **given)


def by_label(answer) -> list[float]:
    """Scores in the order of `LABELS`."""
    assert [row["score"] for row in answer] == sorted((r["score"] for r in answer), reverse=True)
    scores = {row["label"]: row["score"] for row in answer}
    return [scores[label] for label in LABELS]


def logits(model, encoder: str, template: str = "This is a photo of {}."):
    """The model's own answer to a batch from the collator."""
    collate = PicoCollator(tiny_processor(encoder), config=model.config)
    batch = collate([{"image": image} for image in IMAGES])
    batch |= collate([{"caption": template.format(label)} for label in LABELS])
    with torch.no_grad():
        return model(**batch).logits_per_image


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_zero_shot_scores_are_those_of_the_model(encoder, batch_size):
    model, given = parts(encoder)
    expected = logits(model, encoder)
    expected = expected.sigmoid() if "siglip" in encoder else expected.softmax(dim=-1)
    answers = zero_shot(**given)(IMAGES, candidate_labels=LABELS, batch_size=batch_size)
    torch.testing.assert_close(torch.tensor([by_label(answer) for answer in answers]), expected)


def test_one_image_gives_one_answer_and_one_label_one_score():
    model, given = parts("clip")
    classify = zero_shot(**given)
    expected = logits(model, "clip", "{} disc")[0].softmax(dim=-1)
    answer = classify(IMAGES[0], candidate_labels=LABELS, hypothesis_template="{} disc")
    torch.testing.assert_close(torch.tensor(by_label(answer)), expected)
    assert classify(IMAGES[0], candidate_labels=["red"]) == [{"score": 1.0, "label": "red"}]


def test_a_model_trained_by_the_sigmoid_loss_answers_yes_or_no_to_each_label():
    model, given = parts("clip", loss="sigmoid")
    answer = zero_shot(**given)(IMAGES[0], candidate_labels=LABELS)
    torch.testing.assert_close(torch.tensor(by_label(answer)), logits(model, "clip")[0].sigmoid())


def test_the_stock_pipeline_serves_encoders_like_clip():
    model, given = parts("clip")
    answers = pipeline(TASK, **given)(IMAGES, candidate_labels=LABELS)
    expected = logits(model, "clip").softmax(dim=-1)
    torch.testing.assert_close(torch.tensor([by_label(answer) for answer in answers]), expected)


@pytest.mark.parametrize("labels", [[], None, "red"])
def test_labels_must_be_a_list_of_some(labels):
    _, given = parts("clip")
    with pytest.raises(ValueError, match="`candidate_labels` must be a list of at least one label"):
        zero_shot(**given)(IMAGES[0], candidate_labels=labels)


@pytest.mark.parametrize("encoder", ["clip", "siglip", "siglip2"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_features_are_those_of_the_model(encoder, batch_size):
    model, given = parts(encoder)
    extract = features(**{**given, "tokenizer": None})
    images = [IMAGES[0], Image.new("RGB", (24, 40), "red"), IMAGES[2]]
    inputs = tiny_processor(encoder).image_processor(images, return_tensors="pt")
    with torch.no_grad():
        tokens = model.encode_images(**inputs)
    patches = extract(images, return_tensors=True, batch_size=batch_size)
    pooled = extract(images, return_tensors=True, pool=True, batch_size=batch_size)
    for row, (all_patches, mean) in enumerate(zip(patches, pooled, strict=True)):
        real = tokens.features[row][tokens.mask[row]]
        torch.testing.assert_close(all_patches, real[None])
        torch.testing.assert_close(mean[0], real.mean(dim=0) / real.mean(dim=0).norm())


def features(**given):
    return pipeline(
        "image-feature-extraction",
        pipeline_class=pico_hf.PicoImageFeatureExtractionPipeline,
        **given,
    )


def test_features_come_as_nested_lists_unless_tensors_are_asked_for():
    _, given = parts("clip")
    nested = features(**given)(IMAGES[0])
    assert (len(nested), len(nested[0]), len(nested[0][0])) == (1, 16, 16)


@pytest.mark.parametrize("make", [zero_shot, features])
def test_other_models_are_refused(make):
    _, given = parts("clip")
    with pytest.raises(ValueError, match="`model` must be a PicoModel, got CLIPModel"):
        make(**{**given, "model": tiny_encoder("clip")})


def test_the_stock_feature_pipeline_is_answered_with_what_to_use():
    _, given = parts("clip")
    with pytest.raises(ValueError, match=r"`input_ids` or `text_hidden_states`.*encode_images"):
        pipeline("image-feature-extraction", **given)(IMAGES[0])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_saved_folder_serves_auto_classes_and_pipelines(encoder, tmp_path):
    model, given = parts(encoder)
    classify = zero_shot(**given)
    classify.save_pretrained(tmp_path / "by the pipeline")
    model.save_pretrained(tmp_path / "by hand")
    tiny_processor(encoder).save_pretrained(tmp_path / "by hand")
    expected = logits(model, encoder)
    for folder in tmp_path.iterdir():
        again = AutoModel.from_pretrained(folder)
        assert type(again) is PicoModel
        torch.testing.assert_close(logits(again, encoder), expected)
        loaded = zero_shot(model=str(folder), device="cpu")
        answer = loaded(IMAGES[0], candidate_labels=LABELS)
        assert by_label(answer) == by_label(classify(IMAGES[0], candidate_labels=LABELS))
        assert features(model=str(folder), device="cpu")(IMAGES[0], pool=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "by hand")
    batch = PicoCollator(processor, config=again.config)([{"image": IMAGES[0], "caption": "red"}])
    assert torch.isfinite(again(**batch).logits_per_image).all()


@pytest.mark.parametrize(
    ("encoder", "kind"),
    [("clip", CLIPProcessor), ("siglip", SiglipProcessor), ("siglip2", Siglip2Processor)],
)
def test_the_encoders_own_processor_comes_back_from_a_saved_folder(encoder, kind, tmp_path):
    model, given = parts(encoder)
    model.save_pretrained(tmp_path)
    kind(given["image_processor"], given["tokenizer"]).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is kind
    rows = [{"image": IMAGES[0], "caption": "red disc"}]
    by_name = PicoCollator(processor)(rows)
    for name, value in PicoCollator(processor, config=model.config)(rows).items():
        torch.testing.assert_close(by_name[name], value)


def test_pipelines_read_transparency_and_depth_as_training_does(tmp_path):
    _, given = parts("clip")
    file = tmp_path / "clear.png"
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(file)
    text = base64.b64encode(file.read_bytes()).decode()
    kinds = [file.read_bytes(), str(file), text, f"data:image/png;base64,{text}"]
    kinds += [Image.new("I;16", (32, 32), 65535)]
    extract = features(**given)
    expected = extract(IMAGES[2], return_tensors=True)
    for image in kinds:
        torch.testing.assert_close(extract(image, return_tensors=True), expected)
