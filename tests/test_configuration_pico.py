"""Which model knobs exist and are valid."""

import pytest
import torch
from transformers import AutoConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pico_hf import PicoConfig, PicoModel
from tiny import tiny_clip


def test_a_misspelt_key_is_refused_with_the_name_that_was_meant():
    with pytest.raises(ValueError, match=r"`nun_prototypes` is not a key .* mean `num_prototypes`"):
        PicoConfig(nun_prototypes=4)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_prototypes": 0}, "`num_prototypes` must be an integer >= 1, got 0"),
        ({"num_prototypes": 2.5}, "`num_prototypes` must be an integer >= 1, got 2.5"),
        ({"probe_size": 1}, "`probe_size` must be an integer >= 2, got 1"),
        (
            {"feedback_temperature": 0.0},
            "`feedback_temperature` must be a number > 0 and at most 1000000",
        ),
        ({"margin": -0.1}, "`margin` must be a number > 0 and at most 1000000, got -0.1"),
        ({"margin": "wide"}, "`margin` must be a number > 0 and at most 1000000, got 'wide'"),
        ({"loss": "triplet"}, "`loss` must be one of hinge, infonce, sigmoid, got 'triplet'"),
        ({"column_dropout": 1.0}, r"`column_dropout` must be in \[0, 1\), got 1.0"),
        (
            {"estimators": ["oracle"]},
            "`estimators` must be one of canonical, pooled, style, got 'oracle'",
        ),
        ({"encoder_config": {"model_type": "martian"}}, "model_type 'martian'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(knobs, message):
    with pytest.raises(ValueError, match=message):
        PicoConfig(**knobs)


def test_a_configuration_survives_the_disk(tmp_path):
    config = PicoConfig(encoder_config=tiny_clip().config, num_prototypes=3, loss="infonce")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, PicoConfig)
    assert (again.num_prototypes, again.loss) == (3, "infonce")
    assert again.encoder_config.projection_dim == 16


def test_a_live_encoder_config_is_copied_and_left_alone():
    encoder = tiny_clip()
    before = encoder.config.text_config._attn_implementation
    config = PicoConfig(encoder_config=encoder.config)
    assert config.encoder_config is not encoder.config
    assert encoder.config.text_config._attn_implementation == before is not None


STOCK_KEYS = {
    "tie_word_embeddings": False,
    "torchscript": False,
    "is_decoder": False,
    "pruned_heads": {},
    "made_by": "another tool",
}


def test_keys_of_transformers_and_other_tools_pass_and_are_kept(tmp_path):
    PicoConfig(encoder_config=tiny_clip().config, **STOCK_KEYS).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.made_by == "another tool"
    assert again.tie_word_embeddings is False


def test_a_model_that_was_saved_quantised_loads_again(tmp_path):
    @register_quantization_config("stub")
    class StubConfig(QuantizationConfigMixin):
        def __init__(self, **kwargs):
            self.quant_method = "stub"

    @register_quantizer("stub")
    class StubQuantizer(HfQuantizer):
        requires_calibration = False

        def is_serializable(self, **kwargs):
            return True

        @property
        def is_trainable(self):
            return True

    model = PicoModel.from_encoder(tiny_clip(), num_prototypes=2, probe_size=4)
    model.config.quantization_config = StubConfig()
    model.save_pretrained(tmp_path)
    assert '"quant_method": "stub"' in (tmp_path / "config.json").read_text()
    again = PicoModel.from_pretrained(tmp_path)
    assert again.config.quantization_config.quant_method == "stub"
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
