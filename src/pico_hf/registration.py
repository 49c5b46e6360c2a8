"""Importing this module makes the Auto classes of transformers know Pico models."""

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification

from pico_hf.configuration_pico import PicoConfig
from pico_hf.modeling_pico import PicoModel

AutoConfig.register(PicoConfig.model_type, PicoConfig, exist_ok=True)
AutoModel.register(PicoConfig, PicoModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(PicoConfig, PicoModel, exist_ok=True)
