"""Learning-rate schedules as pure functions: where training stands -> factor of the peak rate.

Progress and durations are in one unit of the caller's choice: steps, sequences or tokens.
"""

from __future__ import annotations

import math


def linear_schedule(now: float, warmup: float, total: float, *, final: float = 0.0) -> float:
    """Linear from 0 to 1, then linear from 1 to ``final`` at ``total``.

    Args:
        now: progress, >= 0; past ``total`` the factor stays at ``final``.
        warmup: duration of the rise.
        total: duration of everything.
        final: factor at ``total``.

    Returns:
        The factor of the learning rate.

    Raises:
        ValueError: if the rise does not fit into the whole.

    Examples:
        >>> from encfast.schedules import linear_schedule
        >>> [linear_schedule(step, 2, 6) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if not 0 <= warmup < total:
        raise ValueError(f"warmup must be in [0, total), got {warmup} of {total}")
    return wsd_schedule(now, warmup, total, total - warmup, final=final)


def wsd_schedule(
    now: float, warmup: float, total: float, decay: float, *, final: float = 0.0
) -> float:
    """Warmup, stable, decay: linear from 0 to 1, constant, linear from 1 to ``final`` at ``total``.

    Args:
        now: progress, >= 0; past ``total`` the factor stays.
        warmup: duration of the rise.
        total: duration of everything.
        decay: duration of the fall; 0: none.
        final: factor at ``total``, if there is a fall.

    Returns:
        The factor of the learning rate.

    Raises:
        ValueError: if the three durations do not fit into each other.

    Examples:
        >>> from encfast.schedules import wsd_schedule
        >>> [wsd_schedule(step, 2, 6, 2) for step in range(7)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    if min(warmup, decay) < 0 or warmup + decay > total:
        raise ValueError(
            f"warmup and decay must be >= 0 and fit into total, got {warmup}, {decay} and {total}"
        )
    if now < warmup:
        return now / warmup
    start = total - decay
    if decay == 0 or now <= start:
        return 1.0
    return 1.0 - (1.0 - final) * min((now - start) / decay, 1.0)


def cosine_schedule(now: float, warmup: float, total: float, *, final: float = 0.0) -> float:
    """Linear from 0 to 1, then half a cosine from 1 to ``final`` at ``total``.

    Source: Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts.

    Args:
        now: progress, >= 0; past ``total`` the factor stays at ``final``.
        warmup: duration of the rise.
        total: duration of everything.
        final: factor at ``total``.

    Returns:
        The factor of the learning rate.

    Raises:
        ValueError: if the rise does not fit into the whole.

    Examples:
        >>> from encfast.schedules import cosine_schedule
        >>> [round(cosine_schedule(step, 2, 6), 3) for step in range(7)]
        [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if not 0 <= warmup < total:
        raise ValueError(f"warmup must be in [0, total), got {warmup} of {total}")
    if now < warmup:
        return now / warmup
    done = min((now - warmup) / (total - warmup), 1.0)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))


def one_minus_sqrt(now: float, total: float, *, final: float = 0.0) -> float:
    """From 1 to ``final`` along 1 - sqrt(now / total) (Hägele et al. 2024, arXiv 2405.18392).

    Args:
        now: progress, >= 0; past ``total`` the factor stays at ``final``.
        total: duration, > 0.
        final: factor at ``total``.

    Returns:
        The factor of the learning rate.

    Raises:
        ValueError: if ``total`` is not positive.
    """
    if total <= 0:
        raise ValueError(f"total must be > 0, got {total}")
    return 1.0 - (1.0 - final) * math.sqrt(min(now / total, 1.0))
