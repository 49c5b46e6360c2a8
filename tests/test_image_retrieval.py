"""Image → image retrieval: one basis, symmetric scores, pairs and classes, batches, evaluation."""

import datasets
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from pico_hf import (
    ImagePairCollator,
    ImagePairDataset,
    PicoCollator,
    PicoModel,
    SplitEncoder,
    TokenFeatures,
    encode_image_pairs,
    evaluate_image_retrieval,
    score_images,
)
from pico_hf.core.losses import info_nce_loss
from pico_hf.core.similarity import same_side_similarity
from pico_hf.training.image_retrieval import image_pair_scores
from reference import weighted_cosines_loop
from tiny import naflex_images, tiny_encoder, tiny_inputs, tiny_processor, tiny_refined

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}


def random_tokens(items=4, tokens=5, columns=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(items, tokens, columns, generator=generator)
    lengths = torch.randint(1, tokens + 1, (items,), generator=generator)
    unit = torch.nn.functional.normalize(features, dim=-1)
    return TokenFeatures(unit, torch.arange(tokens) < lengths.unsqueeze(1))


def picture(colour, level, corner=0):
    image = Image.new("RGB", (32, 32), tuple(level * c for c in COLOURS[colour]))
    image.putpixel((0, 0), (corner, corner, corner))  # pictures differ in it alone
    return image


def labelled_rows(names, corners=None):
    images = [
        picture(colour, 120 + 10 * (n % 3), corner=n if corners is None else corners[n])
        for n, colour in enumerate(names)
    ]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": images, "label": names}, features=features)


def paired_rows(pairs, **columns):
    """Rows of a query and a target, each of the given (colour, corner)."""
    images, targets = zip(*pairs, strict=True)
    rows = {
        "image": [picture(colour, 120, corner) for colour, corner in images],
        "target_image": [picture(colour, 200, corner) for colour, corner in targets],
        **columns,
    }
    kinds = {"image": datasets.Image(), "target_image": datasets.Image()}
    kinds |= {name: datasets.Value("string") for name in columns}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


def _with_itself(row):
    return {**row, "target_image": row["image"]}


def encoder_of(model, collate=None):
    collate = collate or PicoCollator(tiny_processor(), config=model.config)
    return SplitEncoder(model, collate, batch_size=4, disable_tqdm=True)


# ---- scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, torch.tensor([0.0, 0.2, 0.5, 1.0, 1.8, 2.5])])
def test_scores_of_images_equal_the_loop_of_weighted_cosines(weights):
    queries, targets = random_tokens(seed=1), random_tokens(items=3, seed=2)
    loop = weighted_cosines_loop(queries, targets, torch.ones(6) if weights is None else weights)
    assert torch.allclose(same_side_similarity(queries, targets, weights), loop, atol=1e-5)


@pytest.mark.parametrize("estimators", [["canonical"], ["style"]])
def test_scores_of_images_are_symmetric(estimators):
    model = tiny_refined(estimators=estimators)
    with torch.no_grad():
        images = model.encode_images(tiny_inputs(batch=6)["pixel_values"])
        scores = score_images(model, images, images)
        assert torch.allclose(scores, scores.t(), atol=1e-6)
        apart = score_images(model, images[:2], images[2:])
    assert torch.allclose(apart, scores[:2, 2:], atol=1e-6)


@pytest.mark.parametrize("estimators", [["canonical"], ["style"]])
def test_an_image_ranks_first_for_itself(estimators):
    model = tiny_refined(estimators=estimators)
    assert model.column_weights.std() > 0.01
    with torch.no_grad():
        images = model.encode_images(tiny_inputs(batch=6)["pixel_values"])
        scores = score_images(model, images, images)
    assert torch.allclose(scores.diagonal(), torch.full((6,), 2.0), atol=1e-5)
    assert scores.argmax(dim=1).tolist() == list(range(6))


def test_an_image_ranks_first_for_itself_where_a_product_would_prefer_a_longer_one():
    # In the first column, which alone counts, the second image is longer than the first.
    images = TokenFeatures(torch.tensor([[[0.6, 0.8]], [[0.8, -0.6]]]), torch.ones(2, 1).bool())
    weights = torch.tensor([1.9, 0.1])
    products = (images.features[0] * weights) @ images.features[:, 0].t()
    assert products.argmax() == 1
    assert same_side_similarity(images, images, weights).argmax(dim=1).tolist() == [0, 1]


def test_scores_of_images_never_depend_on_the_basis_of_texts():
    model = tiny_refined(estimators=["canonical", "pooled"])
    pixels = tiny_inputs(batch=5)["pixel_values"]
    with torch.no_grad():
        before = score_images(model, *[model.encode_images(pixels)] * 2)
        model.prototypes.text_basis.copy_(model.prototypes.text_basis.roll(1, dims=1))
        after = score_images(model, *[model.encode_images(pixels)] * 2)
        # Targets in the columns of texts, as a mixture would have them, score otherwise.
        images = model.encode_images(pixels)
        plain = model.prototypes.to_encoder_columns(images, "image")
        mixed = score_images(model, images, model.prototypes.to_columns(plain, "text"))
    assert torch.equal(before, after)
    assert (mixed - before).abs().max() > 0.05


def test_equal_weights_are_the_cosines_of_the_encoder_columns_whatever_the_basis():
    model = tiny_refined(estimators=["canonical", "pooled"])
    images = model.encode_images(tiny_inputs(batch=4)["pixel_values"])
    plain = model.prototypes.to_encoder_columns(images, "image")
    rotated = score_images(model, images, images, torch.ones_like(model.column_weights))
    assert torch.allclose(rotated, same_side_similarity(plain, plain), atol=1e-5)
    assert (rotated - score_images(model, images, images)).abs().max() > 1e-3


def test_padding_of_images_never_changes_a_score():
    model = PicoModel.from_encoder(tiny_encoder("siglip2"), num_prototypes=3)
    grids = [(4, 4), (2, 3), (5, 3)]
    with torch.no_grad():
        tight, loose = (model.encode_images(**naflex_images(grids, 3, pad)) for pad in (0, 7))
        scores = score_images(model, tight, tight)
        assert torch.allclose(score_images(model, loose, tight), scores, atol=1e-5)


def test_a_token_without_weighted_columns_has_a_cosine_of_zero_and_a_finite_gradient():
    features = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]], requires_grad=True)
    tokens = TokenFeatures(features, torch.ones(2, 1).bool())
    scores = same_side_similarity(tokens, tokens, torch.tensor([2.0, 0.0]))
    assert scores.tolist() == [[0.0, 0.0], [0.0, 2.0]]
    scores.sum().backward()
    assert features.grad.isfinite().all()


def test_half_precision_tokens_are_scored_in_fp32():
    tokens = random_tokens()
    half = TokenFeatures(tokens.features.bfloat16(), tokens.mask)
    exact = TokenFeatures(half.features.float(), tokens.mask)
    weights = torch.linspace(0.1, 1.9, 6)
    scores = same_side_similarity(half, half, weights)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, same_side_similarity(exact, exact, weights))


def test_what_cannot_be_scored_is_named():
    tokens = random_tokens()
    with pytest.raises(ValueError, match=r"`column_weights` must be >= 0 .* got a minimum of -1"):
        same_side_similarity(tokens, tokens, torch.tensor([-1.0, 1, 1, 1, 1, 1]))
    with pytest.raises(ValueError, match="`targets` must be as wide as `queries`"):
        same_side_similarity(tokens, random_tokens(columns=5))
    empty = TokenFeatures(tokens.features, torch.zeros_like(tokens.mask))
    with pytest.raises(ValueError, match="`targets` must have at least one real token"):
        same_side_similarity(tokens, empty)


# ---- data --------------------------------------------------------------------------------------


def test_rows_of_pairs_give_queries_and_targets_once_each():
    # One photo for two snapshots; one snapshot in two rows.
    rows = paired_rows([(("red", 1), ("red", 9)), (("red", 2), ("red", 9))] * 2)
    pairs = ImagePairDataset(rows)
    assert (len(pairs.queries), len(pairs.targets)) == (2, 1)
    assert pairs.query_ids.tolist() == [int(pairs.target_ids)] * 2


def test_rows_that_share_an_image_show_one_thing_and_others_do_not():
    rows = paired_rows(
        [
            (("red", 1), ("red", 9)),
            (("red", 2), ("red", 9)),  # the same target
            (("red", 2), ("blue", 8)),  # the same query: linked with the first through the second
            (("green", 3), ("green", 7)),
        ]
    )
    pairs = ImagePairDataset(rows)
    one, two, three = pairs.query_ids.tolist()
    assert one == two != three
    assert pairs.target_ids.tolist() == [one, one, three]


def test_a_label_joins_pairs_and_keeps_a_placeholder_apart():
    rows = paired_rows(
        [(("red", 1), ("white", 0)), (("red", 2), ("blue", 5)), (("green", 3), ("white", 0))],
        product=["mug", "mug", "cup"],
    )
    labelled = ImagePairDataset(rows, label_column="product")
    first, second, third = labelled.query_ids.tolist()
    assert first == second != third
    assert len(labelled.targets) == 3  # the white placeholder stands for two products
    assert len(set(ImagePairDataset(rows).query_ids.tolist())) == 2  # joined by the placeholder


def test_images_of_a_class_match_each_other_and_never_themselves():
    pairs = ImagePairDataset(labelled_rows(["red", "red", "red", "blue", "blue"]))
    assert pairs.targets is pairs.queries
    assert len(pairs) == 5
    for pair in (pairs[number] for number in range(5)):
        corners, colours = (
            [pair[side].getpixel(place) for side in ("image", "target_image")]
            for place in ((0, 0), (5, 5))
        )
        assert corners[0] != corners[1]
        assert [channel > 0 for channel in colours[0]] == [channel > 0 for channel in colours[1]]


def test_an_image_without_a_label_is_a_class_of_its_own(caplog):
    rows = labelled_rows(["red", "red", "blue", "blue"])
    rows = rows.remove_columns("label").add_column("label", ["x", "x", None, ""])
    pairs = ImagePairDataset(rows)
    assert len(set(pairs.query_ids.tolist())) == 3
    assert len(pairs) == 2
    assert "2 of 4 queries have no match" in caplog.text


def test_two_sets_of_labelled_images_are_numbered_alike():
    pairs = ImagePairDataset(
        labelled_rows(["red", "blue"]), labelled_rows(["blue", "green", "red"], [50, 51, 52])
    )
    red, blue = pairs.query_ids.tolist()
    assert pairs.target_ids.tolist()[::2] == [blue, red]
    assert pairs.target_ids[1] not in (red, blue)
    assert pairs[0]["target_image"].getpixel((0, 0))[0] in (50, 52)


def test_matches_change_with_the_epoch_and_not_with_the_order_of_rows():
    names = ["red"] * 6 + ["blue"] * 6
    rows = labelled_rows(names)

    def drawn(rows, epoch):
        pairs = ImagePairDataset(rows, seed=3)
        pairs.set_epoch(epoch)
        corners = [
            tuple(pairs[n][side].getpixel((0, 0)) for side in ("image", "target_image"))
            for n in range(len(pairs))
        ]
        return corners

    assert drawn(rows, 0) == drawn(rows.select(list(reversed(range(12)))), 0)
    assert drawn(rows, 0) != drawn(rows, 1)
    assert [query for query, _ in drawn(rows, 0)] == [query for query, _ in drawn(rows, 1)]


def test_an_imagefolder_of_pairs_resolves_its_paths(tmp_path):
    (tmp_path / "images").mkdir()
    lines = ["image_file_name,target_image_file_name"]
    for n, colour in enumerate(("red", "blue")):
        for kind, level in (("snap", 120), ("photo", 200)):
            picture(colour, level).save(tmp_path / "images" / f"{kind}{n}.png")
        lines.append(f"images/snap{n}.png,images/photo{n}.png")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    pairs = ImagePairDataset(rows)
    assert len(pairs) == 2
    assert pairs[0]["target_image"].size == (32, 32)


def test_what_is_no_data_for_image_retrieval_is_refused():
    rows = labelled_rows(["red", "blue"])
    with pytest.raises(ValueError, match="`rows` must hold a query with a match, got 2 queries"):
        ImagePairDataset(rows)
    with pytest.raises(ValueError, match="none: an image is never its own match"):
        ImagePairDataset(paired_rows([(("red", 1), ("red", 1))]).map(_with_itself))
    with pytest.raises(ValueError, match=r"`label_column` could not be found.*target_image_column"):
        ImagePairDataset(rows.remove_columns("label"))
    with pytest.raises(ValueError, match="`label_column` must be a column of the data, got 'kind'"):
        ImagePairDataset(rows, label_column="kind")
    with pytest.raises(ValueError, match="`rows` must hold stored images, got rows with a trans"):
        ImagePairDataset(rows.with_transform(lambda batch: batch))
    with pytest.raises(ValueError, match="`target_image_column` must be left out where `targets`"):
        ImagePairDataset(rows, rows, target_image_column="other")


def test_a_row_with_an_unreadable_image_on_either_side_is_named_or_left_out(caplog):
    rows = paired_rows([(("red", 1), ("red", 9)), (("blue", 2), ("blue", 8))])
    encoded = rows.cast_column("target_image", datasets.Image(decode=False))
    broken = [{"bytes": b"no image", "path": None}, encoded[1]["target_image"]]
    rows = rows.remove_columns("target_image").add_column(
        "target_image", broken, feature=datasets.Image()
    )
    with pytest.raises(ValueError, match="Row 0 has an image that cannot be read"):
        ImagePairDataset(rows)
    assert len(ImagePairDataset(rows, skip_bad_images=True)) == 1


# ---- batches and training ----------------------------------------------------------------------


def test_a_batch_of_pairs_holds_the_queries_and_then_their_targets():
    collate = ImagePairCollator(tiny_processor())
    queries, targets = ([picture(c, level, 3) for c in ("red", "blue")] for level in (90, 200))
    rows = [
        {"image": a, "target_image": b, "image_ids": n + 4}
        for n, (a, b) in enumerate(zip(queries, targets, strict=True))
    ]
    batch = collate(rows)
    alone = collate([{"image": image} for image in [*queries, *targets]])
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])
    assert batch["image_ids"].tolist() == [4, 5]
    assert batch["image_pairs"] is True
    assert "image_pairs" not in alone


def test_the_images_of_both_collators_are_the_same():
    rows = [{"image": picture("red", 90)}, {"image": picture("blue", 200)}]
    pairs, texts = ImagePairCollator(tiny_processor())(rows), PicoCollator(tiny_processor())(rows)
    assert torch.equal(pairs["pixel_values"], texts["pixel_values"])


def test_a_batch_without_a_target_is_refused():
    rows = [{"image": picture("red", 1), "target_image": picture("red", 2)}]
    with pytest.raises(ValueError, match="`target_image_column` must be a column"):
        ImagePairCollator(tiny_processor())([*rows, {"image": picture("red", 3)}])
    with pytest.raises(ValueError, match="`processor` must be or hold an image processor, got str"):
        ImagePairCollator("clip")


@pytest.mark.parametrize("estimators", [["canonical"], ["style"]])
def test_a_forward_of_image_pairs_has_the_scores_and_the_loss_of_images(estimators):
    model = tiny_refined(estimators=estimators, loss="infonce")
    pixels = tiny_inputs(batch=6)["pixel_values"]
    ids = torch.tensor([0, 0, 1])
    output = model(pixels, image_pairs=True, image_ids=ids)
    images = model.encode_images(pixels)
    expected = model.pair_logits(score_images(model, images[:3], images[3:]))
    assert torch.allclose(output.logits_per_image, expected, atol=1e-5)
    assert torch.allclose(output.loss, info_nce_loss(expected, ids), atol=1e-5)
    output.loss.backward()
    gradients = [p.grad for p in model.encoder.vision_model.parameters() if p.grad is not None]
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_a_forward_of_image_pairs_refuses_odd_batches_and_texts():
    model, inputs = tiny_refined(), tiny_inputs(batch=4)
    with pytest.raises(ValueError, match=r"`image_pairs=True` takes images .* got 3 images"):
        model(inputs["pixel_values"][:3], image_pairs=True)
    with pytest.raises(ValueError, match="no texts, got 4 images and texts"):
        model(**inputs, image_pairs=True)


def test_the_stock_trainer_trains_on_image_pairs(tmp_path):
    torch.manual_seed(0)
    model = PicoModel.from_encoder(tiny_encoder(), num_prototypes=3, loss="infonce")
    names = ["red", "green", "blue", "white"] * 6
    pairs = ImagePairDataset(labelled_rows(names))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=6,
        learning_rate=3e-3,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=3,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
    )
    trainer = Trainer(
        model, arguments, train_dataset=pairs, data_collator=ImagePairCollator(tiny_processor())
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert pairs.epoch == 5
    trainer.save_model(str(tmp_path / "trained"))
    loaded = PicoModel.from_pretrained(tmp_path / "trained")
    pixels = tiny_inputs()["pixel_values"]
    with torch.no_grad():
        images, again = model.eval().encode_images(pixels), loaded.encode_images(pixels)
    assert torch.equal(images.features, again.features)


# ---- evaluation --------------------------------------------------------------------------------


def test_an_evaluation_ranks_what_one_batch_ranks():
    model = tiny_refined(estimators=["canonical", "pooled"])
    rows = labelled_rows(["red", "green", "blue"] * 4)
    pairs = ImagePairDataset(rows)
    encoded = encode_image_pairs(encoder_of(model), pairs)
    assert encoded.targets is encoded.queries
    batch = PicoCollator(tiny_processor())([{"image": image} for image in rows["image"]])
    with torch.no_grad():
        images = model.encode_images(batch["pixel_values"])
        scores = score_images(model, images, images)
    assert torch.allclose(image_pair_scores(model, encoded), scores, atol=1e-5)
    off = scores.masked_fill(torch.eye(12).bool(), -torch.inf)
    names = torch.tensor([0, 1, 2] * 4)
    nearest = names[off.argmax(dim=1)] == names
    metrics = evaluate_image_retrieval(model, encoded)
    assert metrics["queries"] == 12
    assert metrics["r1"] == pytest.approx(100 * nearest.double().mean().item())


def test_pairs_are_ranked_from_query_to_target_with_either_collator():
    model = tiny_refined()
    rows = paired_rows([((colour, n), (colour, n)) for n, colour in enumerate(COLOURS)])
    pairs = ImagePairDataset(rows)
    encoded = encode_image_pairs(encoder_of(model), pairs)
    other = encode_image_pairs(encoder_of(model, ImagePairCollator(tiny_processor())), pairs)
    scores = image_pair_scores(model, encoded)
    assert torch.equal(scores, image_pair_scores(model, other))
    assert scores.shape == (4, 4)
    order = scores.argsort(dim=1, descending=True)
    expected = 100 * (order[:, 0] == torch.arange(4)).double().mean().item()
    assert evaluate_image_retrieval(model, encoded)["r1"] == expected


def test_other_weights_are_tried_on_the_same_features():
    model = tiny_refined(estimators=["canonical", "pooled"])
    encoded = encode_image_pairs(
        encoder_of(model), ImagePairDataset(labelled_rows(["red", "blue"] * 5))
    )
    uniform = torch.ones_like(model.column_weights)
    tried = image_pair_scores(model, encoded, uniform)
    model.prototypes.semantic_probability.fill_(1.0)
    assert torch.equal(image_pair_scores(model, encoded), tried)


def test_blocks_of_images_are_scored_as_a_whole(monkeypatch):
    model = tiny_refined(estimators=["canonical", "pooled"])
    encoded = encode_image_pairs(
        encoder_of(model), ImagePairDataset(labelled_rows(["red", "blue"] * 5))
    )
    whole = image_pair_scores(model, encoded)
    monkeypatch.setattr("pico_hf.core.packed_tokens.BLOCK_TOKENS", 40)
    assert len(list(encoded.queries.blocks())) > 2
    assert torch.allclose(image_pair_scores(model, encoded), whole, atol=1e-6)
