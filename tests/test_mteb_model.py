"""A Pico model in mteb: its tasks get the whole score, or one vector per input."""

import pytest
import torch

mteb = pytest.importorskip("mteb", minversion="2.26")

from mteb.mocks.mock_tasks import reranking, retrieval, zeroshot_classification  # noqa: E402
from mteb.mocks.mock_tasks.pair_classification import (  # noqa: E402
    MockImageTextPairClassificationTask,
)
from mteb.mocks.mock_tasks.retrieval import (  # noqa: E402
    MockAny2AnyRetrievalI2TTask,
    MockAny2AnyRetrievalT2ITask,
)
from mteb.models.models_protocols import EncoderProtocol, SearchProtocol  # noqa: E402

from pico_hf import PicoCollator, PicoModel  # noqa: E402
from pico_hf.encoders.inputs import image_inputs, text_inputs  # noqa: E402
from pico_hf.mteb_model import PicoMteb  # noqa: E402
from tiny import tiny_encoder, tiny_processor  # noqa: E402

CAPTIONS = ["a big red square", "blue disc", "a small white disc on a green square"]


def weighted(name: str = "clip") -> PicoModel:
    model = PicoModel.from_encoder(
        tiny_encoder(name), num_prototypes=3, probe_size=3, pooled_share=0.0
    ).eval()
    columns = model.column_weights.numel()
    model.prototypes.semantic_probability.copy_(torch.linspace(0.2, 1.0, columns))
    return model


def loaded(task):
    task = task()
    task.load_data()
    return task


@torch.no_grad()
def features(model: PicoModel, rows, name: str = "clip"):
    """Patches or words of a split of a task, by the collator and the model alone."""
    collate, column = PicoCollator(tiny_processor(name), config=model.config), "caption"
    if "image" in rows.column_names:
        inputs = image_inputs(collate([{"image": image} for image in rows["image"]]), model.device)
        return model.encode_images(**inputs)
    inputs = text_inputs(collate([{column: text} for text in rows["text"]]), model.device)
    return model.encode_texts(**inputs)


def found(model: PicoMteb, task, top_k: int = 5, **options):
    split, side = task.dataset["default"]["test"], {"hf_split": "test", "hf_subset": "default"}
    common = {"task_metadata": task.metadata, "encode_kwargs": {"batch_size": 2}, **side}
    model.index(split["corpus"], num_proc=None, **common)
    return model.search(split["queries"], top_k=top_k, num_proc=None, **common, **options)


def test_it_has_both_protocols():
    model = PicoMteb(weighted(), tiny_processor())
    assert isinstance(model, SearchProtocol)
    assert isinstance(model, EncoderProtocol)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2", "blip-2-itm"])
@pytest.mark.parametrize("task", [MockAny2AnyRetrievalI2TTask, MockAny2AnyRetrievalT2ITask])
def test_search_gives_the_models_score(name, task):
    model, task = weighted(name), loaded(task)
    split = task.dataset["default"]["test"]
    # other texts than the task's, of which a tiny tokenizer knows no word
    side = "corpus" if "text" in split["corpus"].column_names else "queries"
    texts = split[side].remove_columns("text").add_column("text", CAPTIONS[:2])
    split[side] = texts
    got = found(PicoMteb(model, tiny_processor(name)), task)
    queries, corpus = (features(model, split[part], name) for part in ("queries", "corpus"))
    expected = model.score(corpus, queries).T
    for q, query in enumerate(split["queries"]["id"]):
        assert got[query].keys() == set(split["corpus"]["id"])
        for d, document in enumerate(split["corpus"]["id"]):
            assert got[query][document] == pytest.approx(float(expected[q, d]), abs=1e-6)


def test_search_keeps_the_best_documents_and_ranks_only_candidates(monkeypatch):
    monkeypatch.setattr("pico_hf.mteb_model._SCORES_AT_A_TIME", 1)  # a query at a time
    model, task = PicoMteb(weighted(), tiny_processor()), loaded(MockAny2AnyRetrievalI2TTask)
    whole, best = found(model, task), found(model, task, top_k=1)
    for query, scores in whole.items():
        first = max(scores, key=scores.get)
        assert best[query] == {first: scores[first]}
    some = found(model, task, top_ranked={"q1": ["d2"]})
    assert some == {"q0": {}, "q1": {"d2": pytest.approx(whole["q1"]["d2"], abs=1e-6)}}


def test_mteb_ranks_by_the_score(tmp_path):
    model, task = weighted(), MockAny2AnyRetrievalT2ITask()
    result = mteb.evaluate(PicoMteb(model, tiny_processor()), task, cache=None)
    split = loaded(MockAny2AnyRetrievalT2ITask).dataset["default"]["test"]
    scores = model.score(features(model, split["corpus"]), features(model, split["queries"])).T
    hits = [bool(scores[n].argmax() == n) for n in range(2)]
    metrics = result.task_results[0].scores["test"][0]
    assert metrics["hit_rate_at_1"] == pytest.approx(sum(hits) / 2)


def test_vectors_are_means_of_weighted_tokens():
    model = weighted()
    split = loaded(MockAny2AnyRetrievalT2ITask).dataset["default"]["test"]
    wrapped = PicoMteb(model, tiny_processor())
    vectors = wrapped.encode([{"text": CAPTIONS[:2]}, {"text": CAPTIONS[2:]}])
    images = wrapped.encode([{"image": split["corpus"]["image"]}])
    collate = PicoCollator(tiny_processor())
    with torch.no_grad():
        words = model.encode_texts(**collate([{"caption": text} for text in CAPTIONS]))
    root = model.column_weights.sqrt()
    for row, vector in enumerate(vectors):
        mean = torch.stack([word * root for word in words.features[row][words.mask[row]]]).mean(0)
        torch.testing.assert_close(vector, mean / mean.norm())
    assert images.shape == (2, 16)
    similarity = wrapped.similarity(vectors, images)
    torch.testing.assert_close(similarity, (vectors[:, None] * images[None]).sum(-1))
    pairwise = wrapped.similarity_pairwise(vectors[:2].numpy(), images.numpy())
    torch.testing.assert_close(pairwise, similarity[:2].diag())
    assert wrapped.similarity(vectors[0], images).shape == (1, 2)


@pytest.mark.parametrize(
    "task",
    [
        reranking.MockRerankingTask,
        retrieval.MockRetrievalTask,
        zeroshot_classification.MockZeroShotClassificationTask,
        MockImageTextPairClassificationTask,
    ],
)
def test_tasks_of_other_kinds_run(task):
    model = PicoMteb(weighted(), tiny_processor(), name="me/pico", revision="1")
    result = mteb.evaluate(model, task(), cache=None)
    assert result.model_name == "me/pico"
    assert 0 <= result.task_results[0].get_score() <= 1


def test_a_model_in_training_stays_so_and_meets_no_dropout():
    model = weighted().train()
    model.config.column_dropout = 0.5
    wrapped, task = PicoMteb(model, tiny_processor()), loaded(MockAny2AnyRetrievalI2TTask)
    assert found(wrapped, task) == found(wrapped, task)
    assert model.training


def test_images_with_texts_in_one_input_are_refused():
    model = PicoMteb(weighted(), tiny_processor())
    with pytest.raises(ValueError, match="not both in one input, got text, image"):
        model.encode([{"text": ["a"], "image": [None]}])
    with pytest.raises(ValueError, match=r"texts or images.*got audio"):
        model.encode([{"audio": [1]}])


def test_searching_before_indexing_is_refused():
    model = PicoMteb(weighted(), tiny_processor())
    with pytest.raises(RuntimeError, match="Call `index` first"):
        model.search(None, task_metadata=None, top_k=1, encode_kwargs={})


def test_a_saved_model_is_taken_by_its_path(tmp_path):
    for part in (weighted(), tiny_processor()):
        part.save_pretrained(tmp_path)
    text = [{"text": CAPTIONS}]
    expected = PicoMteb(weighted(), tiny_processor()).encode(text)
    assert torch.equal(PicoMteb(tmp_path).encode(text), expected)
    with pytest.raises(ValueError, match="`processor` must be given"):
        PicoMteb(weighted())
