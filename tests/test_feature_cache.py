"""Cached features: exact to half precision, keyed by what they depend on, never half written."""

import pytest
import torch

from pico_hf import PicoCollator, PicoModel
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.training.evaluation import SplitEncoder, tower_states
from pico_hf.training.feature_cache import cache_key, cache_token_features
from tiny import tiny_encoder, tiny_processor, tiny_rows


def encoder(seed: int = 0) -> SplitEncoder:
    model = PicoModel.from_encoder(tiny_encoder("clip", seed), num_prototypes=2, probe_size=4)
    return SplitEncoder(model, PicoCollator(tiny_processor()), 4, disable_tqdm=True)


def test_rows_hold_the_towers_outputs_of_real_tokens(tmp_path):
    towers, rows = encoder(), ImageTextDataset(tiny_rows(6))
    cached = cache_token_features(towers, rows, tmp_path)
    texts = [text for _, text in towers.batches(rows.captions(), "", tower_states)]
    live = [
        features[mask] for t in texts for features, mask in zip(t.features, t.mask, strict=True)
    ]
    assert len(cached.captions()) == len(live) == 12
    for row, expected in enumerate(live):
        states = cached.captions()[row]["text_hidden_states"]
        assert torch.equal(states, expected.half())


def test_a_cached_pair_is_the_pair_of_the_same_epoch(tmp_path):
    towers, rows = encoder(), ImageTextDataset(tiny_rows(6))
    cached = cache_token_features(towers, rows, tmp_path)
    for split in (rows, cached):
        split.set_epoch(3)
    words = [len(cached[row]["text_hidden_states"]) for row in range(6)]
    assert words == [len(rows[row]["caption"].split()) for row in range(6)]


def test_a_part_of_a_split_keeps_captions_and_features(tmp_path):
    towers, rows = encoder(), ImageTextDataset(tiny_rows(6))
    cached = cache_token_features(towers, rows, tmp_path)
    drawn = rows._drawn(3)
    assert drawn == sorted(set(drawn)) == cached._drawn(3)
    for split in (rows, cached):
        part = split.sample(3)
        assert len(part) == 3
        assert part.text_to_image.tolist() == [0, 0, 1, 1, 2, 2]
        assert part._texts == [split._texts[2 * n + k] for n in drawn for k in (0, 1)]
        assert split.sample(99) is split
    part = cached.sample(3)
    for ours, theirs in enumerate(drawn):
        one = part.images()[ours]["image_hidden_states"]
        assert torch.equal(one, cached.images()[theirs]["image_hidden_states"])
    words = [len(part.captions()[n]["text_hidden_states"]) for n in range(6)]
    assert words == [len(text.split()) for text in part._texts]


def test_the_key_changes_with_towers_data_and_preprocessing_but_not_with_heads():
    rows = ImageTextDataset(tiny_rows(6))
    towers = encoder()
    key = cache_key(towers, rows)
    assert cache_key(encoder(seed=1), rows) != key
    assert cache_key(towers, ImageTextDataset(tiny_rows(7))) != key
    shorter = PicoCollator(tiny_processor(), max_length=4)
    assert cache_key(SplitEncoder(towers.model, shorter), rows) != key
    with torch.no_grad():
        towers.model.encoder.visual_projection.weight.add_(1.0)
    assert cache_key(towers, rows) == key


def test_states_that_are_no_numbers_leave_nothing_behind(tmp_path):
    towers = encoder()
    with torch.no_grad():
        towers.model.encoder.text_model.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="hidden states contain NaN"):
        cache_token_features(towers, ImageTextDataset(tiny_rows(6)), tmp_path)
    assert not list(tmp_path.iterdir())
