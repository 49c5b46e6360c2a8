"""A Pico model inside sentence-transformers: the same scores, one repository, its own tools."""

import numpy as np
import pytest
import torch
from PIL import Image

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.2")

from sentence_transformers import MultiVectorEncoder  # noqa: E402
from sentence_transformers.multi_vector_encoder.evaluation import (  # noqa: E402
    MultiVectorInformationRetrievalEvaluator,
)
from sentence_transformers.multi_vector_encoder.modules import (  # noqa: E402
    HierarchicalTokenPooling,
)

from pico_hf import PicoCollator, PicoModel  # noqa: E402
from pico_hf.encoders.inputs import image_inputs, text_inputs  # noqa: E402
from pico_hf.multi_vector import (  # noqa: E402
    PicoInputModule,
    both_directions,
    multi_vector_encoder,
)
from tiny import tiny_encoder, tiny_processor, tiny_refined, tiny_rows  # noqa: E402

CAPTIONS = ["a big red square", "blue disc", "a small white disc on a green square", "red"]
# Of every kind: padding that is attended to, padded patches, queries, convolution, two towers.
KINDS = ["clip", "siglip", "siglip2", "blip-2-itm", "align", "vit+bert"]


def pictures(count: int = 5) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(40, 60), (32, 32), (64, 24), (50, 50), (30, 90)]
    return [
        Image.fromarray(generator.integers(0, 255, (*sizes[n % 5], 3), dtype=np.uint8))
        for n in range(count)
    ]


def weighted(name: str = "clip") -> PicoModel:
    model = PicoModel.from_encoder(
        tiny_encoder(name), num_prototypes=3, probe_size=3, pooled_share=0.0
    ).eval()
    columns = model.column_weights.numel()
    model.prototypes.semantic_probability.copy_(torch.linspace(0.2, 1.0, columns))
    return model


@torch.no_grad()
def features(model: PicoModel, name: str = "clip"):
    collate = PicoCollator(tiny_processor(name), config=model.config)
    images = collate([{"image": image} for image in pictures()])
    texts = collate([{"caption": caption} for caption in CAPTIONS])
    return (
        model.encode_images(**image_inputs(images, model.device)),
        model.encode_texts(**text_inputs(texts, model.device)),
    )


def halves(images, texts, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """mean_p max_w s and mean_w max_p s of every image and text, one pair at a time."""
    shape = len(images), len(texts)
    by_patch, by_word = torch.zeros(shape), torch.zeros(shape)
    for i in range(shape[0]):
        for t in range(shape[1]):
            patches = images.features[i][images.mask[i]]
            s = patches @ (texts.features[t][texts.mask[t]] * weights).T
            by_patch[i, t], by_word[i, t] = s.amax(dim=1).mean(), s.amax(dim=0).mean()
    return by_patch, by_word


@pytest.mark.parametrize("name", KINDS)
def test_similarity_is_the_half_of_the_score_that_belongs_to_the_query(name):
    model = weighted(name)
    encoder = multi_vector_encoder(model, tiny_processor(name))
    by_patch, by_word = halves(*features(model, name), model.column_weights)
    scores = encoder.similarity(encoder.encode_query(CAPTIONS), encoder.encode_document(pictures()))
    torch.testing.assert_close(scores.T, by_word, atol=1e-6, rtol=0)
    scores = encoder.similarity(encoder.encode_query(pictures()), encoder.encode_document(CAPTIONS))
    torch.testing.assert_close(scores, by_patch, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_both_directions_are_the_models_score(name):
    model = weighted(name)
    encoder = multi_vector_encoder(model, tiny_processor(name))
    expected = model.score(*features(model, name))
    by_text = both_directions(encoder.encode_query(CAPTIONS), encoder.encode_document(pictures()))
    torch.testing.assert_close(by_text.T, expected, atol=1e-6, rtol=0)
    by_image = both_directions(encoder.encode_query(pictures()), encoder.encode_document(CAPTIONS))
    torch.testing.assert_close(by_image, expected, atol=1e-6, rtol=0)
    unweighted = both_directions(
        encoder.encode_document(CAPTIONS), encoder.encode_document(pictures())
    )
    assert (unweighted.T - expected).abs().max() > 1e-4  # weights were in the queries only


@torch.no_grad()
def test_canonical_columns_come_along():
    model = tiny_refined(estimators=["canonical", "pooled"]).eval()
    assert int(model.prototypes.iteration) > 0
    encoder = multi_vector_encoder(model, tiny_processor())
    scores = both_directions(encoder.encode_query(CAPTIONS), encoder.encode_document(pictures()))
    torch.testing.assert_close(scores.T, model.score(*features(model)), atol=1e-6, rtol=0)


@torch.no_grad()
def test_one_repository_loads_in_both(tmp_path):
    model = weighted()
    encoder = multi_vector_encoder(model, tiny_processor())
    encoder.save_pretrained(str(tmp_path))
    expected, queries = model.score(*features(model)), encoder.encode_query(CAPTIONS)

    again = PicoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again.score(*features(again)), expected)
    wrapped = multi_vector_encoder(tmp_path)
    loaded = MultiVectorEncoder(str(tmp_path), trust_remote_code=True, device="cpu")
    for other in (wrapped, loaded):
        assert isinstance(other[0], PicoInputModule)
        assert other.similarity_fn_name == "meanmaxsim"
        for before, after in zip(queries, other.encode_query(CAPTIONS), strict=True):
            assert torch.equal(before, after)


def test_a_saved_model_becomes_an_encoder_without_new_files(tmp_path):
    for part in (weighted(), tiny_processor()):
        part.save_pretrained(tmp_path)
    encoder = multi_vector_encoder(str(tmp_path))
    assert encoder.get_embedding_dimension() == 16
    assert encoder.max_seq_length == 16
    assert not encoder[0].model.training


def test_a_repository_is_not_loaded_without_consent(tmp_path):
    multi_vector_encoder(weighted(), tiny_processor()).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        MultiVectorEncoder(str(tmp_path), device="cpu")


def test_images_come_as_files_arrays_and_dicts(tmp_path):
    encoder = multi_vector_encoder(weighted(), tiny_processor())
    image = pictures(1)[0]
    image.save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    expected = encoder.encode_document([image])[0]
    for same in (path, np.asarray(image), {"image": image}, {"image": path}):
        assert torch.equal(encoder.encode_document([same])[0], expected)
    assert torch.equal(encoder.encode_document(image), expected)


def test_a_prompt_begins_every_text():
    encoder = multi_vector_encoder(weighted(), tiny_processor())
    expected = encoder.encode_query(["a red disc"])[0]
    assert torch.equal(encoder.encode_query(["disc"], prompt="a red ")[0], expected)
    assert torch.equal(encoder.encode_query([{"text": "a red disc"}])[0], expected)


@pytest.mark.parametrize(
    "inputs", [[("red", "disc")], ["red", Image.new("RGB", (8, 8))], [{"image": "x", "text": "y"}]]
)
def test_pairs_and_mixtures_are_refused(inputs):
    encoder = multi_vector_encoder(weighted(), tiny_processor())
    with pytest.raises(ValueError, match=r"of one kind, got tuple|mixes|cannot combine"):
        encoder.encode_document(inputs)


def test_a_live_model_needs_its_processor():
    with pytest.raises(ValueError, match="`processor` must be given"):
        multi_vector_encoder(weighted())


# ---- its own tools -------------------------------------------------------------------------------


def test_token_pooling_shrinks_documents_and_leaves_queries_alone():
    encoder = multi_vector_encoder(weighted(), tiny_processor())
    pooling = HierarchicalTokenPooling(pool_factor=4, num_protected_tokens=0)
    whole, pooled = (
        encoder.encode_document(pictures(), token_pooling=how) for how in (None, pooling)
    )
    assert [len(tokens) for tokens in whole] == [16] * 5
    assert [len(tokens) for tokens in pooled] == [4] * 5
    queries = [encoder.encode_query(CAPTIONS, token_pooling=how) for how in (None, pooling)]
    assert all(torch.equal(*pair) for pair in zip(*queries, strict=True))
    exact, close = (both_directions(queries[0], documents) for documents in (whole, pooled))
    assert 0 < (exact - close).abs().max() < 1.0


def test_an_evaluator_ranks_as_the_score_does(tmp_path):
    model = weighted()
    encoder = multi_vector_encoder(model, tiny_processor())
    with torch.no_grad():
        ranks = model.score(*features(model)).argsort(dim=0, descending=True)
    own = {f"q{t}": {f"i{ranks[place, t]}"} for t, place in enumerate([0, 0, 2, 4])}
    evaluator = MultiVectorInformationRetrievalEvaluator(
        queries={f"q{t}": caption for t, caption in enumerate(CAPTIONS)},
        corpus={f"i{n}": image for n, image in enumerate(pictures())},
        relevant_docs=own,
        corpus_chunk_size=2,
        accuracy_at_k=[1, 3],
        precision_recall_at_k=[1],
        ndcg_at_k=[5],
        mrr_at_k=[5],
        map_at_k=[5],
        score_functions={"pico": both_directions},
        write_csv=False,
    )
    metrics = evaluator(encoder, output_path=str(tmp_path))
    assert metrics["pico_accuracy@1"] == pytest.approx(2 / 4)
    assert metrics["pico_accuracy@3"] == pytest.approx(3 / 4)
    assert metrics["pico_mrr@5"] == pytest.approx((1 + 1 + 1 / 3 + 1 / 5) / 4)


@pytest.mark.slow
@torch.no_grad()
def test_what_its_trainer_trained_loads_in_both(tmp_path):
    from sentence_transformers.multi_vector_encoder import (
        MultiVectorEncoderTrainer,
        MultiVectorEncoderTrainingArguments,
        losses,
    )

    model, rows = weighted(), tiny_rows(8)
    rows = rows.map(lambda row: {"query": row["captions"][0]}, remove_columns="captions")
    encoder = multi_vector_encoder(model, tiny_processor())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = MultiVectorEncoderTrainer(
        encoder,
        MultiVectorEncoderTrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=rows.select_columns(["query", "image"]),
        loss=losses.MultiVectorMultipleNegativesRankingLoss(encoder),
    )
    with torch.enable_grad():
        trainer.train()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {name.split(".")[1] for name in changed} >= {"visual_projection", "text_projection"}
    assert not any(name.startswith("prototypes.") for name in changed)
    encoder.save_pretrained(str(tmp_path / "model"))
    again = PicoModel.from_pretrained(tmp_path / "model").eval()
    expected = model.eval().score(*features(model))
    torch.testing.assert_close(again.score(*features(again)), expected, atol=1e-6, rtol=0)


def test_a_model_that_scores_pooled_features_too_says_that_they_are_left_out(caplog):
    PicoInputModule(tiny_refined(), tiny_processor())
    assert not caplog.records
    PicoInputModule(tiny_refined(pooled_share=0.25), tiny_processor())
    assert "to 25 % the cosine of pooled features" in caplog.text
