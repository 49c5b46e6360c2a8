"""What a source of proposals is: an estimator of the form in which patches and words meet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from pico_hf.core.pair_moments import PairMoments
from pico_hf.core.score_form import ScoreForm
from pico_hf.core.state import Sizes
from pico_hf.core.token_features import TokenFeatures


@runtime_checkable
class Bank(Protocol):
    """What estimators read of the prototypes; see [`StylePrototypes`]."""

    sizes: Sizes

    @property
    def form(self) -> ScoreForm:
        """How the model scores now."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Every buffer by name."""


@runtime_checkable
class TrainingPairs(Protocol):
    """The pairs that statistics are taken of, encoded in the encoder columns."""

    def probe(self) -> Iterator[tuple[TokenFeatures, TokenFeatures]]:
        """Batches of the probe set, row r of the images belonging to row r of the texts."""

    def moments(self) -> PairMoments:
        """Of a sample of images and all of their texts."""


@dataclass(frozen=True)
class Memory:
    """What earlier proposals were fused to.

    Attributes:
        tensors: What is fused, one by one, with those of a proposal.
        proposals: How many are in it.
        log_total: log G of what is in it.
        rest: 1 if what a model has without any proposal is in it too, as one that brought 0.
    """

    tensors: tuple[Tensor, ...]
    proposals: int = 0
    log_total: float = 0.0
    rest: int = 1

    @property
    def count(self) -> int:
        """How much is in it."""
        return self.proposals + self.rest

    def fused(self, proposal: tuple[Tensor, ...], share: float, log_total: float) -> Memory:
        """(1 - share) of what is here and `share` of a proposal."""
        pairs = zip(self.tensors, proposal, strict=True)
        tensors = tuple(one.lerp(other.to(one), share) for one, other in pairs)
        return Memory(tensors, self.proposals + 1, log_total, self.rest)


@runtime_checkable
class Estimator(Protocol):
    """One source of proposals. It has no state: what it remembers is in the bank.

    Attributes:
        source: Its name, one of `SOURCES`, as in [`PicoConfig`] and in logs.
        needs_feedback: True proposes nothing where no dev split tells what a proposal brings.
        picks: True may take a single proposal as it is, where fused ones are worse.
    """

    source: str
    needs_feedback: bool
    picks: bool

    def collect(self, pairs: TrainingPairs) -> Any:
        """Takes the statistics that proposals follow from."""

    def memory(self, bank: Bank) -> Memory:
        """What the next proposal is fused into."""

    def propose(self, bank: Bank, statistics: Any) -> Iterable[tuple[Tensor, ...]]:
        """Proposals, in the order in which they are tried; changes nothing."""

    def form(self, bank: Bank, statistics: Any, tensors: tuple[Tensor, ...]) -> ScoreForm:
        """The form that a proposal, or what proposals were fused to, stands for."""

    def stored(self, memory: Memory) -> dict[str, Any]:
        """New values of its buffers."""
