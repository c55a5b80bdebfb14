"""Consolidation: how much of an update is taken over into the model that all tasks share.

Formula, per matrix, with the update `D = W_t - W~_{t-1} = U diag(sigma) V^T`:

    W~_t = W~_{t-1} + U diag(c sigma) V^T,    c = k * rate(sigma)

- The one number k calibrates the strength: with `match="fro"` the Frobenius norm of what is added is exactly
  `strength` times that of D, whatever the rate. Without calibration, rates differ mostly in their total strength and
  a comparison of them says nothing about directions. `match="none"` sets k = strength.
- With `cap`, `c = min(k * rate, cap)` and k is found by bisection, so that the norm still matches.
- Strength 0 adds exactly nothing; `uniform` at strength 1 returns D itself.
- `granularity` says over which matrices k and the statistics of the rate (largest value, median, ...) are taken: each
  matrix by itself, all of one layer type, or all of them. The wider, the more the relative strength between matrices
  counts.

Notation used for tensor shapes: sigma, c `(rank,)`; see `mllm_cl.spectral`.

References: Eq. 4 and 5 of LLaVA-c (arXiv 2506.08666) for `uniform` and the form U g(Sigma) V^T. Calibration: ours.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import SpectralError, suggest
from ._checks import check_range
from .low_rank import LowRankDelta, spectrum_norm
from .rates import find_rate

logger = logging.getLogger(__name__)

GRANULARITIES = ("matrix", "layer_type", "global")
MATCHES = ("none", "fro", "nuclear", "spectral")
SCHEDULES = ("constant", "inverse", "inverse_sqrt")

_BISECTIONS = 200  # an upper limit; it stops when the bracket is as narrow as float64 allows


@torch.no_grad()
def consolidate(
    delta: LowRankDelta,
    rate: str | Callable[[Tensor], Tensor] = "power_up",
    *,
    strength: float = 0.5,
    match: str = "fro",
    cap: float | None = None,
    previous: LowRankDelta | None = None,
    scale: Tensor | None = None,
    **options: float | str | None,
) -> LowRankDelta:
    """Returns the part of one update that is to be taken over: `U diag(c sigma) V^T`, formula in the module docstring.

    Args:
        delta (`LowRankDelta`): what training the task changed.
        rate (`str` or callable, *optional*, defaults to `"power_up"`): a name in `RATES`, or a function that maps the
            singular values `(rank,)`, float64, to as many numbers >= 0.
        strength (`float`, *optional*, defaults to `0.5`): share of the norm of `delta` that is kept.
        match (`str`, *optional*, defaults to `"fro"`): norm that is matched: `fro`, `nuclear`, `spectral`, or `none`.
        cap (`float`, *optional*): upper limit of c; 1 means that no direction is exaggerated.
        previous (`LowRankDelta`, *optional*): what earlier tasks became; read by the rate `overlap` only.
        scale (`Tensor`, *optional*): singular values of all matrices that share one scale, from which the statistics of
            the named rate and k are taken; those of `delta` when omitted.
        options: parameters of the named rate, such as `gamma`; see `mllm_cl.spectral.rates`.

    Shapes:
        scale `(n,)`

    Raises:
        `SpectralError`: if a name, an option or a number is not as described.

    References: see the module.

    Example:

    ```python
    >>> delta = LowRankDelta.from_dense(torch.diag(torch.tensor([4.0, 2.0])))
    >>> [round(s, 3) for s in consolidate(delta, "uniform", strength=0.5).singular_values().tolist()]
    [2.0, 1.0]
    >>> [round(s, 3) for s in consolidate(delta, "power_up", strength=0.5).singular_values().tolist()]
    [2.169, 0.542]

    ```
    """
    _check_settings(strength, match, cap)
    if scale is None:
        raw = _raw_rate(rate, options, delta.sigma, delta=delta, previous=previous)
        return _apply(delta, _calibrated(delta.sigma, raw, strength, match, cap))
    if not isinstance(rate, str) or rate == "overlap":
        raise SpectralError(
            f"`scale` was given together with the rate {rate!r}.",
            expected="a named rate other than 'overlap': its statistics can come from another spectrum.",
            fix="use consolidate_many with the granularity you want.",
        )
    shared = scale.detach().double().flatten()
    factor = _factor(shared, _raw_rate(rate, options, shared), strength, match, cap)
    return _apply(delta, _limited(_raw_rate(rate, options, delta.sigma, scale=shared) * factor, cap))


@torch.no_grad()
def consolidate_many(
    deltas: Mapping[str, LowRankDelta],
    rate: str | Callable[[Tensor], Tensor] = "power_up",
    *,
    strength: float = 0.5,
    match: str = "fro",
    cap: float | None = None,
    previous: Mapping[str, LowRankDelta] | None = None,
    granularity: str = "matrix",
    **options: float | str | None,
) -> dict[str, LowRankDelta]:
    """Consolidates the updates of many matrices; see `consolidate` for what the arguments mean.

    With granularity `matrix` each entry of `deltas` is read once and may be computed when it is read; the others read
    every entry twice.

    Args:
        deltas (`Mapping[str, LowRankDelta]`): update per matrix, by the name of its module.
        previous (`Mapping[str, LowRankDelta]`, *optional*): consolidated update per matrix, under the same names.
        granularity (`str`, *optional*, defaults to `"matrix"`): `matrix`, `layer_type` (names that differ in numbers
            only) or `global`; a function as rate then gets the singular values of all these matrices at once.
        rate, strength, match, cap, options: see `consolidate`.

    Raises:
        `SpectralError`: as `consolidate`, if `granularity` is unknown, or if `previous` lacks a name.

    Example:

    ```python
    >>> deltas = {f"layers.{i}.q_proj": LowRankDelta.from_dense(torch.eye(2) * s) for i, s in enumerate([3.0, 1.0])}
    >>> for granularity in ("matrix", "global"):
    ...     done = consolidate_many(deltas, strength=0.5, granularity=granularity)
    ...     print([round(d.norm("spectral"), 3) for d in done.values()])
    [1.5, 0.5]
    [1.571, 0.175]

    ```
    """
    _check_settings(strength, match, cap)
    if granularity not in GRANULARITIES:
        raise SpectralError(
            f"granularity {granularity!r} is unknown.",
            expected=", ".join(GRANULARITIES),
            fix=suggest(granularity, GRANULARITIES),
        )
    before = previous if rate == "overlap" and previous is not None else {}  # no other rate reads it
    missing = [name for name in deltas if before and name not in before]
    if missing:
        raise SpectralError(
            f"`previous` has no entry for {missing[0]!r} ({len(missing)} missing).",
            expected="one entry per update; LowRankDelta.zeros(out, in) before the second task.",
        )

    if granularity == "matrix":
        done: dict[str, LowRankDelta] = {}
        for name, delta in deltas.items():
            raw = _raw_rate(rate, options, delta.sigma, delta=delta, previous=before.get(name))
            done[name] = _apply(delta, _calibrated(delta.sigma, raw, strength, match, cap))
        return done

    sigmas: dict[str, Tensor] = {}
    overlaps: dict[str, Tensor] = {}
    groups: dict[str, list[str]] = {}
    for name, delta in deltas.items():
        groups.setdefault("" if granularity == "global" else layer_type(name), []).append(name)
        sigmas[name] = delta.sigma
        if rate == "overlap":
            overlaps[name] = _raw_rate(rate, options, delta.sigma, delta=delta, previous=before.get(name))
    rates: dict[str, Tensor] = {}
    for names in groups.values():
        shared = torch.cat([sigmas[name] for name in names])  # (rank_1,), (rank_2,), ... -> (sum of ranks,)
        raw = torch.cat([overlaps[name] for name in names]) if overlaps else _raw_rate(rate, options, shared)
        calibrated = _calibrated(shared, raw, strength, match, cap)
        rates.update(zip(names, calibrated.split([len(sigmas[name]) for name in names]), strict=True))
    return {name: _apply(deltas[name], rates[name]) for name in deltas}


@torch.no_grad()
def consolidate_vector(change: Tensor, strength: float = 0.5) -> Tensor:
    """Returns `strength * change`, for what has no spectrum: norms, biases, and by choice embeddings.

    Args:
        change (`Tensor`): difference after and before the task, of any shape.
        strength (`float`, *optional*, defaults to `0.5`): share to keep; 0 gives zeros, 1 gives `change` itself.

    Raises:
        `SpectralError`: if `strength` is negative or not finite.

    Example:

    ```python
    >>> consolidate_vector(torch.tensor([2.0, -4.0])).tolist()
    [1.0, -2.0]

    ```
    """
    check_range("strength", strength, 0)
    if strength == 1:
        return change
    return torch.zeros_like(change) if strength == 0 else change * strength


def strength_at(strength: float, schedule: str, stage: int) -> float:
    """Returns the strength at a stage: `constant`, `inverse` strength / t, `inverse_sqrt` strength / sqrt(t).

    `inverse` with strength 1 is the running mean of the models of all tasks.

    Args:
        strength (`float`): strength at the first task.
        schedule (`str`): one of `SCHEDULES`.
        stage (`int`): the task just trained, from 1.

    Raises:
        `SpectralError`: if the schedule is unknown, or `stage` is below 1.

    Example:

    ```python
    >>> [strength_at(1.0, "inverse", stage) for stage in (1, 2, 4)]
    [1.0, 0.5, 0.25]

    ```
    """
    check_range("strength", strength, 0)
    check_range("stage", stage, 1)
    if schedule not in SCHEDULES:
        raise SpectralError(
            f"schedule {schedule!r} is unknown.", expected=", ".join(SCHEDULES), fix=suggest(schedule, SCHEDULES)
        )
    return strength / {"constant": 1.0, "inverse": float(stage), "inverse_sqrt": math.sqrt(stage)}[schedule]


def layer_type(name: str) -> str:
    """Returns the name with its numbers replaced by `*`: equal for the same kind of matrix in every layer.

    Example:

    ```python
    >>> layer_type("model.layers.12.self_attn.q_proj")
    'model.layers.*.self_attn.q_proj'

    ```
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _check_settings(strength: float, match: str, cap: float | None) -> None:
    check_range("strength", strength, 0)
    if match not in MATCHES:
        raise SpectralError(f"match {match!r} is unknown.", expected=", ".join(MATCHES), fix=suggest(match, MATCHES))
    if cap is None:
        return
    check_range("cap", cap, 0, open_low=True)
    if match != "none" and strength > cap:
        raise SpectralError(
            f"strength {strength} cannot be reached when no rate may exceed cap {cap}.",
            expected="a strength of at most the cap.",
            fix="lower `strength`, raise `cap`, or set match='none'.",
        )


def _raw_rate(
    rate: str | Callable[[Tensor], Tensor],
    options: dict[str, float | str | None],
    sigma: Tensor,
    *,
    scale: Tensor | None = None,
    delta: LowRankDelta | None = None,
    previous: LowRankDelta | None = None,
) -> Tensor:
    """The rate before calibration, checked: `(rank,)` float64, finite, >= 0."""
    if not isinstance(rate, str):
        if options:
            raise SpectralError(
                f"options {', '.join(sorted(options))} were given together with a function.",
                expected="options with named rates only.",
                fix="bind them with functools.partial.",
            )
        c = rate(sigma.clone())  # a copy, as it might be changed in place
    elif rate == "overlap":
        compute = find_rate(rate, options)
        if previous is None:
            raise SpectralError(
                "rate 'overlap' needs `previous`, the update that earlier tasks were consolidated into.",
                expected="a LowRankDelta.",
                fix="give LowRankDelta.zeros(out, in) before the second task.",
            )
        c = compute(sigma, delta=delta, previous=previous, **options)
    else:
        c = find_rate(rate, options)(sigma, scale=scale, **options)
    if not isinstance(c, Tensor) or c.shape != sigma.shape or not bool((torch.isfinite(c) & (c >= 0)).all()):
        raise SpectralError(
            f"rate {rate!r} did not return usable numbers.",
            expected=f"a tensor of {sigma.numel()} finite numbers >= 0.",
            fix="return one rate per singular value; 0 drops a direction.",
        )
    return c.to(sigma)


def _calibrated(sigma: Tensor, raw: Tensor, strength: float, match: str, cap: float | None) -> Tensor:
    """The final c `(rank,)` of the singular values from which the calibration itself is taken."""
    return _limited(raw * _factor(sigma, raw, strength, match, cap), cap)


def _limited(c: Tensor, cap: float | None) -> Tensor:
    return c if cap is None else c.clamp(max=cap)


def _factor(sigma: Tensor, raw: Tensor, strength: float, match: str, cap: float | None) -> float:
    """The number k with `norm(min(k raw, cap) sigma) = strength * norm(sigma)`."""
    if match == "none" or strength == 0 or sigma.numel() == 0:
        return strength
    whole, kept = spectrum_norm(sigma, match), spectrum_norm(raw * sigma, match)
    if kept == 0:
        logger.warning("The rate is 0 for every direction of an update: nothing of this task is taken over from it.")
        return strength
    factor = strength * (whole / kept)  # in this order, so that rate 1 gives the strength to the bit
    if cap is None or float(raw.max()) * factor <= cap:
        return factor
    target = strength * whole

    def reached(k: float) -> float:
        return spectrum_norm(_limited(raw * k, cap) * sigma, match)

    low, high = factor, cap / float(raw[raw > 0].min())  # at `high` every direction that counts is at the cap
    if reached(high) < target * (1 - 1e-12):
        logger.warning(
            "With cap %s the rate keeps %.3g of the %s norm of an update, not the strength %s that was asked for: "
            "this task is learnt more weakly, although its training loss looks healthy.",
            cap, reached(high) / whole, match, strength,
        )  # fmt: skip
        return high
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)  # the bracket can span many orders of magnitude
        if not low < middle < high:
            break
        low, high = (middle, high) if reached(middle) < target else (low, middle)
    return high


def _apply(delta: LowRankDelta, c: Tensor) -> LowRankDelta:
    return delta.with_sigma(delta.sigma * c)
