"""Cached features: exact to half precision, keyed by what they depend on, never half written."""

import os
import subprocess
import sys

import pytest
import tokenizers
import torch

from command_line import done, read, refused
from pico_hf import PicoCollator, PicoModel
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.training import feature_cache
from pico_hf.training.cache_folder import cache_entries, default_cache_dir
from pico_hf.training.encoding import SplitEncoder, tower_states
from pico_hf.training.feature_cache import cache_key, cache_token_features
from tiny import tiny_encoder, tiny_processor, tiny_rows


def encoder(seed: int = 0) -> SplitEncoder:
    model = PicoModel.from_encoder(
        tiny_encoder("clip", seed), num_prototypes=2, probe_size=4, pooled_share=0.0
    )
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


def other_tokenizer(change):
    """A tokenizer of the same name and another content."""
    processor = tiny_processor()
    change(processor.tokenizer)
    return PicoCollator(processor)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.add_tokens(["disc"]),
        lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "red"}),
        lambda tokenizer: setattr(tokenizer, "truncation_side", "left"),
        lambda tokenizer: setattr(
            tokenizer.backend_tokenizer, "normalizer", tokenizers.normalizers.Lowercase()
        ),
    ],
    ids=["vocabulary", "special tokens", "truncation side", "normaliser"],
)
def test_the_key_changes_with_the_content_of_a_tokenizer_of_the_same_name(change):
    rows, towers = ImageTextDataset(tiny_rows(6)), encoder()
    other = SplitEncoder(towers.model, other_tokenizer(change))
    assert cache_key(other, rows) != cache_key(towers, rows)
    same = SplitEncoder(towers.model, other_tokenizer(lambda tokenizer: None))
    assert cache_key(same, rows) == cache_key(towers, rows)


def test_the_key_does_not_depend_on_what_was_tokenised_before():
    rows, towers = ImageTextDataset(tiny_rows(6)), encoder()
    before = cache_key(towers, rows)
    towers.collate([{"caption": "a red disc"}])
    assert cache_key(towers, rows) == before


def test_the_key_changes_with_the_processor_the_configuration_and_the_code(monkeypatch):
    rows, towers = ImageTextDataset(tiny_rows(6)), encoder()
    key = cache_key(towers, rows)
    processor = tiny_processor()
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    assert cache_key(SplitEncoder(towers.model, PicoCollator(processor)), rows) != key
    monkeypatch.setattr(towers.model.encoder.config.text_config, "hidden_act", "relu")
    assert cache_key(towers, rows) != key
    monkeypatch.undo()
    monkeypatch.setattr(feature_cache, "_code", lambda: "another version")
    assert cache_key(towers, rows) != key


def test_two_processes_that_ask_at_once_compute_once_and_agree(tmp_path):
    script = """
import sys
from pathlib import Path
from test_feature_cache import ImageTextDataset, cache_token_features, encoder, tiny_rows

cached = cache_token_features(encoder(), ImageTextDataset(tiny_rows(6)), Path(sys.argv[1]))
print(sum(float(row["image_hidden_states"].sum()) for row in cached.images()))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert len(cache_entries(tmp_path)) == 1


def test_what_a_killed_process_left_is_cleared(tmp_path):
    towers, rows = encoder(), ImageTextDataset(tiny_rows(6))
    left = tmp_path / f"{cache_key(towers, rows)}.partial" / "images"
    left.mkdir(parents=True)
    (left / "tokens.f16").write_bytes(b"half")
    cached = cache_token_features(towers, rows, tmp_path)
    assert len(cached.images()) == 6
    assert not left.exists()


def test_the_command_lists_and_clears_what_is_cached(tmp_path):
    towers = encoder()
    for images in (6, 7):
        cache_token_features(towers, ImageTextDataset(tiny_rows(images)), tmp_path)
    entries = cache_entries(tmp_path)
    assert [(e.encoder, e.images, e.captions) for e in entries] == [
        ("clip", 7, 14),
        ("clip", 6, 12),
    ]
    files = [file for file in (tmp_path / entries[0].key).rglob("*") if file.is_file()]
    assert entries[0].size == sum(file.stat().st_size for file in files)
    listed = done("cache", tmp_path)
    assert f"{entries[0].key}" in listed
    assert "2 entries in" in listed
    assert [(e["images"], e["captions"]) for e in read("cache", tmp_path)["entries"]] == [
        (7, 14),
        (6, 12),
    ]
    done("cache", tmp_path, "--clear", entries[0].key)
    assert [entry.images for entry in cache_entries(tmp_path)] == [6]
    assert "`key` must name an entry of" in refused("cache", tmp_path, "--clear", "nothing")
    done("cache", tmp_path, "--clear", "all")
    assert cache_entries(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_runs_share_a_cache_unless_told_otherwise(make_trainer, monkeypatch, tmp_path):
    make_trainer(freeze_encoder=True)
    shared = cache_entries(default_cache_dir())
    assert len(shared) == 2  # training and dev split
    computed = []
    monkeypatch.setattr(feature_cache, "_write", lambda *args: computed.append(args))
    make_trainer(freeze_encoder=True, folder="another run")
    assert not computed
    assert cache_entries(default_cache_dir()) == shared


def test_states_that_are_no_numbers_leave_nothing_behind(tmp_path):
    towers = encoder()
    with torch.no_grad():
        towers.model.encoder.text_model.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="hidden states contain NaN"):
        cache_token_features(towers, ImageTextDataset(tiny_rows(6)), tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
