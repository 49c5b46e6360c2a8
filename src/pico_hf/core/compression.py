"""Fewer tokens per image."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pico_hf.core.token_features import TokenFeatures


def merge_tokens(tokens: TokenFeatures, factor: int) -> TokenFeatures:
    """Merges the tokens of every item that lie closest, so that one in `factor` remains.

    Ward's hierarchical clustering of the tokens of an item; the mean of each cluster, of unit
    length, stands for its tokens ("token pooling", Clavié et al. 2024, arXiv 2409.14683).

    Args:
        tokens: Unit-length tokens of some images.
        factor: 1 keeps all; an item of n tokens keeps ceil(n / factor).

    Raises:
        ValueError: If `factor` is below 1.

    Example:
        >>> features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> merge_tokens(TokenFeatures(features, torch.ones(1, 4).bool()), 2).features.tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
    """
    if factor < 1:
        raise ValueError(f"`factor` must be >= 1, got {factor}. 2 keeps half of the tokens.")
    if factor == 1:
        return tokens
    items = zip(tokens.features.cpu(), tokens.mask.cpu(), strict=True)
    merged = [_merged(features[mask], factor) for features, mask in items]
    parts = [TokenFeatures(one.unsqueeze(0), torch.ones(1, len(one)).bool()) for one in merged]
    return TokenFeatures.concatenate(parts).to(str(tokens.features.device))


def _merged(tokens: Float[Tensor, "tokens D"], factor: int) -> Float[Tensor, "kept D"]:
    """Of one item; clusters in the order of their first tokens."""
    from scipy.cluster.hierarchy import fcluster, linkage  # importing it takes a while

    kept = -(-len(tokens) // factor)
    if len(tokens) < 2:
        return tokens
    tree = linkage(tokens.double().numpy(), method="ward")
    labels = fcluster(tree, t=kept, criterion="maxclust").tolist()
    number = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    owner = torch.tensor([number[label] for label in labels])
    sums = tokens.new_zeros(len(number), tokens.shape[1]).index_add_(0, owner, tokens)
    return torch.nn.functional.normalize(sums, dim=-1)
