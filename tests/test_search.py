"""An index of images: exact scores, two stages, changes, filters, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pico_hf import ImageTextDataset, PicoIndex, PicoModel, PicoRetriever, TokenFeatures
from pico_hf.core.similarity import similarity
from tiny import tiny_encoder, tiny_processor, tiny_refined, tiny_rows

TEXTS = ["a big red square", "green disc", "a small blue square on white", "white disc"]


def retriever(encoder: str = "clip", seed: int = 0, **knobs) -> PicoRetriever:
    model = tiny_refined(encoder, seed, **knobs)
    return PicoRetriever(model, tiny_processor(encoder), batch_size=4, show_progress=False)


def picture(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(10):
        place = folder / "more" if number % 3 == 0 else folder
        picture(number).save(place / f"{number}.png")
    return folder


def add(index: PicoIndex, source, **options):
    return index.add(source, show_progress=False, **options)


def ranking(hits) -> list[tuple[str, float]]:
    return [(hit.id, round(hit.score, 5)) for hit in hits]


def synthetic(items: int, tokens: int = 12, width: int = 48, seed: int = 0):
    """Images of several concepts each, and queries of some words about one image each."""
    generator = torch.Generator().manual_seed(seed)
    concepts = torch.randn(items // 2, width, generator=generator)
    chosen = torch.randint(items // 2, (items, 4), generator=generator)
    spread = torch.randint(4, (items, tokens), generator=generator)
    noise = torch.randn(items, tokens, width, generator=generator)
    images = concepts[chosen.gather(1, spread)] + 0.5 * noise
    about = torch.randperm(items, generator=generator)[:40]
    words = concepts[chosen[about]]
    words = words + 0.5 * torch.randn(words.shape, generator=generator)
    unit = [torch.nn.functional.normalize(side, dim=-1) for side in (images, words)]
    return [TokenFeatures(side, torch.ones(side.shape[:2]).bool()) for side in unit]


def found_in_ten(index: PicoIndex, words: TokenFeatures, expected: torch.Tensor, **options):
    """R@10 of the best image by exact scores in full precision, which stands for the right one."""
    best = expected.argmax(dim=0).tolist()
    hits = index.search(words, top_k=10, **options)
    found = [str(row) in {hit.id for hit in own} for row, own in zip(best, hits, strict=True)]
    return sum(found) / len(found)


# ---- scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["clip", "siglip", "siglip2"])
@pytest.mark.parametrize("estimators", [["canonical"], ["style"]])
def test_scores_are_those_of_the_model(encoder, estimators, photos, tmp_path):
    if encoder == "siglip2":
        model = PicoModel.from_encoder(tiny_encoder(encoder), pooled_share=0.0)
        tool = PicoRetriever(model, tiny_processor(encoder), batch_size=4, show_progress=False)
    else:
        tool = retriever(encoder, estimators=estimators)
        assert tool.model.column_weights.std() > 0.01
    index = PicoIndex.create(tmp_path / "index", tool, dtype="float32")
    add(index, photos)
    paths = sorted(photos.rglob("*.png"))
    with torch.no_grad():
        expected = tool.model.score(tool.encode_images(paths), tool.encode_texts(TEXTS))
    for number, hits in enumerate(index.search(TEXTS, top_k=10)):
        found = {hit.path: hit.score for hit in hits}
        assert [hit.score for hit in hits] == sorted(found.values(), reverse=True)
        scores = torch.tensor([found[str(path)] for path in paths])
        torch.testing.assert_close(scores, expected[:, number], rtol=0, atol=2e-6)


def test_an_image_as_a_query_finds_itself_with_the_models_score(photos, tmp_path):
    tool = retriever()
    index = PicoIndex.create(tmp_path / "index", tool, dtype="float32")
    add(index, photos)
    path = photos / "4.png"
    with torch.no_grad():
        query = tool.encode_images([path])
        expected = tool.model.score(query, query).item()
    for form in (path, Image.open(path), np.asarray(Image.open(path)), path.read_bytes()):
        best = index.search(form, top_k=3)[0]
        assert best.path == str(path)
        assert best.score == pytest.approx(expected, abs=2e-6)


def test_other_weights_and_columns_search_the_same_index(photos, tmp_path):
    """An index that was made before an alignment serves the model after it."""
    plain = PicoModel.from_encoder(tiny_encoder("clip"), pooled_share=0.0)
    made = PicoRetriever(plain, tiny_processor(), batch_size=4, show_progress=False)
    add(PicoIndex.create(tmp_path / "index", made, dtype="float32"), photos)
    aligned = retriever()
    assert not torch.equal(aligned.model.prototypes.image_basis, plain.prototypes.image_basis)
    index = PicoIndex.open(tmp_path / "index", aligned)
    paths = sorted(photos.rglob("*.png"))
    with torch.no_grad():
        expected = aligned.model.score(aligned.encode_images(paths), aligned.encode_texts(TEXTS))
    for number, hits in enumerate(index.search(TEXTS, top_k=10)):
        scores = {hit.path: hit.score for hit in hits}
        live = torch.tensor([scores[str(path)] for path in paths])
        torch.testing.assert_close(live, expected[:, number], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("float16", 5e-4), ("int8", 1e-2)])
def test_vectors_alone_are_scored_as_they_are(dtype, atol, tmp_path):
    images, words = synthetic(60)
    ragged = images.mask.clone()
    ragged[::3, 7:] = False
    images = TokenFeatures(images.features, ragged)
    index = PicoIndex.create(tmp_path / "index", dtype=dtype)
    index.add_features(images, [str(n) for n in range(60)])
    expected = similarity(images, words)
    for number, hits in enumerate(index.search(words, top_k=60)):
        scores = torch.tensor([hit.score for hit in sorted(hits, key=lambda hit: int(hit.id))])
        torch.testing.assert_close(scores, expected[:, number], rtol=0, atol=atol)


def recall(index: PicoIndex, words: TokenFeatures, expected: torch.Tensor, **options) -> float:
    """Share of the exact top 10 that is found."""
    best = expected.topk(10, dim=0).indices.t().tolist()
    found = index.search(words, top_k=10, **options)
    shared = [
        len({str(row) for row in rows} & {hit.id for hit in hits})
        for rows, hits in zip(best, found, strict=True)
    ]
    return sum(shared) / (10 * len(shared))


def test_two_stages_find_what_a_scan_finds(tmp_path):
    images, words = synthetic(1200)
    expected = similarity(images, words)
    index = PicoIndex.create(tmp_path / "index", dtype="float32")
    index.add_features(images, [str(n) for n in range(1200)])
    assert recall(index, words, expected) == 1.0  # few images: a scan
    assert recall(index, words, expected, exact=False, depth=1200) == 1.0
    shallow = recall(index, words, expected, exact=False, depth=10)
    deep = recall(index, words, expected, exact=False, depth=200)
    assert shallow < deep
    assert deep >= 0.95
    assert found_in_ten(index, words, expected, exact=False, depth=100) >= 0.995
    for hits in index.search(words, exact=False):
        for hit in hits:
            exact = expected[int(hit.id), :]
            assert (exact - hit.score).abs().min() < 1e-6


@pytest.mark.parametrize(("dtype", "least"), [("float16", 0.99), ("int8", 0.95)])
def test_smaller_storage_loses_little(dtype, least, tmp_path):
    images, words = synthetic(600)
    expected = similarity(images, words)
    index = PicoIndex.create(tmp_path / "index", dtype=dtype)
    index.add_features(images, [str(n) for n in range(600)])
    assert recall(index, words, expected) >= least
    assert found_in_ten(index, words, expected) >= 0.995


@pytest.mark.parametrize(("factor", "least"), [(2, 0.995), (4, 0.95)])
def test_merged_tokens_are_fewer_and_lose_some(factor, least, tmp_path):
    images, words = synthetic(600)
    expected = similarity(images, words)
    sizes = []
    for merging in (1, factor):
        index = PicoIndex.create(tmp_path / f"{merging}", token_merging=merging)
        index.add_features(images, [str(n) for n in range(600)])
        size = [path.stat().st_size for path in (tmp_path / f"{merging}").rglob("*.safetensors")]
        sizes.append(sum(size))
    assert sizes[1] < sizes[0] / factor * 1.5
    assert found_in_ten(index, words, expected) >= least


# ---- changes ---------------------------------------------------------------------------------


def test_adding_again_changes_nothing(photos, tmp_path):
    index = PicoIndex.create(tmp_path / "index", retriever())
    first = add(index, photos)
    before = {path: path.read_bytes() for path in (tmp_path / "index").rglob("*.*")}
    again = add(index, photos)
    assert (first.added, again.added, again.unchanged) == (10, 0, 10)
    assert {path: path.read_bytes() for path in (tmp_path / "index").rglob("*.*")} == before


def test_a_copy_is_the_same_image_and_a_changed_file_replaces_what_it_was(photos, tmp_path):
    index = PicoIndex.create(tmp_path / "index", retriever())
    add(index, photos)
    copied = photos / "copy.png"
    copied.write_bytes((photos / "4.png").read_bytes())
    assert add(index, photos).duplicates == 1
    assert len(index) == 10
    assert index.search(copied, top_k=1)[0].payload["paths"] == [
        str(photos / "4.png"),
        str(copied),
    ]
    picture(77).save(photos / "5.png")
    report = add(index, photos)
    assert (report.added, report.updated, len(index)) == (0, 1, 10)
    assert index.search(photos / "5.png", top_k=1)[0].path == str(photos / "5.png")
    owners = [path for key in index.ids() for path in index.payload(key).get("paths", [])]
    assert owners.count(str(photos / "5.png")) <= 1


def test_files_that_swap_their_content_swap_their_images(photos, tmp_path):
    index = PicoIndex.create(tmp_path / "index", retriever())
    add(index, photos)
    first, second = (photos / "4.png").read_bytes(), (photos / "5.png").read_bytes()
    (photos / "4.png").write_bytes(second)
    (photos / "5.png").write_bytes(first)
    add(index, photos)
    fresh = PicoIndex.create(tmp_path / "fresh", index.retriever)
    add(fresh, photos)
    assert len(index) == 10
    assert {key: index.payload(key) for key in index.ids()} == {
        key: fresh.payload(key) for key in fresh.ids()
    }


def test_named_images_are_kept_apart_and_updated(photos, tmp_path):
    index = PicoIndex.create(tmp_path / "index", retriever())
    add(index, [picture(1), picture(1)], ids=["a", "b"], payloads=[{"n": 1}, {"n": 2}])
    assert index.ids() == ["a", "b"]
    report = add(index, [picture(2), picture(1)], ids=["a", "b"])
    assert (report.updated, report.unchanged) == (1, 1)
    assert index.payload("a") == {"n": 1}  # no payload was given: it stays
    assert index.search(picture(2), top_k=1)[0].id == "a"
    report = add(index, [picture(1)], ids=["b"], payloads=[{"n": 3}])
    assert report.updated == 1
    assert index.payload("b") == {"n": 3}


def test_deleting_and_compacting_keep_the_rest(photos, tmp_path):
    index = PicoIndex.create(tmp_path / "index", retriever())
    add(index, photos, commit_images=3)
    before = ranking(index.search(TEXTS[0], top_k=10))
    gone = [before[0][0], before[4][0]]
    assert index.delete(gone) == 2
    rest = [entry for entry in before if entry[0] not in gone]
    assert ranking(index.search(TEXTS[0], top_k=10)) == rest
    assert gone[0] not in index
    size = sum(path.stat().st_size for path in (tmp_path / "index").rglob("*.safetensors"))
    index.compact()
    files = list((tmp_path / "index").rglob("*.safetensors"))
    assert len(files) == 1
    assert files[0].stat().st_size < size
    for opened in (index, PicoIndex.open(tmp_path / "index", index.retriever)):
        assert ranking(opened.search(TEXTS[0], top_k=10)) == rest
    index.save(tmp_path / "copy")
    copied = PicoIndex.open(tmp_path / "copy", index.retriever)
    assert ranking(copied.search(TEXTS[0], top_k=10)) == rest
    assert add(index, photos).added == 2
    assert sorted(ranking(index.search(TEXTS[0], top_k=10))) == sorted(before)


def test_everything_can_be_deleted_and_added_again(photos, tmp_path):
    index = PicoIndex.create(tmp_path / "index", retriever())
    add(index, photos)
    assert index.delete(filter=lambda payload: True) == 10
    assert index.search(TEXTS) == [[], [], [], []]
    index.compact()
    assert index.search(TEXTS[0]) == []
    assert add(index, photos).added == 10


def test_an_open_index_sees_the_changes_of_others_when_asked(photos, tmp_path):
    tool = retriever()
    index = PicoIndex.create(tmp_path / "index", tool)
    other = PicoIndex.open(tmp_path / "index", tool)
    add(index, photos)
    assert len(other) == 0
    other.refresh()
    assert len(other) == 10
    index.delete(index.ids()[0])
    assert add(other, photos).added == 1  # a change starts from what others have changed


def test_a_temporary_index_goes_away():
    index = PicoIndex.create()
    images, words = synthetic(30)
    index.add_features(images, [str(n) for n in range(30)])
    folder = index.folder
    assert index.search(words, top_k=1)[0]
    del index
    assert not folder.exists()


# ---- data sets and filters -------------------------------------------------------------------


def test_rows_of_a_data_set_bring_their_columns(tmp_path):
    rows = tiny_rows(8).add_column("year", list(range(2000, 2008)))
    index = PicoIndex.create(tmp_path / "index", retriever())
    assert add(index, rows).added == 8
    hit = index.search(rows[3]["image"], top_k=1)[0]
    assert hit.payload == {"captions": rows[3]["captions"], "year": 2003}
    assert add(index, ImageTextDataset(tiny_rows(8))).updated == 8


def test_filters_choose_among_all_images(tmp_path):
    rows = tiny_rows(8).add_column("year", list(range(2000, 2008)))
    index = PicoIndex.create(tmp_path / "index", retriever())
    add(index, rows)

    def years(chosen) -> list[int]:
        return sorted(hit.payload["year"] for hit in index.search(TEXTS[0], 8, filter=chosen))

    assert years({"year": 2003}) == [2003]
    assert years({"year": [2001, 2006, 1990]}) == [2001, 2006]
    assert years({"year": lambda year: year > 2005}) == [2006, 2007]
    assert years({"captions": "red disc"}) == [2000, 2004]
    assert years({"captions": "red disc", "year": [2004, 2005]}) == [2004]
    assert years(lambda payload: payload["year"] % 2 == 1) == [2001, 2003, 2005, 2007]
    assert index.delete(filter={"year": 2003}) == 1
    assert years({"year": [2003, 2004]}) == [2004]
    with pytest.raises(ValueError, match=r"'yaer', which no image has.*mean 'year'"):
        years({"yaer": 2003})


def test_a_filter_comes_before_the_first_stage(tmp_path):
    images, words = synthetic(400)
    index = PicoIndex.create(tmp_path / "index", dtype="float32")
    index.add_features(images, [str(n) for n in range(400)], [{"n": n} for n in range(400)])
    expected = similarity(images, words)
    chosen = torch.arange(400) % 40 == 7
    hits = index.search(words, 10, filter={"n": lambda n: n % 40 == 7}, exact=False, depth=10)
    for number, found in enumerate(hits):
        best = expected[:, number].masked_fill(~chosen, -9).argmax()
        assert len(found) == 10
        assert found[0].id == str(int(best))


# ---- what is refused -------------------------------------------------------------------------


def test_a_folder_without_images_is_named(tmp_path):
    index = PicoIndex.create(tmp_path / "index", retriever())
    (tmp_path / "docs").mkdir()
    with pytest.raises(ValueError, match="with nothing and no image"):
        add(index, tmp_path / "docs")
    (tmp_path / "docs" / "a.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"with 1 files \(.txt\) and no image"):
        add(index, tmp_path / "docs")
    with pytest.raises(ValueError, match="there is no file"):
        add(index, tmp_path / "nowhere")


def test_a_text_file_called_jpg_is_left_out_with_one_line(photos, tmp_path, caplog):
    (photos / "bad.jpg").write_text("no image")
    index = PicoIndex.create(tmp_path / "index", retriever())
    with caplog.at_level(logging.WARNING, "pico_hf"):
        report = add(index, photos)
    assert len(caplog.records) == 1
    assert "bad.jpg is left out: its format is unknown" in caplog.text
    assert (report.added, report.skipped[0][0]) == (10, str(photos / "bad.jpg"))
    with pytest.raises(ValueError, match=r"bad\.jpg cannot be read"):
        add(index, photos, skip_bad_images=False)
    assert len(index) == 10
    with pytest.raises(ValueError, match=r"got 1 that cannot: .*bad\.jpg"):
        add(index, [photos / "bad.jpg"])


def test_images_within_the_budget_are_indexed_and_larger_ones_named(tmp_path, monkeypatch):
    index = PicoIndex.create(tmp_path / "index", retriever())
    for grey, name in ((90, "large.png"), (91, "larger.png"), (92, "larger.jpg")):
        Image.new("L", (10000, 3000), grey).save(tmp_path / name)
    assert add(index, tmp_path / "large.png").added == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000_000)
    with pytest.raises(ValueError, match=r"larger\.png .*10000 × 3000 pixels.* is 20000000"):
        add(index, tmp_path / "larger.png")
    assert add(index, tmp_path / "larger.jpg").added == 1
    monkeypatch.setenv("PICO_HF_MAX_PIXELS", "30000000")
    assert add(index, tmp_path / "larger.png").added == 1


def test_queries_that_say_nothing_are_refused_and_long_ones_cut(photos, tmp_path, caplog):
    index = PicoIndex.create(tmp_path / "index", retriever())
    add(index, photos)
    for query in ("", "  ", ["red", ""]):
        with pytest.raises(ValueError, match="is empty"):
            index.search(query)
    with pytest.raises(ValueError, match="got none"):
        index.search([])
    with pytest.raises(ValueError, match="texts and images together"):
        index.search(["red", picture(1)])
    with pytest.raises(ValueError, match="`top_k` must be an integer >= 1, got 0"):
        index.search("red", top_k=0)
    with pytest.raises(ValueError, match="`depth` must be an integer >= 1, got -1"):
        index.search("red", depth=-1)
    with caplog.at_level(logging.WARNING, "pico_hf"):
        long = index.search(" ".join(["red"] * 10_000), top_k=3)
    assert "has 10000 words: what is beyond 16 tokens is not read" in caplog.text
    assert ranking(long) == ranking(index.search(" ".join(["red"] * 14), top_k=3))


def test_another_models_index_is_refused(photos, tmp_path):
    index = PicoIndex.create(tmp_path / "index", retriever())
    add(index, photos)
    with pytest.raises(ValueError, match="another model: the weights of its image tower"):
        PicoIndex.open(tmp_path / "index", retriever(seed=1))
    with pytest.raises(ValueError, match="of type clip, this one siglip"):
        PicoIndex.open(tmp_path / "index", retriever("siglip"))
    other = retriever()
    other.collate.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="image processor has other settings"):
        PicoIndex.open(tmp_path / "index", other)
    half = retriever()
    half.model.half()
    for model in (half, retriever()):
        assert len(PicoIndex.open(tmp_path / "index", model)) == 10
    texts = retriever()
    with torch.no_grad():  # the text tower is no part of it
        texts.model.encoder.text_projection.weight.add_(1.0)
    assert len(PicoIndex.open(tmp_path / "index", texts)) == 10


def test_vectors_that_do_not_fit_are_refused(tmp_path):
    index = PicoIndex.create(tmp_path / "index")
    images, words = synthetic(6)
    index.add_features(images[:4], list("abcd"))
    with pytest.raises(ValueError, match="one entry for each of 6 images, got 2"):
        index.add_features(images, ["a", "b"])
    with pytest.raises(ValueError, match="must all be different"):
        index.add_features(images[:2], ["a", "a"])
    with pytest.raises(ValueError, match=r"as wide as the index \(48 columns\), got 24"):
        index.add_features(TokenFeatures(images.features[..., :24], images.mask), list("abcdef"))
    with pytest.raises(ValueError, match="NaN"):
        index.add_features(TokenFeatures(images.features * torch.nan, images.mask), list("abcdef"))
    with pytest.raises(ValueError, match="without a model"):
        PicoIndex.open(tmp_path / "index", retriever())
    with pytest.raises(ValueError, match="`retriever` is needed to encode queries"):
        index.search("red")
    with pytest.raises(ValueError, match="'z' and 1 more, which are not there"):
        index.delete(["a", "z", "y"])
    with pytest.raises(ValueError, match="cannot be stored"):
        index.add_features(images[:1], ["e"], [{"when": object()}])
    assert sorted(index.ids()) == list("abcd")
    assert len(index.search(words)[0]) == 4


def test_folders_with_other_files_are_left_alone(photos, tmp_path):
    with pytest.raises(ValueError, match="must be new or empty"):
        PicoIndex.create(photos)
    with pytest.raises(ValueError, match=r"has no index\.json"):
        PicoIndex.open(photos)
    index = PicoIndex.create(tmp_path / "index")
    with pytest.raises(ValueError, match="holds an index already"):
        PicoIndex.create(tmp_path / "index")
    with pytest.raises(ValueError, match="must be new or empty"):
        index.save(photos)
    assert len(list(photos.rglob("*.png"))) == 10


def test_data_sets_with_one_image_in_several_rows_name_the_loss(tmp_path, caplog):
    rows = tiny_rows(4)
    twice = datasets.concatenate_datasets([rows, rows.select([1])]).add_column("n", list(range(5)))
    index = PicoIndex.create(tmp_path / "index", retriever())
    with caplog.at_level(logging.WARNING, "pico_hf"):
        report = add(index, twice)
    assert (report.added, report.duplicates, len(index)) == (4, 1, 4)
    assert "1 images have the content of another one" in caplog.text
    assert add(index, twice).updated == 0
    named = PicoIndex.create(tmp_path / "named", index.retriever)
    assert add(named, twice, id_column="n").added == 5
