"""An index and the encoder's pooled features: scores for every share that they have of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from pico_hf import PicoIndex, PicoModel, PicoRetriever, TokenFeatures
from pico_hf.search import files
from test_search import TEXTS, add, picture, ranking, retriever, synthetic
from tiny import tiny_encoder, tiny_processor


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        picture(number).save(folder / f"{number}.png")
    return folder


def check_scores(index: PicoIndex, tool: PicoRetriever, photos: Path, **options) -> None:
    """Every score of the index is that of the model."""
    paths = sorted(photos.rglob("*.png"))
    with torch.no_grad():
        expected = tool.model.score(tool.encode_images(paths), tool.encode_texts(TEXTS))
    for number, hits in enumerate(index.search(TEXTS, top_k=10, **options)):
        found = {hit.path: hit.score for hit in hits}
        scores = torch.tensor([found[str(path)] for path in paths])
        torch.testing.assert_close(scores, expected[:, number], rtol=0, atol=2e-6)


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
@pytest.mark.parametrize("estimators", [["canonical"], ["style"]])
def test_one_index_has_the_models_scores_for_every_share(encoder, estimators, photos, tmp_path):
    """Made before an alignment, with another share; weights, columns and share may change."""
    plain = PicoModel.from_encoder(tiny_encoder(encoder), pooled_share=0.5)
    made = PicoRetriever(plain, tiny_processor(encoder), batch_size=4, show_progress=False)
    add(PicoIndex.create(tmp_path / "index", made, dtype="float32"), photos)
    aligned = retriever(encoder, estimators=estimators, pooled_share=1.0)
    assert aligned.model.column_weights.std() > 0.01
    with torch.no_grad():  # what the lengths of images do to the ranking is part of the test
        images = aligned.encode_images(sorted(photos.rglob("*.png"))).pooled
        lengths = (images * aligned.model.column_weights.sqrt()).norm(dim=1)
    assert lengths.std() > 1e-3
    for tool in (made, aligned):
        index = PicoIndex.open(tmp_path / "index", tool)
        for share in (0.0, 1 / 3, 1.0):
            tool.model.prototypes.share_score(share)
            check_scores(index, tool, photos)
    aligned.model.prototypes.semantic_probability.copy_(torch.rand(len(images[0])) + 0.1)
    check_scores(index, aligned, photos)  # lengths of the weights before are not kept


@pytest.mark.parametrize("share", [1 / 3, 1.0])
def test_an_image_as_a_query_has_the_models_score_with_pooled_features(share, photos, tmp_path):
    tool = retriever(pooled_share=share)
    index = PicoIndex.create(tmp_path / "index", tool, dtype="float32")
    add(index, photos)
    paths = sorted(photos.rglob("*.png"))
    with torch.no_grad():
        images = tool.encode_images(paths)
        expected = tool.model.score(images, images[4:5]).flatten().tolist()
    found = {hit.path: hit.score for hit in index.search(paths[4], top_k=10)}
    assert [found[str(path)] for path in paths] == pytest.approx(expected, abs=2e-6)


def pooled_gallery(tmp_path: Path, share: float, items: int = 400):
    """Random features of a model's width, with pooled ones that tokens say nothing about."""
    tool = retriever(pooled_share=share)
    width = len(tool.model.column_weights)
    sides = []
    for seed, side in enumerate(synthetic(items, width=width)):
        generator = torch.Generator().manual_seed(seed)
        pooled = torch.randn(len(side), width, generator=generator)
        unit = torch.nn.functional.normalize(pooled, dim=-1)
        sides.append(TokenFeatures(side.features, side.mask, unit))
    index = PicoIndex.create(tmp_path / "index", tool, dtype="float32")
    index.add_features(sides[0], [str(n) for n in range(items)])
    return tool, index, *sides


@pytest.mark.parametrize(("share", "least"), [(1 / 3, 0.8), (1.0, 1.0)])
def test_two_stages_rank_by_pooled_features_too(share, least, tmp_path):
    tool, index, images, words = pooled_gallery(tmp_path, share)
    expected = tool.model.score(images, words)
    hits = index.search(words, top_k=10, depth=40, exact=False)
    shared = 0
    for number, own in enumerate(hits):
        rows = [int(hit.id) for hit in own]
        scores = torch.tensor([hit.score for hit in own])
        torch.testing.assert_close(scores, expected[rows, number], rtol=0, atol=2e-6)
        shared += len({*rows} & {*expected[:, number].topk(10).indices.tolist()})
    assert shared / (10 * len(hits)) >= least


def test_pooled_features_survive_changes_of_the_index(photos, tmp_path):
    tool = retriever(pooled_share=1 / 3)
    index = PicoIndex.create(tmp_path / "index", tool, dtype="float32")
    add(index, photos, commit_images=3)
    gone = index.ids()[1]
    path = Path(index.payload(gone)["path"])
    index.delete(gone)
    index.save(tmp_path / "copy")
    index.compact()
    path.unlink()
    for folder in ("index", "copy"):
        check_scores(PicoIndex.open(tmp_path / folder, tool), tool, photos)
    before = [sorted(ranking(index.search(text))) for text in TEXTS]
    path = sorted(photos.rglob("*.png"))[0]
    named = next(key for key in index.ids() if index.payload(key)["path"] == str(path))
    add(index, [path], payloads=[{"year": 2024}])  # a copy of a row with another record
    assert index.payload(named)["year"] == 2024
    assert [sorted(ranking(index.search(text))) for text in TEXTS] == before


def test_features_without_pooled_ones_are_refused_where_the_score_needs_them(tmp_path):
    tool, index, images, words = pooled_gallery(tmp_path, 1 / 3, items=6)
    alone = TokenFeatures(images.features, images.mask)
    with pytest.raises(ValueError, match="`queries` must have pooled vectors"):
        index.search(TokenFeatures(words.features, words.mask))
    index.add_features(alone[:2], ["x", "y"], [{"kind": "alone"}] * 2)
    with pytest.raises(ValueError, match=r"0\.333 of the model's score.* 2 images without one"):
        index.search(words)
    index.compact()
    with pytest.raises(ValueError, match="2 images without one"):
        index.search(words)
    found = index.search(words, filter=lambda payload: "kind" not in payload)
    assert len(found[0]) == 6  # those that pass have one
    tool.model.prototypes.share_score(0.0)
    assert len(index.search(words)[0]) == 8
    tool.model.prototypes.share_score(1.0)
    index.add_features(images[:2], ["x", "y"])  # the same tokens, completed
    assert len(index.search(words)[0]) == 8
    broken = torch.full_like(images.pooled[:1], torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        index.add_features(TokenFeatures(*(alone.features[:1], alone.mask[:1]), broken), ["z"])
    assert len(PicoIndex.open(index.folder).search(words)[0]) == 8  # without a model: S alone


def make_old(folder: Path, monkeypatch) -> None:
    """Turns an index into one of version 1, which kept no pooled features."""
    manifest = files.read_manifest(folder)
    for facts in manifest["shards"]:
        path = folder / "shards" / f"{facts['name']}.safetensors"
        tensors = load_file(path)
        del tensors["summary"], tensors["has_summary"]
        path.write_bytes(save(tensors))
        facts["digests"][".safetensors"] = files.file_digest(path)
    with monkeypatch.context() as patched:
        patched.setattr(files, "VERSION", 1)
        files.write_manifest(folder, manifest)


def test_an_old_index_serves_tokens_and_is_completed_by_adding_again(photos, tmp_path, monkeypatch):
    tool = retriever()
    add(PicoIndex.create(tmp_path / "index", tool, dtype="float32"), photos, commit_images=4)
    make_old(tmp_path / "index", monkeypatch)
    index = PicoIndex.open(tmp_path / "index", tool)
    check_scores(index, tool, photos)
    tool.model.prototypes.share_score(0.5)
    with pytest.raises(ValueError, match=r"10 images without one\. Add the same images again"):
        index.search("a red square")
    paths = sorted(photos.rglob("*.png"))
    assert add(index, paths[:3]).updated == 3
    with pytest.raises(ValueError, match="7 images without one"):
        index.search("a red square")
    report = add(index, photos)
    assert (report.updated, report.unchanged, report.added) == (7, 3, 0)
    check_scores(PicoIndex.open(tmp_path / "index", tool), tool, photos)
    assert add(index, photos).unchanged == 10
