"""torch.compile(fullgraph=True) and torch.export of what scores: the same values, one graph.

`test_compiled.py` runs these in a process of their own.
"""

import shutil

import pytest
import torch
from torch import nn

from pico_hf import PicoModel
from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from pico_hf.encoders.projection import project_pooled
from pico_hf.encoders.tokens import encoder_spec
from reference import similarity_loop
from tiny import tiny_encoder, tiny_inputs, tiny_refined
from tiny_encoders import one_layer


@pytest.fixture(autouse=True)
def no_old_graphs():
    torch._dynamo.reset()


def sides(seed: int = 0, images: int = 4, texts: int = 3) -> list[torch.Tensor]:
    """Features and masks with padding anywhere; the first token of each is real."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows, tokens in ((images, 6), (texts, 7)):
        mask = torch.rand(rows, tokens, generator=generator) > 0.4
        mask[:, 0] = True
        found += [torch.randn(rows, tokens, 5, generator=generator), mask]
    return found


class Scored(nn.Module):
    def forward(self, patches, patch_mask, words, word_mask, weights):
        images, texts = TokenFeatures(patches, patch_mask), TokenFeatures(words, word_mask)
        return similarity(images, texts, weights)


WEIGHTS = torch.tensor([0.2, 0.8, 1.0, 1.2, 1.8])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_scores_and_gradients_are_those_without_compiling(backend):
    compiled = torch.compile(Scored(), fullgraph=True, backend=backend, dynamic=True)
    for seed, images, texts in ((0, 4, 3), (1, 6, 5)):
        found = []
        for scored in (Scored(), compiled):
            inputs = sides(seed, images, texts)
            inputs[0].requires_grad_()
            inputs[2].requires_grad_()
            scores = scored(*inputs, WEIGHTS)
            (scores * torch.linspace(-1, 1, images * texts).view(images, texts)).sum().backward()
            found.append((scores, inputs[0].grad, inputs[2].grad))
        for expected, got in zip(*found, strict=True):
            assert torch.equal(got, expected)


def test_the_operator_of_a_compiled_graph_is_a_proper_one():
    inputs = sides()
    inputs[0].requires_grad_()
    inputs[2].requires_grad_()
    torch.library.opcheck(torch.ops.pico_hf.late_interaction.default, (*inputs, WEIGHTS))


def test_a_compiled_score_refuses_what_the_plain_one_refuses():
    compiled = torch.compile(Scored(), fullgraph=True, backend="eager")
    inputs = sides()
    inputs[3][1] = False
    with pytest.raises(ValueError, match="`texts` must have at least one real token"):
        compiled(*inputs, WEIGHTS)


def test_an_exported_score_is_the_loops():
    example = (*sides(), WEIGHTS)
    i, t = torch.export.Dim("images"), torch.export.Dim("texts")
    shapes = ({0: i}, {0: i}, {0: t}, {0: t}, None)
    program = torch.export.export(Scored(), example, dynamic_shapes=shapes, strict=False)
    assert "pico_hf" not in program.graph_module.code  # runs where this package is not installed
    inputs = sides(1, 6, 5)
    expected = similarity_loop(TokenFeatures(*inputs[:2]), TokenFeatures(*inputs[2:]), WEIGHTS)
    torch.testing.assert_close(program.module()(*inputs, WEIGHTS), expected, rtol=0, atol=1e-5)


def pair(name: str, backend: str, share: float) -> tuple[nn.Module, nn.Module]:
    """A model and the same one compiled; nobody has asked it for a score before."""
    model = tiny_refined(name, pooled_share=share).eval()
    one_layer(model.encoder)
    return model, torch.compile(model, fullgraph=True, backend=backend, dynamic=True)


def inputs_of(name: str, **sizes: int) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(encoder=name, **sizes)
    if name == "siglip":  # attends to its padding
        del inputs["attention_mask"]
    return inputs


@torch.no_grad()
def compare_scores(name: str, backend: str, share: float, tolerance: float = 0.0) -> None:
    model, compiled = pair(name, backend, share)
    for sizes in ({}, {"batch": 5, "words": 8}):
        inputs = inputs_of(name, **sizes)
        got, expected = (part(**inputs, return_loss=False) for part in (compiled, model))
        difference = got.logits_per_image - expected.logits_per_image
        assert float(difference.abs().max()) <= tolerance
        assert torch.equal(got.text_features.mask, expected.text_features.mask)


def compare_training_steps(name: str, backend: str, share: float, tolerance: float = 0.0) -> None:
    gradients = []
    model, compiled = pair(name, backend, share)
    for part in (model, compiled):
        model.zero_grad()
        part(**inputs_of(name)).loss.backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 30
    for key, expected in gradients[0].items():
        assert float((gradients[1][key] - expected).abs().max()) <= tolerance, key


def test_a_compiled_model_gives_what_the_model_gives():
    compare_scores("clip", "eager", 1 / 3)


@torch.no_grad()
def test_a_compiled_model_follows_its_share_and_a_loaded_one_knows_it(tmp_path):
    model, compiled = pair("clip", "eager", 0.0)
    inputs, found = inputs_of("clip"), []
    for share in (0.0, 0.25, 1.0):
        model.prototypes.share_score(share)
        found.append(compiled(**inputs, return_loss=False).logits_per_image)
        assert torch.equal(found[-1], model(**inputs, return_loss=False).logits_per_image)
    assert float((found[0] - found[2]).abs().max()) > 0.01
    torch._dynamo.reset()
    model.save_pretrained(tmp_path)
    loaded = PicoModel.from_pretrained(tmp_path)
    got = torch.compile(loaded, fullgraph=True, backend="eager")(**inputs, return_loss=False)
    torch.testing.assert_close(got.logits_per_image, found[2], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_compiled_attention_head_leaves_padded_patches_out():
    encoder = tiny_encoder("siglip2")
    row = encoder_spec(encoder).image
    patches = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])

    def pool(patches, mask):
        return project_pooled(encoder, row, TokenFeatures(patches, mask))

    got = torch.compile(pool, backend="eager")(patches, mask)
    torch.testing.assert_close(got[1:], pool(patches[1:, :4], mask[1:, :4]), rtol=0, atol=1e-5)
    torch.testing.assert_close(got, pool(patches, mask), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 1 / 3])
@pytest.mark.parametrize("name", ["clip", "siglip", "vit+bert"])
def test_compiled_models_score_and_train_as_they_do_without(name, share):
    compare_scores(name, "aot_eager", share)
    compare_training_steps(name, "aot_eager", share)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler, g++")
def test_a_model_compiled_to_machine_code_gives_what_the_model_gives():
    compare_scores("clip", "inductor", 1 / 3, tolerance=1e-4)
    compare_training_steps("clip", "inductor", 1 / 3, tolerance=1e-4)
