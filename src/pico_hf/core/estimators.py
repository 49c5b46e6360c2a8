"""All sources of proposals by name, and the order in which they are asked."""

from __future__ import annotations

from collections.abc import Mapping

from pico_hf.core.canonical import CanonicalColumns
from pico_hf.core.estimator import Estimator
from pico_hf.core.pooled_share import PooledShare
from pico_hf.core.style import StyleClusters

ESTIMATORS: Mapping[str, Estimator] = {
    "style": StyleClusters(),
    "canonical": CanonicalColumns(),
    "pooled": PooledShare(),
}

# The share comes first, so that columns are tried in the score that they are used in, and once more
# after them.
ORDER = ("style", "pooled", "canonical", "pooled")
