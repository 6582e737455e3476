"""What a router has to decide, in plain Python over NumPy arrays."""

import math

import numpy as np


def route(logits, top_k, *, mask=None, noised=None, rest=False, factor=None, least=0, keys=None):
    """expert_ids [N, K], rows [N * K], slots [N, K] and cu_seqlens [E + 1].

    logits: float32 [N, E]; noised: the same with noise, which ranks all choices, or with `rest` all
    but the first; keys: [N, K], which decide among choices of equal rank in the place of position.
    """
    n, experts = logits.shape
    real = np.ones(n, bool) if mask is None else mask
    ids = np.full((n, top_k), -1)
    for t in np.flatnonzero(real):
        order = ranked(logits[t] if noised is None else noised[t])
        if rest:
            first = ranked(logits[t])[0]
            order = [first, *(e for e in order if e != first)]
        ids[t] = order[:top_k]
    room = n
    if factor is not None:
        room = max(math.ceil(int(real.sum()) / experts * factor), least)
    rows, slots, ends = np.full(n * top_k, -1), np.full((n, top_k), -1), [0]
    for e in range(experts):
        queue = [
            (j, t if keys is None else keys[t, j], t)
            for t in range(n)
            for j in range(top_k)
            if ids[t, j] == e
        ]
        kept = sorted(sorted(queue)[:room], key=lambda c: (c[0], c[2]))
        for place, (j, _, t) in enumerate(kept, ends[-1]):
            rows[place], slots[t, j] = t * top_k + j, place
        ends.append(ends[-1] + len(kept))
    return ids, rows, slots, np.array(ends)


def ranked(values):
    """Experts by falling number, equals by id, NaN behind all numbers."""
    return sorted(range(len(values)), key=lambda e: (bool(np.isnan(values[e])), -values[e], e))
