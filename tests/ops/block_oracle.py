"""Block selection written out element by element in plain Python."""

from __future__ import annotations

import math


def visible(row_block, block, queries, keys, offset):
    """(seen, forced): key blocks that some row sees, and those always kept."""
    first = row_block * block + offset
    last = min(first + block, queries + offset) - 1
    seen = [j for j in range(-(-keys // block)) if j * block <= last]
    return seen, {j for j in seen if j == 0 or (j + 1) * block > first}


def score(q, k, rows, columns, real_row, real_key, scale, softcap):
    """One element of the strided map: rows from the last, columns from the first."""
    total = 0.0
    for row, column in zip(reversed(rows), columns, strict=True):
        if real_row(row) and real_key(column):
            total += sum(x * y for x, y in zip(q[row], k[column], strict=True))
    total *= scale / len(rows)
    return softcap * math.tanh(total / softcap) if softcap else total


def antidiagonal(q, k, shown, offset, stride, threshold, scale, softcap=0.0):
    """Kept key blocks of each row block of one head; lists of lists of numbers in."""
    queries, keys, kept = len(q), len(k), []

    def real_key(key):
        return key < keys and shown[key]

    def real_row(row):
        return row < queries and (all(shown) or real_key(row + offset))

    for row_block in range(-(-queries // 128)):
        seen, forced = visible(row_block, 128, queries, keys, offset)
        mass = dict.fromkeys(seen, 0.0)
        for start in range(row_block * 128, (row_block + 1) * 128, stride):
            rows = range(start, start + stride)
            if not any(map(real_row, rows)):
                continue
            last = min(start + stride, queries) - 1 + offset
            scores = {}
            for first in range(0, min(last + 1, keys), stride):
                columns = range(first, first + stride)
                if any(map(real_key, columns)):
                    scores[first] = score(
                        q, k, rows, columns, real_row, real_key, scale, softcap
                    )
            top = max(scores.values(), default=0.0)
            weights = {j: math.exp(s - top) for j, s in scores.items()}
            for first, weight in weights.items():
                mass[first // 128] += weight / sum(weights.values())
        chosen, total = set(forced), sum(mass.values())
        for block in sorted(seen, key=lambda j: (-mass[j], j)):
            if sum(mass[j] for j in chosen) >= threshold * total:
                break
            chosen.add(block)
        kept.append(sorted(chosen))
    return kept


def block_sparse(q, k, shown, offset, blocks, scale):
    """The same for a block-sparse head."""
    queries, keys, kept = len(q), len(k), []

    def mean(values, places):
        rows = [values[i] for i in places]
        return [sum(c) / len(rows) for c in zip(*rows, strict=True)] if rows else None

    def real_row(row):
        return all(shown) or (row + offset < keys and shown[row + offset])

    key_means = [
        mean(k, [i for i in range(j, min(j + 64, keys)) if shown[i]])
        for j in range(0, keys, 64)
    ]
    for row_block in range(-(-queries // 64)):
        seen, forced = visible(row_block, 64, queries, keys, offset)
        end = min((row_block + 1) * 64, queries)
        own = mean(q, [i for i in range(row_block * 64, end) if real_row(i)])
        worth = {}
        for j in seen:
            if j not in forced and key_means[j]:
                pairs = zip(own or [0.0] * len(key_means[j]), key_means[j], strict=True)
                worth[j] = scale * sum(x * y for x, y in pairs)
        best = sorted(worth, key=lambda j: (-worth[j], j))
        kept.append(sorted(forced | set(best[: max(blocks - len(forced), 0)])))
    return kept
