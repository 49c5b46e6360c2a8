"""Gradient checkpointing trains what is trained without it, also above frozen layers."""

import pytest
import torch

from pico_hf import PicoModel
from pico_hf.encoders.checkpointing import with_input_gradients
from tiny import tiny_encoder, tiny_inputs
from tiny_trainer import tiny_model

REENTRANT = {"use_reentrant": True}


def gradients(model, checkpoint: dict | None) -> dict[str, torch.Tensor]:
    """Gradients of one training step by name."""
    if checkpoint is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoint)
    model.train()
    torch.manual_seed(0)
    inputs = {key: value.clone() for key, value in tiny_inputs().items()}
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def partly_frozen() -> PicoModel:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name or "projection" in name)
    return model


def adapted() -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    from pico_hf import pico_lora_config

    model = tiny_model()
    torch.manual_seed(0)
    return peft.get_peft_model(model, pico_lora_config(model, r=2, dropout=0.0))


@pytest.mark.parametrize("make", [tiny_model, partly_frozen, adapted])
@pytest.mark.parametrize("checkpoint", [REENTRANT, {"use_reentrant": False}, None])
def test_checkpointing_gives_the_gradients_of_no_checkpointing(make, checkpoint):
    plain = gradients(make(), None)
    found = gradients(make(), checkpoint)
    assert found.keys() == plain.keys()
    assert any("vision_model.encoder.layers.1" in name for name in found)
    assert any("text_model.encoder.layers.1" in name for name in found)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("encoder", ["siglip", "vit+bert", "swin+bert", "blip"])
def test_reentrant_checkpointing_trains_other_towers_too(encoder):
    def build():
        model = PicoModel.from_encoder(
            tiny_encoder(encoder), num_prototypes=3, probe_size=8, pooled_share=0.0
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embeddings" not in name)
        return model

    plain, found = gradients(build(), None), gradients(build(), REENTRANT)
    assert found.keys() == plain.keys()
    assert len(found) > 20


@pytest.mark.parametrize("encoder", ["clip", "swin+bert", "siglip2"])
def test_checkpointing_before_an_adapter_is_put_on_trains_the_adapter(encoder):
    peft = pytest.importorskip("peft")
    from pico_hf import pico_lora_config

    model = PicoModel.from_encoder(
        tiny_encoder(encoder), num_prototypes=3, probe_size=8, pooled_share=0.0
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
    wrapped = peft.get_peft_model(model, pico_lora_config(model, r=2)).train()
    wrapped(**tiny_inputs(encoder=encoder)).loss.backward()
    matrices = {n: p for n, p in wrapped.named_parameters() if "lora_B" in n}
    assert matrices
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in matrices.values())
    model.disable_input_require_grads()
    assert not model._require_grads_hooks


def test_frozen_layers_are_not_made_to_carry_gradients():
    model = partly_frozen()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
    seen = {}

    def watched(run, number):
        def call(*args):
            output = run(*args)
            seen[number] = output.requires_grad
            return output

        return call

    # Not a hook of the layer: in transformers 5.20 hooks run within the checkpoint.
    for number, layer in enumerate(model.encoder.vision_model.encoder.layers):
        layer._gradient_checkpointing_func = watched(layer._gradient_checkpointing_func, number)
    model.train()
    model(**tiny_inputs())
    assert seen == {0: False, 1: True}


def test_a_layer_that_gets_its_states_by_name_is_refused():
    layer = torch.nn.Linear(2, 2)
    run = with_input_gradients(lambda function, *args: function(*args))
    with pytest.raises(ValueError, match="Pass `gradient_checkpointing_kwargs="):
        run(layer.forward)
