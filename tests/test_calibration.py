"""A gallery's column statistics are replaced by the reference's, and nothing else changes."""

import pytest
import torch

from pico_hf import PicoModel
from pico_hf.core.calibration import StyleCalibration
from pico_hf.core.moments import TokenMoments
from pico_hf.core.token_features import TokenFeatures
from tiny import tiny_encoder, tiny_inputs


def random_tokens(seed, shift=0.0, scale=1.0, n=6):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 5, 4, generator=generator) * scale + shift
    mask = torch.rand(n, 5, generator=generator) < 0.7
    mask[:, 0] = True
    return TokenFeatures(features, mask)


def test_moments_are_those_of_the_real_tokens_however_they_are_batched():
    tokens = random_tokens(0)
    real = tokens.features[tokens.mask]
    for batches in ([tokens], [tokens[:2], tokens[2:]]):
        moments = TokenMoments.of(batches, diagonal=True)
        torch.testing.assert_close(moments.mean.float(), real.mean(dim=0))
        torch.testing.assert_close(moments.std.float(), real.std(dim=0, correction=0))


def test_a_calibrated_gallery_has_the_moments_of_the_reference():
    gallery, reference = random_tokens(0, shift=3.0, scale=0.5), random_tokens(1)
    moments = [TokenMoments.of([tokens], diagonal=True) for tokens in (gallery, reference)]
    after = TokenMoments.of([StyleCalibration(*moments)(gallery)], diagonal=True)
    torch.testing.assert_close(after.mean, moments[1].mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after.std, moments[1].std, atol=1e-5, rtol=1e-4)


def test_the_reference_itself_stays_as_it_is():
    tokens = random_tokens(0)
    moments = TokenMoments.of([tokens], diagonal=True)
    torch.testing.assert_close(StyleCalibration(moments, moments)(tokens).features, tokens.features)


def test_a_column_that_is_constant_in_the_gallery_stays_finite():
    gallery = random_tokens(0)
    gallery.features[..., 2] = 1.0
    moments = [TokenMoments.of([tokens], diagonal=True) for tokens in (gallery, random_tokens(1))]
    assert StyleCalibration(*moments)(gallery).features.isfinite().all()


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="`batches` must hold at least one real token"):
        TokenMoments.of([], diagonal=True)


@pytest.fixture
def model():
    return PicoModel.from_encoder(tiny_encoder("clip"), pooled_share=0.0)


@pytest.fixture
def pictures():
    return {"pixel_values": tiny_inputs(4)["pixel_values"]}


@torch.no_grad()
def test_a_model_forgives_what_a_whole_gallery_shares(model, pictures):
    hidden = torch.randn(6, 16, 32, generator=torch.Generator().manual_seed(0))
    scale, shift = torch.linspace(0.5, 2, 32), torch.linspace(1, -1, 32)  # a style's own columns
    styled = {"image_hidden_states": scale * hidden + shift}
    expected = model.encode_images(image_hidden_states=hidden).features
    assert not torch.allclose(model.encode_images(**styled).features, expected, atol=1e-3)
    model.calibrate([styled], reference=[{"image_hidden_states": hidden}])
    actual = model.encode_images(**styled).features
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pixels_and_their_cached_hidden_states_are_calibrated_alike(model, pictures):
    from pico_hf.encoders.tokens import image_hidden_states

    cached = {"image_hidden_states": image_hidden_states(model.encoder, **pictures).features}
    model.calibrate([cached], reference=[{"pixel_values": 2 * pictures["pixel_values"]}])
    one, other = model.encode_images(**pictures), model.encode_images(**cached)
    torch.testing.assert_close(one.features, other.features)


@torch.no_grad()
def test_none_takes_the_calibration_back(model, pictures):
    before = model.encode_images(**pictures).features
    model.calibrate([pictures], reference=[{"pixel_values": 2 * pictures["pixel_values"]}])
    assert not torch.equal(model.encode_images(**pictures).features, before)
    model.calibrate(None)
    assert torch.equal(model.encode_images(**pictures).features, before)


def test_texts_and_saved_files_know_nothing_of_it(model, pictures, tmp_path):
    model.eval().calibrate([pictures], reference=[{"pixel_values": 2 * pictures["pixel_values"]}])
    model.save_pretrained(tmp_path)
    again = PicoModel.from_pretrained(tmp_path)
    model.calibrate(None)
    assert torch.equal(
        model.encode_images(**pictures).features, again.encode_images(**pictures).features
    )


def test_a_gallery_without_reference_is_refused(model, pictures):
    with pytest.raises(ValueError, match="`reference` must be batches of images"):
        model.calibrate([pictures])
