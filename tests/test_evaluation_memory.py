"""Memory of an evaluation: the features of a split once, and little beside them."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import torch
from torch.utils.data import Dataset
from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from pico_hf.training.encoding import SplitEncoder
from pico_hf.training.evaluation import evaluate_retrieval

torch.set_num_threads(1)
IMAGES, PATCHES, COLUMNS, LIMIT = 320, 800, 256, float(sys.argv[1])

class Rows(Dataset):
    def __init__(self, tokens):
        self.tokens = tokens
    def __len__(self):
        return IMAGES
    def __getitem__(self, row):
        return self.tokens

class Split:
    image_order = caption_order = ordered_text_to_image = image_ids = torch.arange(IMAGES)
    gallery = torch.zeros(IMAGES, dtype=torch.long)
    def in_order(self):
        return Rows(PATCHES), Rows(5)

class Model:
    device, training = torch.device("cpu"), False
    def train(self, mode=True): pass
    def eval(self): pass
    def score(self, images, texts, weights, pooled_share):
        return similarity(images, texts, weights)

def encode(model, batch):
    features = torch.randn(len(batch), batch[0], COLUMNS)
    tokens = TokenFeatures(features, torch.ones(features.shape[:2], dtype=torch.bool))
    return (tokens, None) if batch[0] == PATCHES else (None, tokens)

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

encoder = SplitEncoder(Model(), list, batch_size=8, disable_tqdm=True, max_bytes=LIMIT)
similarity(*(TokenFeatures(torch.randn(2, 3, 4), torch.ones(2, 3).bool()) for _ in "it"))
before = peak()
split = encoder.split(Split(), encode=encode)
found = evaluate_retrieval(Model(), split)
print(json.dumps([peak() - before, 4 * IMAGES * (PATCHES + 5) * COLUMNS, found["rsum"]]))
"""


def run(max_bytes: float) -> list[float]:
    """Peak above the start, bytes of the features, rSum.

    A fixed threshold makes glibc give freed pieces back; by its own moving one it keeps some of
    them, more or less by chance, and what is alive would not show.
    """
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(max_bytes)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_an_evaluation_peaks_at_thirteen_tenths_of_its_features():
    peak, features, _ = run(float("inf"))
    assert peak <= 1.3 * features, f"{peak / features:.2f}"


@pytest.mark.slow
def test_a_split_on_disk_is_scored_as_one_in_memory_with_less_of_it():
    """Pages of the file count as resident while they are read, but can be dropped at any time."""
    in_memory, on_disk = run(float("inf")), run(1e7)
    assert 0 <= in_memory[2] <= 600
    assert 0 <= on_disk[2] <= 600
    assert on_disk[0] <= 1.3 * on_disk[1]
