"""Decompositions end where the fast ones do not converge."""

import pytest
import torch

from pico_hf.core.closed_form import closed_form_projections
from pico_hf.core.decompositions import eigh, svd
from pico_hf.core.moments import TokenMoments
from pico_hf.core.pair_moments import PairMoments
from pico_hf.core.score_form import ScoreForm


@pytest.fixture
def nothing_converges(monkeypatch):
    """What happens, on some builds of LAPACK, to one matrix in many thousand."""

    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("The algorithm failed to converge")

    for name in ("svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, fails)


def near_identity(dtype=torch.float64):
    torch.manual_seed(0)
    low_rank = torch.randn(12, 3, dtype=dtype) @ torch.randn(3, 12, dtype=dtype)
    return 0.85 * torch.eye(12, dtype=dtype) + 0.1 * low_rank  # most singular values are equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_and_eigh_are_right_without_the_fast_algorithm(nothing_converges, dtype):
    matrix = near_identity(dtype)
    left, values, right = svd(matrix)
    assert {part.dtype for part in (left, values, right)} == {dtype}
    torch.testing.assert_close(left * values @ right, matrix)
    assert bool((values[:-1] >= values[1:]).all())

    symmetric = matrix @ matrix.t()
    values, vectors = eigh(symmetric)
    torch.testing.assert_close(vectors * values @ vectors.t(), symmetric)
    assert bool((values[:-1] <= values[1:]).all())


def test_a_form_is_factored_without_the_fast_algorithm(nothing_converges):
    form = near_identity()
    factored = ScoreForm.of(form).matrix()
    torch.testing.assert_close(
        factored / factored.norm(), form / form.norm(), rtol=0, atol=1e-7
    )  # weights are fp32


def test_projections_start_without_the_fast_algorithm(nothing_converges):
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
    sides = [TokenMoments(means, means.mean(dim=0), torch.eye(2).double()) for _ in range(2)]
    image, text = closed_form_projections(PairMoments(*sides, torch.arange(4)), columns=2)
    assert image.shape == text.shape == (2, 2)
    assert bool(torch.isfinite(image).all())


def test_the_fast_algorithm_stays_where_it_converges():
    matrix = near_identity()
    assert all(
        torch.equal(*pair) for pair in zip(svd(matrix), torch.linalg.svd(matrix), strict=True)
    )
