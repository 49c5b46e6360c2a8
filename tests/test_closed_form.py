"""Projections in closed form: the directions that both sides share, and where training starts."""

import pytest
import torch

from pico_hf import PicoCollator
from pico_hf.core.closed_form import closed_form_projections
from pico_hf.core.moments import TokenMoments
from pico_hf.core.pair_moments import PairMoments
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.training.closed_form import start_in_closed_form
from pico_hf.training.encoding import SplitEncoder
from pico_hf.training.evaluation import evaluate_retrieval
from tiny import tiny_processor, tiny_rows
from tiny_trainer import BARE, tiny_model, tiny_trainer


def moments(images: torch.Tensor, texts: torch.Tensor) -> PairMoments:
    """Of items of one token each."""
    sides = [
        TokenMoments.of([TokenFeatures(side.unsqueeze(1), torch.ones(len(side), 1).bool())])
        for side in (images, texts)
    ]
    return PairMoments(*sides, torch.arange(len(images)))


def two_views(items: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (items, 6) and texts (items, 5) that share 2 of their directions, and these two."""
    torch.manual_seed(seed)
    shared = torch.randn(items, 2).double()
    images = torch.cat([shared, 3 * torch.randn(items, 4).double()], dim=1)
    texts = torch.cat([shared + 0.1 * torch.randn(items, 2), torch.randn(items, 3)], dim=1)
    mix = torch.linalg.qr(torch.randn(6, 6).double())[0], torch.linalg.qr(torch.randn(5, 5))[0]
    return images @ mix[0], texts.double() @ mix[1].double(), shared


def test_projections_are_the_whitened_singular_vectors_scaled_by_the_correlations():
    images, texts, _ = two_views()
    found = moments(images, texts)
    image, text = closed_form_projections(found, columns=3, ridge=0.3)
    assert (image.shape, text.shape) == ((3, 6), (3, 5))

    def ridged(scatter):
        return scatter + 0.3 * torch.linalg.eigvalsh(scatter).mean() * torch.eye(len(scatter))

    # diag(ρ) on either side: W (Σ + λ) Wᵀ = diag(ρ), and W_v C W_tᵀ = diag(ρ²)
    for weight, side in ((image, found.images), (text, found.texts)):
        gram = weight @ ridged(side.scatter) @ weight.t()
        assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-9)
    length = (image @ ridged(found.images.scatter) @ image.t()).diagonal()
    shared = image @ found.shared @ text.t()
    assert torch.allclose(shared, length.square().diag(), atol=1e-9)
    assert length.tolist() == sorted(length.tolist(), reverse=True)


def test_the_first_directions_are_those_that_both_sides_share():
    images, texts, shared = two_views()
    image, text = closed_form_projections(moments(images, texts), columns=2, ridge=1e-3)
    for columns in (images @ image.t(), texts @ text.t()):
        columns = columns - columns.mean(dim=0)
        explained = columns @ torch.linalg.lstsq(columns, shared - shared.mean(dim=0)).solution
        left = (shared - shared.mean(dim=0) - explained).square().mean()
        assert left < 0.05 * shared.var()


def test_no_more_columns_are_found_than_the_narrower_side_has():
    images, texts, _ = two_views()
    image, text = closed_form_projections(moments(images, texts), columns=64)
    assert len(image) == len(text) == 5


def test_sides_that_share_nothing_are_refused():
    images, texts, _ = two_views(20)
    with pytest.raises(ValueError, match="something in common"):
        closed_form_projections(moments(images, torch.ones_like(texts)), columns=2)


def encoder_of(model) -> SplitEncoder:
    collate = PicoCollator(tiny_processor(), config=model.config)
    return SplitEncoder(model.eval(), collate, disable_tqdm=True)


def test_an_untrained_model_ranks_its_pairs_once_it_starts_in_closed_form():
    model, pairs = tiny_model(), ImageTextDataset(tiny_rows(24))
    encoder = encoder_of(model)
    before = evaluate_retrieval(model, encoder.split(pairs))["rsum"]
    heads = model.encoder.visual_projection, model.encoder.text_projection
    drawn = [head.weight.detach().clone() for head in heads]
    start_in_closed_form(encoder, pairs)
    assert evaluate_retrieval(model, encoder.split(pairs))["rsum"] > before + 100
    for head, weight in zip(heads, drawn, strict=True):
        assert head.weight.requires_grad
        assert not torch.allclose(head.weight, weight)


def test_columns_that_are_not_found_stay_as_drawn_but_short():
    model, pairs = tiny_model(), ImageTextDataset(tiny_rows(4))
    head = model.encoder.visual_projection
    drawn = head.weight.detach().clone()
    start_in_closed_form(encoder_of(model), pairs)
    same = torch.nn.functional.cosine_similarity(head.weight, drawn, dim=1) > 0.9999
    assert 0 < int(same.sum()) < len(drawn)
    lengths = head.weight.detach().norm(dim=1)
    assert float(lengths[same].max()) <= float(lengths[~same].min()) * 1.0001


def test_a_run_starts_in_closed_form_only_if_it_is_told_to(tmp_path):
    weights = {}
    for start in ("as_is", "closed_form"):
        model = tiny_model()
        knobs = {**BARE, "max_steps": 1, "learning_rate": 0.0, "projection_start": start}
        trainer = tiny_trainer(tmp_path / start, {"model": model}, **knobs)
        trainer.train()
        weights[start] = model.encoder.visual_projection.weight.detach().clone()
    drawn = tiny_model().encoder.visual_projection.weight
    assert torch.equal(weights["as_is"], drawn)
    assert not torch.allclose(weights["closed_form"], drawn)


def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path):
    knobs = {**BARE, "save_strategy": "steps", "save_steps": 1, "projection_start": "closed_form"}

    def run(resume: bool, steps: int):
        trainer = tiny_trainer(tmp_path, max_steps=steps, lr_scheduler_type="constant", **knobs)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.pico_model.encoder.visual_projection.weight.detach().clone()

    run(False, 1)
    resumed = run(True, 2)
    whole = tiny_trainer(tmp_path / "w", max_steps=2, lr_scheduler_type="constant", **knobs)
    whole.train()
    assert torch.allclose(resumed, whole.pico_model.encoder.visual_projection.weight, atol=1e-6)


def test_an_unknown_start_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`projection_start` must be one of as_is, closed_form"):
        tiny_trainer(tmp_path, projection_start="random")
