"""The fused kernels give the scores and gradients of plain torch, in Triton's interpreter too."""

import pytest
import torch

from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from pico_hf.kernels import fused_interaction
from reference import similarity_loop

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 1.0])


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.setenv("PICO_FUSED_KERNELS", "1")


def random_tokens(n, tokens, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, tokens, 6, generator=generator).to(dtype)
    mask = torch.rand(n, tokens, generator=generator) < 0.6
    mask[:, tokens // 2] = True
    return TokenFeatures(features.requires_grad_(), mask)


def scored(images, texts, incoming, weights=None, device="cpu"):
    """Scores and both gradients, computed on `device`."""
    sides = [
        TokenFeatures(s.features.detach().to(device).requires_grad_(), s.mask.to(device))
        for s in (images, texts)
    ]
    scores = similarity(*sides, None if weights is None else weights.to(device))
    scores.backward(incoming.to(scores))
    return [scores.detach().cpu(), *(side.features.grad.cpu() for side in sides)]


@pytest.fixture
def fused(monkeypatch):
    """Scores and gradients by the kernels; counts their calls, so that none is skipped."""
    calls = []
    run = fused_interaction._score
    monkeypatch.setenv("PICO_FUSED_KERNELS", "1")
    monkeypatch.setattr(fused_interaction, "DEVICES", (DEVICE,))
    monkeypatch.setattr(
        fused_interaction, "_score", lambda *a, **k: calls.append(1) or run(*a, **k)
    )

    def call(*args):
        result = scored(*args, device=DEVICE)
        assert calls
        return result

    return call


def plain(*args):
    """The same by the path for CPUs, with the kernels switched off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_interaction, "DEVICES", ())
        return scored(*args)


def assert_same(actual, expected, **tolerance):
    for name, got, want in zip(("scores", "images", "texts"), actual, expected, strict=True):
        torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


SHAPES = {
    "short": ((5, 7), (4, 5)),
    "patches over several tiles": ((2, 150), (3, 9)),
    "texts over several tiles": ((2, 5), (19, 6)),
    "texts of several buckets": ((2, 5), (12, 40)),
    "long texts": ((2, 4), (2, 200)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_scores_and_gradients_equal_the_cpu_path(fused, shape, weights):
    images, texts = (random_tokens(*s, seed=n) for n, s in enumerate(SHAPES[shape]))
    incoming = torch.randn(len(images), len(texts), generator=torch.Generator().manual_seed(2))
    expected = plain(images, texts, incoming, weights)
    assert_same(fused(images, texts, incoming, weights), expected)


def test_scores_equal_the_loop(fused):
    images, texts = random_tokens(3, 7, 0), random_tokens(4, 5, 1)
    scores, *_ = fused(images, texts, torch.ones(3, 4), WEIGHTS)
    torch.testing.assert_close(scores, similarity_loop(images, texts, WEIGHTS).detach())


def test_pairs_without_gradient_pass_none(fused):
    images, texts = random_tokens(5, 7, 0), random_tokens(19, 5, 1)
    incoming = torch.zeros(5, 19)
    incoming[1, 2], incoming[3, 17] = 1.0, -2.0
    result = fused(images, texts, incoming)
    assert_same(result, plain(images, texts, incoming))
    assert not result[1][[0, 2, 4]].any()


def test_the_first_of_tied_tokens_takes_the_whole_gradient(fused):
    images = TokenFeatures(torch.ones(1, 70, 6), torch.ones(1, 70, dtype=torch.bool))
    texts = TokenFeatures(torch.ones(2, 3, 6), torch.ones(2, 3, dtype=torch.bool))
    incoming = torch.ones(1, 2)
    assert_same(fused(images, texts, incoming), plain(images, texts, incoming))


def test_nan_in_padding_reaches_nothing(fused):
    images, texts = random_tokens(3, 7, 0), random_tokens(4, 5, 1)
    dirty = [
        TokenFeatures(s.features.detach().masked_fill(~s.mask.unsqueeze(2), torch.nan), s.mask)
        for s in (images, texts)
    ]
    incoming = torch.ones(3, 4)
    assert_same(fused(*dirty, incoming), plain(images, texts, incoming))


BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16's bits as integers"
    ),
)


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_half_precision_is_summed_in_float32(fused, dtype):
    images, texts = (random_tokens(3, 7, n, dtype=dtype) for n in range(2))
    result = fused(images, texts, torch.ones(3, 3))
    assert [part.dtype for part in result] == [torch.float32, dtype, dtype]
    assert_same(result, plain(images, texts, torch.ones(3, 3)), atol=2e-2, rtol=2e-2)


def test_results_are_the_same_to_the_bit_in_every_run(fused):
    images, texts = random_tokens(3, 70, 0), random_tokens(4, 5, 1)
    first, second = (fused(images, texts, torch.ones(3, 4)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_second_differentiation_is_refused(fused, monkeypatch):
    monkeypatch.setattr(fused_interaction, "DEVICES", (DEVICE,))
    images, texts = random_tokens(2, 3, 0), random_tokens(2, 3, 1)
    images, texts = images.to(DEVICE), texts.to(DEVICE)
    with pytest.raises(RuntimeError, match="`similarity` cannot be differentiated twice"):
        torch.autograd.grad(similarity(images, texts).sum(), images.features, create_graph=True)


def test_without_gradient_no_positions_are_kept(fused, monkeypatch):
    kept = []
    run = fused_interaction._score
    monkeypatch.setattr(
        fused_interaction, "_score", lambda *a, **k: kept.append(a[2]) or run(*a, **k)
    )
    with torch.no_grad():
        similarity(random_tokens(2, 3, 0).to(DEVICE), random_tokens(2, 3, 1).to(DEVICE))
    assert kept == [False]


@pytest.mark.parametrize("value", [None, "", "0", "false", "off"])
def test_the_kernels_are_off_unless_asked_for(monkeypatch, value):
    monkeypatch.setattr(fused_interaction, "DEVICES", (DEVICE,))
    images, texts = random_tokens(2, 3, 0).to(DEVICE), random_tokens(2, 3, 1).to(DEVICE)
    assert fused_interaction.applies(images.features, texts.features)
    if value is None:
        monkeypatch.delenv("PICO_FUSED_KERNELS")
    else:
        monkeypatch.setenv("PICO_FUSED_KERNELS", value)
    assert not fused_interaction.applies(images.features, texts.features)
    monkeypatch.setattr(fused_interaction, "score", None)  # would fail if it were called
    torch.testing.assert_close(similarity(images, texts), similarity_loop(images, texts))


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_the_switch_takes_the_usual_words(monkeypatch, value):
    monkeypatch.setenv("PICO_FUSED_KERNELS", value)
    assert fused_interaction.requested()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_precisions_take_the_plain_path(monkeypatch, dtype):
    monkeypatch.setattr(fused_interaction, "DEVICES", (DEVICE,))
    monkeypatch.setenv("PICO_FUSED_KERNELS", "1")
    features = torch.ones(1, 2, 3, dtype=dtype)
    assert not fused_interaction.applies(features, features)
