"""Which model knobs exist and are valid."""

import pytest
from transformers import AutoConfig

from pico_hf import PicoConfig
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
        ({"feedback_temperature": 0.0}, "`feedback_temperature` must be a number > 0, got 0.0"),
        ({"margin": -0.1}, "`margin` must be a number > 0, got -0.1"),
        ({"margin": "wide"}, "`margin` must be a number > 0, got 'wide'"),
        ({"loss": "triplet"}, "`loss` must be one of hinge, infonce, sigmoid, got 'triplet'"),
        ({"column_dropout": 1.0}, r"`column_dropout` must be in \[0, 1\), got 1.0"),
        (
            {"estimator": "oracle"},
            "`estimator` must be one of canonical, paper, got 'oracle'",
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
