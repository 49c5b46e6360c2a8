"""Decompositions of matrices that come to an end for every finite matrix.

`torch.linalg.svd` and `eigh` divide and conquer, which is fast and now and then does not converge,
on matrices that are neither large nor ill-conditioned. LAPACK's QR iteration, slower, then takes
their place: a run must not end in an error on its last line.
"""

from __future__ import annotations

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
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        from scipy.linalg import svd as by_iteration  # importing it takes a while

        found = by_iteration(_array(matrix), full_matrices=False, lapack_driver="gesvd")
        left, values, right = (torch.as_tensor(part).to(matrix) for part in found)
    return left, values, right


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the smallest first, and eigenvectors in columns of a symmetric matrix.

    Args:
        matrix: (columns, columns), finite.

    Example:
        >>> eigh(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))[0].tolist()
        [1.0, 2.0]
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        from scipy.linalg import eigh as by_iteration  # importing it takes a while

        found = by_iteration(_array(matrix), driver="ev")
        values, vectors = (torch.as_tensor(part).to(matrix) for part in found)
    return values, vectors


def _array(matrix: Tensor) -> Any:
    return matrix.detach().cpu().numpy()
