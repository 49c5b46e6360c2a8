"""LoRA: every adapter weight is trained, and nothing is lost by saving, resuming or merging."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pico_hf import PicoModel, load_adapter_model, pico_lora_config
from tiny import tiny_encoder, tiny_inputs
from tiny_encoders import BUILDERS

peft = pytest.importorskip("peft")
ALL = pytest.mark.parametrize("name", list(BUILDERS))


def adapted(name: str = "clip", **options):
    """A tiny adapter whose matrices are not zero, on uneven prototypes."""
    torch.manual_seed(0)
    model = PicoModel.from_encoder(tiny_encoder(name), num_prototypes=3, probe_size=3)
    model.prototypes.semantic_probability.copy_(
        torch.linspace(0.2, 1.0, model.column_weights.numel())
    )
    config = pico_lora_config(model, r=2, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@ALL
def test_every_adapter_parameter_gets_a_gradient_in_one_step(name):
    model = adapted(name).train()
    loss = model(**tiny_inputs(encoder=name)).logits_per_image.square().mean()
    loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}
    assert trained
    assert not [n for n, gradient in trained.items() if gradient is None]
    assert not [n for n, gradient in trained.items() if not gradient.any()]
