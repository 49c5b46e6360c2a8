"""The equations as plain loops: slow, obvious, and independent of the package's own code."""

import torch


def similarity_loop(images, texts, column_weights=None):
    """S[i, t] = mean_p max_w s + mean_w max_p s, one pair of real tokens at a time."""
    width = images.features.shape[2]
    weights = torch.ones(width).to(images.features) if column_weights is None else column_weights
    rows = []
    for patches, patch_mask in zip(images.features, images.mask, strict=True):
        row = []
        for words, word_mask in zip(texts.features, texts.mask, strict=True):
            s = [[(weights * p * w).sum() for w in words[word_mask]] for p in patches[patch_mask]]
            best_word = [torch.stack(list(line)).max() for line in s]
            best_patch = [torch.stack(list(line)).max() for line in zip(*s, strict=True)]
            row.append(sum(best_word) / len(best_word) + sum(best_patch) / len(best_patch))
        rows.append(torch.stack(row))
    return torch.stack(rows)
