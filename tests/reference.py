"""The equations as plain loops: slow, obvious, and independent of the package's own code."""

import math

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


def pseudo_semantic_probability_loop(images, texts):
    """Share of positive products V[p,d]·T[w,d] over all patches, words and matched pairs."""
    positive, total = 0, 0
    for pair in range(len(images.mask)):
        for patch in images.features[pair][images.mask[pair]]:
            for word in texts.features[pair][texts.mask[pair]]:
                positive = positive + (patch.double() * word.double() > 0).long()
                total += 1
    return positive / total


def column_means_loop(tokens):
    """c_d[r]: mean of column d over the real tokens of row r, (columns, rows)."""
    rows = zip(tokens.features, tokens.mask, strict=True)
    means = [[sum(column.tolist()) / mask.sum() for column in row[mask].T] for row, mask in rows]
    return torch.tensor(means).T


def semantic_probability_loop(image_columns, text_columns, image_prototypes, text_prototypes):
    """p_d = 1 - ½(q_d^v + q_d^t), q the min-max over columns of max_k cos(c_d - mean, μ_k)."""
    styles = []
    for columns, prototypes in ((image_columns, image_prototypes), (text_columns, text_prototypes)):
        nearest = []
        for column in columns.double():
            centred = column - column.mean()
            cosines = [
                float(centred @ prototype / (centred.norm() * prototype.norm()))
                for prototype in prototypes.double()
            ]
            nearest.append(max(cosines))
        low, high = min(nearest), max(nearest)
        styles.append([(value - low) / (high - low) for value in nearest])
    return torch.tensor([1 - (v + t) / 2 for v, t in zip(*styles, strict=True)])


def hinge_loop(scores, image_ids, margin, ramp=None):
    """All negatives scaled by `ramp`, or the hardest negative of each row and each column."""
    s, n = scores.tolist(), len(scores)
    others = [[j for j in range(n) if image_ids[j] != image_ids[i]] for i in range(n)]
    total = 0.0
    for i in range(n):
        by_row = [max(0.0, margin + s[i][j] - s[i][i]) for j in others[i]]
        by_column = [max(0.0, margin + s[j][i] - s[i][i]) for j in others[i]]
        for costs in (by_row, by_column):
            total += max(costs, default=0.0) if ramp is None else ramp * sum(costs)
    return total


def info_nce_loop(logits, image_ids):
    """Mean over both directions of -log(e^own / Σ e^(own and negatives))."""
    s, n = logits.tolist(), len(logits)
    total = 0.0
    for i in range(n):
        kept = [j for j in range(n) if j == i or image_ids[j] != image_ids[i]]
        total -= math.log(math.exp(s[i][i]) / sum(math.exp(s[i][j]) for j in kept))
        total -= math.log(math.exp(s[i][i]) / sum(math.exp(s[j][i]) for j in kept))
    return total / (2 * n)


def sigmoid_loop(logits, image_ids):
    """Σ log(1 + e^(-z·logit)) / n with z = 1 for matched pairs and -1 for negatives."""
    s, n = logits.tolist(), len(logits)
    total = 0.0
    for i in range(n):
        for j in range(n):
            if i == j or image_ids[i] != image_ids[j]:
                total += math.log(1 + math.exp(-s[i][j] if i == j else s[i][j]))
    return total / n


def ranks_loop(scores, text_to_image):
    """(image → text, text → image) ranks from 1; who ties with the match stands before it."""
    images, texts = scores.shape
    by_image = []
    for i in range(images):
        own = [t for t in range(texts) if text_to_image[t] == i]
        others = [t for t in range(texts) if text_to_image[t] != i]
        ranks = [1 + sum(bool(scores[i, o] >= scores[i, t]) for o in others) for t in own]
        by_image.append(min(ranks))
    by_text = [
        1 + sum(bool(scores[j, t] >= scores[i, t]) for j in range(images) if j != i)
        for t, i in enumerate(text_to_image.tolist())
    ]
    return by_image, by_text


def identity_ranks_loop(scores, text_to_image, image_ids):
    """As `ranks_loop`, where images of one identity share captions and do not compete."""
    images, texts = range(scores.shape[0]), range(scores.shape[1])
    thing = [int(image_ids[i]) for i in text_to_image.tolist()]
    by_image, by_text = [], []
    for i in images:
        best = max(float(scores[i, t]) for t in texts if thing[t] == image_ids[i])
        others = [t for t in texts if thing[t] != image_ids[i]]
        by_image.append(1 + sum(float(scores[i, t]) >= best for t in others))
    for t in texts:
        best = max(float(scores[i, t]) for i in images if image_ids[i] == thing[t])
        others = [i for i in images if image_ids[i] != thing[t]]
        by_text.append(1 + sum(float(scores[i, t]) >= best for i in others))
    return by_image, by_text


def column_parts_loop(patches, words, weights):
    """What each column adds to S of one pair: the products that won, one column at a time."""
    v, t, w = patches.tolist(), words.tolist(), weights.tolist()
    columns = range(len(w))

    def product(p, q):
        return sum(w[d] * v[p][d] * t[q][d] for d in columns)

    parts = [0.0 for _ in columns]
    for p in range(len(v)):
        best = max(range(len(t)), key=lambda q, p=p: product(p, q))
        parts = [parts[d] + w[d] * v[p][d] * t[best][d] / len(v) for d in columns]
    for q in range(len(t)):
        best = max(range(len(v)), key=lambda p, q=q: product(p, q))
        parts = [parts[d] + w[d] * v[best][d] * t[q][d] / len(t) for d in columns]
    return torch.tensor(parts, dtype=torch.float64)


def match_ranks_loop(scores, matches):
    """Ranks of each row's matches from 1, best first; who ties with a match stands before it."""
    rows = []
    for values, wanted in zip(scores.tolist(), matches.tolist(), strict=True):
        # Of equal scores the others come first.
        order = sorted(range(len(values)), key=lambda t: (-values[t], wanted[t]))
        rows.append([place for place, t in enumerate(order, start=1) if wanted[t]])
    return rows


def weighted_cosines_loop(queries, targets, weights):
    """S of two sets of tokens, every product taken by itself and divided by weighted lengths."""

    def product(a, b):
        return sum(float(w) * float(x) * float(y) for w, x, y in zip(weights, a, b, strict=True))

    def real(tokens, item):
        return [t for t, kept in zip(tokens.features[item], tokens.mask[item], strict=True) if kept]

    scores = torch.zeros(len(queries), len(targets))
    for i in range(len(queries)):
        for j in range(len(targets)):
            first, second = real(queries, i), real(targets, j)
            table = [
                [product(a, b) / math.sqrt(product(a, a) * product(b, b)) for b in second]
                for a in first
            ]
            by_first = sum(max(row) for row in table) / len(first)
            by_second = sum(max(row[k] for row in table) for k in range(len(second)))
            scores[i, j] = by_first + by_second / len(second)
    return scores
