"""The loss of a batch whose activations do not fit into memory.

Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021
(GradCache).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PreTrainedModel

from pico_hf.core.token_features import TokenFeatures
from pico_hf.modeling_outputs import PicoOutput, pair_output


@dataclass(frozen=True)
class CachedGradients:
    """Encodes a batch part by part, twice: for its features, and again for their gradients.

    The first pass keeps features only. The loss of all of them gives a gradient for each, and the
    second pass takes it back to the weights. Both passes draw the same random numbers.

    Attributes:
        model: The model, wrapped for several processes or not.
        pico: The [`PicoModel`] in it.
        size: Pairs of a part, >= 1.
        later: Context in which gradients are not yet averaged over processes.
    """

    model: nn.Module
    pico: PreTrainedModel
    size: int
    later: Callable[[], AbstractContextManager]

    def loss(
        self,
        inputs: Mapping[str, Any],
        loss_of: Callable[[PicoOutput], Tensor],
        ramp: float | None = None,
    ) -> tuple[Tensor, PicoOutput]:
        """The loss, whose `backward` is the second pass, and the outputs that it is of.

        Args:
            inputs: Of the model: tensors with a row per pair, and what is the same for all pairs.
                `image_ids` and `scorer` are of the whole batch.
            loss_of: From outputs to the loss.
            ramp: `loss_ramp` of `PicoModel.forward`.
        """
        inputs = dict(inputs)
        whole = {name: inputs.pop(name, None) for name in ("image_ids", "scorer")}
        parts = list(_split(inputs, self.size))
        states, sides = self._first_pass(parts)
        leaves = [side.features.requires_grad_() for side in sides]
        outputs = pair_output(self.pico, *sides, loss_ramp=ramp, **whole)
        value = loss_of(outputs)
        scale = [p for p in self.pico.pair_logits.parameters() if p.requires_grad]
        found = torch.autograd.grad(
            value, [*leaves, *scale], allow_unused=True, materialize_grads=True
        )

        def second_pass(factor: Tensor) -> None:
            with torch.enable_grad():
                self._add_to(scale, [gradient * factor for gradient in found[2:]])
                self._second_pass(parts, states, [gradient * factor for gradient in found[:2]])

        result = value.detach().requires_grad_()
        result.register_hook(second_pass)
        return result, outputs

    @torch.no_grad()
    def _first_pass(
        self, parts: Sequence[Mapping[str, Any]]
    ) -> tuple[list[RandomState], list[TokenFeatures]]:
        """What the random generators were before each part, features of all images and texts."""
        states, features = [], []
        for part in parts:
            states.append(RandomState(part.values()))
            output = self._encode(part)
            features.append((output.image_features, output.text_features))
        return states, [TokenFeatures.concatenate(side) for side in zip(*features, strict=True)]

    def _add_to(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        if not parameters:
            return
        with self.later():  # every process has all of this gradient already
            torch.autograd.backward(list(parameters), list(gradients))

    def _second_pass(
        self,
        parts: Sequence[Mapping[str, Any]],
        states: Sequence[RandomState],
        gradients: Sequence[Tensor],
    ) -> None:
        sides = zip(*(gradient.split(self.size) for gradient in gradients), strict=True)
        for number, (part, state, pair) in enumerate(zip(parts, states, sides, strict=True), 1):
            last = number == len(parts)
            with nullcontext() if last else self.later(), state.again():
                self._take_back(part, pair)

    def _encode(self, part: Mapping[str, Any]) -> Any:
        return self.model(**part, scorer=_no_scores, return_loss=False)

    def _take_back(self, part: Mapping[str, Any], gradients: Sequence[Tensor]) -> None:
        output = self._encode(part)
        # Reaches every parameter that the loss of a plain step reaches: processes wait for them.
        total = 0 * output.logits_per_image.sum()
        for side, gradient in zip(
            (output.image_features, output.text_features), gradients, strict=True
        ):
            total = total + (side.features * gradient[:, : side.mask.shape[1]]).sum()
        if total.requires_grad:
            total.backward()


class RandomState:
    """The state of the random generators, to draw the same numbers again.

    Args:
        inputs: Whose devices count besides the CPU.
    """

    def __init__(self, inputs: Any) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)
        self.type = next((t.device.type for t in tensors if t.device.type != "cpu"), "cuda")

    @contextmanager
    def again(self) -> Iterator[None]:
        """Goes back to this state, and afterwards on from where it was."""
        with torch.random.fork_rng(self.devices, device_type=self.type):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, device_type=self.type)
            yield


def _no_scores(images: TokenFeatures, texts: TokenFeatures) -> Tensor:
    return images.features.new_zeros(1, 1)


def _split(inputs: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Parts of `size` pairs, the last one with what is left."""
    pairs = max(len(value) for value in inputs.values() if isinstance(value, Tensor))
    for start in range(0, pairs, size):
        yield {
            name: value[start : start + size] if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
