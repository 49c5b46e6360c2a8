"""A module in eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode within the block, and gives it its own mode back.

    Args:
        module: A model or an encoder.
    """
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
