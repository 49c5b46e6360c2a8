"""Decompositions of matrices that come to an end for every finite matrix.

`torch.linalg.svd` and `eigh` divide and conquer, which is fast and now and then does not converge,
on matrices that are neither large nor ill-conditioned. LAPACK's QR iteration, slower, then takes
their place: a run must not end in an error on its last line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values and Wᵀ of a matrix, the thin ones; largest values first.

    Args:
        matrix: (rows, columns), finite.

    Example:
        >>> svd(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))[1].tolist()
        [2.0, 1.0]
    """

    def slower(values: Any) -> Any:
        from scipy.linalg import svd as by_iteration  # importing it takes a while

        return by_iteration(values, full_matrices=False, lapack_driver="gesvd")

    left, values, right = _first_that_converges(
        lambda: torch.linalg.svd(matrix, full_matrices=False), slower, matrix
    )
    return left, values, right


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the smallest first, and eigenvectors in columns of a symmetric matrix.

    Args:
        matrix: (columns, columns), finite.

    Example:
        >>> eigh(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))[0].tolist()
        [1.0, 2.0]
    """

    def slower(values: Any) -> Any:
        from scipy.linalg import eigh as by_iteration  # importing it takes a while

        return by_iteration(values, driver="ev")

    values, vectors = _first_that_converges(lambda: torch.linalg.eigh(matrix), slower, matrix)
    return values, vectors


def _first_that_converges(
    fast: Callable[[], Any], slower: Callable[[Any], Any], matrix: Tensor
) -> tuple[Tensor, ...]:
    try:
        return tuple(fast())
    except torch.linalg.LinAlgError:
        parts = slower(matrix.detach().cpu().numpy())
        return tuple(torch.as_tensor(part).to(matrix) for part in parts)
