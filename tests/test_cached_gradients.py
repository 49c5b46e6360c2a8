"""Gradients of a batch that is encoded part by part are those of the whole batch."""

import pytest
import torch

from tiny import tiny_encoder, tiny_inputs
from tiny_trainer import BARE, tiny_model, tiny_trainer

TOLERANCE = 1e-5
RAGGED = 11  # pairs, so that the last part is smaller


def gradients(tmp_path, inputs, model=None, **knobs):
    """Gradients of one training step, and its loss."""
    trainer = tiny_trainer(tmp_path, {"model": model or tiny_model()}, **knobs, **BARE)
    trainer.state.epoch = 2.0  # after the warm-up: hardest negatives
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    torch.manual_seed(3)
    loss = trainer.training_step(trainer.model, inputs)
    named = trainer.pico_model.named_parameters()
    return {name: p.grad for name, p in named if p.requires_grad}, loss


def largest_difference(ours, theirs) -> float:
    """Of gradients; one that no loss reaches is None or zero."""
    assert ours.keys() == theirs.keys()
    pairs = [
        (ours[name] if ours[name] is not None else torch.zeros_like(theirs[name]), theirs[name])
        for name in ours
        if theirs[name] is not None
    ]
    assert max(float(theirs.abs().max()) for _, theirs in pairs) > 1e-2
    return max(float((one - other).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("loss", ["hinge", "infonce", "sigmoid"])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_parts_give_the_gradients_of_the_whole(tmp_path, loss, size):
    inputs = {**tiny_inputs(RAGGED), "image_ids": torch.arange(RAGGED) // 2}
    whole, value = gradients(tmp_path, inputs, tiny_model(loss=loss))
    scale = max(float(g.abs().max()) for g in whole.values() if g is not None)
    parts, same = gradients(tmp_path, inputs, tiny_model(loss=loss), mini_batch_size=size)
    assert torch.allclose(value, same)
    assert largest_difference(parts, whole) <= TOLERANCE * max(1.0, scale)


def test_gradients_with_checkpointing_and_an_adapter_are_those_of_the_whole(tmp_path):
    peft = pytest.importorskip("peft")
    from pico_hf import pico_lora_config

    def adapted():
        model = tiny_model(loss="infonce")
        return peft.get_peft_model(model, pico_lora_config(model, dropout=0.0))

    whole, _ = gradients(tmp_path, tiny_inputs(RAGGED), adapted())
    parts, _ = gradients(
        tmp_path, tiny_inputs(RAGGED), adapted(), mini_batch_size=4, gradient_checkpointing=True
    )
    assert largest_difference(parts, whole) <= TOLERANCE


def test_both_passes_drop_the_same(tmp_path):
    """A graph of all parts, encoded one after the other, is the reference."""
    from pico_hf.core.token_features import TokenFeatures
    from pico_hf.modeling_outputs import pair_output

    def dropping():
        model = tiny_model(loss="infonce", column_dropout=0.5)
        for part in (model.encoder.text_model, model.encoder.vision_model):
            for layer in part.encoder.layers:
                layer.self_attn.dropout = 0.3
        return model

    inputs = tiny_inputs(RAGGED)
    parts, value = gradients(tmp_path, inputs, dropping(), mini_batch_size=4)
    model = dropping().train()
    torch.manual_seed(3)
    batches = [{k: v[n : n + 4] for k, v in inputs.items()} for n in range(0, RAGGED, 4)]
    outputs = [model(**batch) for batch in batches]
    images = TokenFeatures.concatenate([output.image_features for output in outputs])
    texts = TokenFeatures.concatenate([output.text_features for output in outputs])
    loss = pair_output(model, images, texts).loss
    loss.backward()
    assert torch.allclose(loss, value)
    whole = {name: p.grad for name, p in model.named_parameters()}
    assert largest_difference(parts, whole) <= TOLERANCE
    other, _ = gradients(tmp_path, inputs, tiny_model(loss="infonce"), mini_batch_size=4)
    assert largest_difference(other, whole) > 1e-2  # so something was dropped


def test_the_random_numbers_of_a_run_go_on_after_the_first_pass(tmp_path):
    drawn = []
    for size in (4, 4):
        gradients(
            tmp_path, tiny_inputs(RAGGED), tiny_model(column_dropout=0.5), mini_batch_size=size
        )
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    torch.manual_seed(3)
    assert not torch.equal(drawn[0], torch.rand(3))


def test_a_loss_of_ones_own_has_its_gradients_too(tmp_path):
    def own(outputs, labels, num_items_in_batch=None):
        features = outputs.image_features.features
        return outputs.logits_per_image.logsumexp(dim=1).mean() + features.abs().mean()

    found = []
    for size in (None, 4):
        knobs = {} if size is None else {"mini_batch_size": size}
        trainer = tiny_trainer(tmp_path, {"compute_loss_func": own}, **knobs, **BARE)
        trainer.compute_loss(trainer.model.train(), tiny_inputs(RAGGED)).backward()
        found.append({name: p.grad for name, p in trainer.model.named_parameters()})
    assert largest_difference(found[1], found[0]) <= TOLERANCE


@pytest.mark.parametrize("size", [0, -3])
def test_a_part_has_a_pair(tmp_path, size):
    with pytest.raises(ValueError, match=f"`mini_batch_size` must be >= 1, got {size}."):
        tiny_trainer(tmp_path, mini_batch_size=size)


def test_statistics_of_a_whole_batch_are_refused(tmp_path):
    from pico_hf import PicoModel

    model = PicoModel.from_encoder(
        tiny_encoder("align"), num_prototypes=3, probe_size=8, pooled_share=0.0
    )
    with pytest.raises(ValueError, match="`mini_batch_size` does not go with a BatchNorm that is"):
        tiny_trainer(tmp_path, {"model": model}, mini_batch_size=4)
    tiny_trainer(tmp_path, {"model": model}, mini_batch_size=4, freeze_encoder=True)


def test_an_optimizer_that_steps_inside_a_backward_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`mini_batch_size` does not go with `optim="):
        tiny_trainer(tmp_path, mini_batch_size=4, optim="lomo")
