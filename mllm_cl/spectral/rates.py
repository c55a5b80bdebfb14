"""The named rates: how much of each singular direction of an update is taken over.

A rate maps the singular values of one update to one number `c >= 0` each, before calibration. Formulas, with sigma_1
the largest singular value and tau a noise level:

    uniform         1                                       the plain average of two models (ModelMix)
    power_up        (sigma / sigma_1)^gamma                 keeps strong directions, shrinks weak ones
    power_down      min((mean / sigma)^gamma, ceiling)      the reverse: a flatter spectrum
    wiener          sigma^2 / (sigma^2 + tau^2)             minimiser of (1 - c)^2 sigma^2 + c^2 tau^2
    energy_cut      1 for the leading directions, else low
    soft_threshold  max(1 - tau / sigma, 0)                 proximal step of the nuclear norm
    saturate        (s / sigma) tanh(sigma / s)             shrinks large directions only; s = factor * mean
    rank_linear     linear in the cumulative energy, from `first` to `last`
    overlap         1 - |P_U u| |P_V v|                     spares the directions of earlier tasks

- The strength (`alpha` of the literature) is no parameter here: `consolidate` multiplies by it, for every rate alike.
- `sigma_1`, means, medians, quantiles and energies are those of `scale`, which is the spectrum itself unless several
  matrices share one (granularity "layer_type" or "global"); zeros in it are not counted.
- c depends on the value of sigma and not on its place in the list, so that repeated singular values, whose vectors are
  arbitrary, get the same rate. Values within a relative 1e-6 count as repeated.

Notation used for tensor shapes: sigma `(rank,)`, in any order; scale `(n,)`; c `(rank,)`, float64.

References: LLaVA-c (arXiv 2506.08666) for the family; STAR, OPCM and Iso-C for single members.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import SpectralError, suggest
from ._checks import check_range
from .low_rank import LowRankDelta

_TIE = 1e-6


def uniform(sigma: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """Returns 1 for every direction: with strength alpha, `W~_t = (1 - alpha) W~_{t-1} + alpha W_t`.

    Example:

    ```python
    >>> uniform(torch.tensor([2.0, 1.0])).tolist()
    [1.0, 1.0]

    ```
    """
    return torch.ones_like(sigma, dtype=torch.float64)


def power_up(sigma: Tensor, *, scale: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    """Returns `(sigma / sigma_1)^gamma`; gamma 0 is `uniform`, and the eigenvalue form (`sigma^2`) doubles gamma.

    Example:

    ```python
    >>> power_up(torch.tensor([4.0, 1.0]), gamma=0.5).tolist()
    [1.0, 0.5]

    ```
    """
    check_range("power_up: gamma", gamma, 0)
    reference = _reference(sigma, scale)
    return (sigma.double() / reference[0]) ** gamma if reference.numel() else uniform(sigma)


def power_down(sigma: Tensor, *, scale: Tensor | None = None, gamma: float = 0.5, ceiling: float = 10.0) -> Tensor:
    """Returns `min((mean sigma / sigma)^gamma, ceiling)`; gamma 1 with a high ceiling makes all singular values equal.

    Example:

    ```python
    >>> power_down(torch.tensor([4.0, 1.0, 1.0]), gamma=1.0).tolist()
    [0.5, 2.0, 2.0]

    ```
    """
    check_range("power_down: gamma", gamma, 0)
    check_range("power_down: ceiling", ceiling, 0, open_low=True)
    reference = _reference(sigma, scale)
    return (reference.mean() / sigma.double()).pow(gamma).clamp(max=ceiling) if reference.numel() else uniform(sigma)


def wiener(
    sigma: Tensor,
    *,
    scale: Tensor | None = None,
    tau: float | None = None,
    quantile: float = 0.5,
    factor: float = 1.0,
) -> Tensor:
    """Returns `sigma^2 / (sigma^2 + tau^2)`, which weighs the loss of the new update against a unit cost of drift.

    Args:
        sigma, scale: see the module.
        tau (`float`, *optional*): the noise level; `factor` times the `quantile` of the spectrum when omitted.
        quantile (`float`, *optional*, defaults to `0.5`): 0.5 is the median.
        factor (`float`, *optional*, defaults to `1.0`): multiplies the quantile.

    Example:

    ```python
    >>> wiener(torch.tensor([2.0, 1.0]), tau=1.0).tolist()
    [0.8, 0.5]

    ```
    """
    level = _noise_level("wiener", sigma, scale, tau, quantile, factor)
    ratio = torch.where(sigma > 0, level / sigma.double(), torch.inf)  # sigma = 0 has nothing to keep
    return 1.0 / (1.0 + ratio.square())


def soft_threshold(
    sigma: Tensor,
    *,
    scale: Tensor | None = None,
    tau: float | None = None,
    quantile: float = 0.5,
    factor: float = 1.0,
) -> Tensor:
    """Returns `max(1 - tau / sigma, 0)`, so that every singular value loses tau; `tau` is chosen as in `wiener`.

    With the default tau, the median, half of the directions are dropped, and all of them if they are equally strong
    (rank 1, a flat spectrum); `consolidate` then warns. A lower `factor` avoids it.

    Example:

    ```python
    >>> soft_threshold(torch.tensor([4.0, 1.0]), tau=2.0).tolist()
    [0.5, 0.0]

    ```
    """
    level = _noise_level("soft_threshold", sigma, scale, tau, quantile, factor)
    ratio = torch.where(sigma > 0, level / sigma.double(), torch.inf)
    c = 1.0 - ratio
    return torch.where(c > _TIE, c, 0.0)  # a value at tau itself is 0, and not a rounding error that gets amplified


def energy_cut(
    sigma: Tensor,
    *,
    scale: Tensor | None = None,
    share: float = 0.9,
    low: float = 0.0,
    mass: str = "energy",
) -> Tensor:
    """Returns 1 for the fewest leading directions that reach `share` of the mass, and `low` for the others.

    Args:
        sigma, scale: see the module.
        share (`float`, *optional*, defaults to `0.9`): eta, in (0, 1].
        low (`float`, *optional*, defaults to `0.0`): rate of the directions below the cut.
        mass (`str`, *optional*, defaults to `"energy"`): `energy` counts sigma^2, `nuclear` counts sigma, as STAR.

    Example:

    ```python
    >>> energy_cut(torch.tensor([3.0, 1.0, 1.0]), share=0.6, mass="nuclear").tolist()
    [1.0, 0.0, 0.0]

    ```
    """
    check_range("energy_cut: share", share, 0, 1, open_low=True)
    check_range("energy_cut: low", low, 0)
    if mass not in ("energy", "nuclear"):
        raise SpectralError(f"energy_cut: mass is {mass!r}.", expected="energy or nuclear.")
    reference = _reference(sigma, scale)
    if not reference.numel():
        return uniform(sigma)
    threshold = reference[_leading(reference.square() if mass == "energy" else reference, share) - 1]
    return torch.where(sigma.double() >= threshold * (1 - _TIE), uniform(sigma), low)


def saturate(sigma: Tensor, *, scale: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """Returns `(s / sigma) tanh(sigma / s)` with `s = factor * mean sigma`: the result never exceeds s.

    Example:

    ```python
    >>> [round(c, 3) for c in saturate(torch.tensor([10.0, 0.0, 0.0])).tolist()]
    [0.762, 1.0, 1.0]

    ```
    """
    check_range("saturate: factor", factor, 0, open_low=True)
    reference = _reference(sigma, scale)
    if not reference.numel():
        return uniform(sigma)
    ratio = sigma.double() / (factor * reference.mean())
    return torch.where(ratio > 0, torch.tanh(ratio) / ratio, 1.0)  # the limit at 0 is 1


def rank_linear(sigma: Tensor, *, scale: Tensor | None = None, first: float = 1.0, last: float = 0.0) -> Tensor:
    """Returns a line from `first` (largest sigma) to `last` (smallest), over the cumulative energy; robust to outliers.

    The place of a value is the energy above it plus half of the energy at it, stretched to [0, 1]; a spectrum with one
    distinct value gets the middle.

    Example:

    ```python
    >>> rank_linear(torch.tensor([1.0, 1.0, 0.0])).tolist()
    [0.5, 0.5, 0.0]
    >>> [round(c, 3) for c in rank_linear(torch.tensor([2.0, 1.0, 1.0, 0.5])).tolist()]
    [1.0, 0.273, 0.273, 0.0]

    ```
    """
    check_range("rank_linear: first", first, 0)
    check_range("rank_linear: last", last, 0)
    reference = _reference(sigma, scale)
    if not reference.numel():
        return uniform(sigma)
    ascending = reference.flip(0)
    energy = torch.cat([reference.new_zeros(1), reference.square().cumsum(0)])  # (n,) -> (n + 1,)

    def place(values: Tensor) -> Tensor:
        above = reference.numel() - torch.searchsorted(ascending, values * (1 + _TIE), right=True)
        down_to = reference.numel() - torch.searchsorted(ascending, values * (1 - _TIE))
        return (energy[above] + energy[down_to]) / 2

    top, bottom = place(reference[:1]), place(reference[-1:])
    if bool(bottom <= top):
        share = torch.where(sigma > 0, 0.5, 1.0).double()
    else:
        share = ((place(sigma.double()) - top) / (bottom - top)).clamp(0.0, 1.0)
    return first + (last - first) * share


def overlap(sigma: Tensor, *, delta: LowRankDelta, previous: LowRankDelta, mass: float = 0.5) -> Tensor:
    """Returns `1 - rho`, `rho_i = |P_U u_i| |P_V v_i|`: directions that earlier tasks use are taken over less.

    `P_U` and `P_V` project on the leading singular vectors of `previous` that reach `mass` of its nuclear norm. Unlike
    every other rate it depends on the directions, so repeated singular values may get different rates.

    Args:
        sigma (`Tensor`): the singular values of `delta`.
        delta (`LowRankDelta`): the update to consolidate.
        previous (`LowRankDelta`): what all earlier tasks were consolidated into; of rank 0 before the second task.
        mass (`float`, *optional*, defaults to `0.5`): share of the nuclear norm, in (0, 1].

    References: inspired by OPCM; not what LLaVA-c describes.

    Example:

    ```python
    >>> from mllm_cl.spectral import LowRankDelta
    >>> delta = LowRankDelta.from_dense(torch.diag(torch.tensor([2.0, 1.0])))
    >>> previous = LowRankDelta.from_dense(torch.diag(torch.tensor([0.0, 5.0])))
    >>> overlap(delta.singular_values(), delta=delta, previous=previous).tolist()
    [1.0, 0.0]

    ```
    """
    check_range("overlap: mass", mass, 0, 1, open_low=True)
    if previous.shape != delta.shape:
        raise SpectralError(
            f"overlap: the update has shape {delta.shape} and `previous` has shape {previous.shape}.",
            expected="two updates of the same weight matrix.",
        )
    if previous.rank == 0:
        return torch.ones_like(sigma, dtype=torch.float64)
    count = _leading(previous.sigma, mass)
    kept = torch.promote_types(delta.left.dtype, previous.left.dtype)
    shared_left = previous.left[:, :count].to(kept).mT @ delta.left.to(
        kept
    )  # (count, out) @ (out, rank) -> (count, rank)
    shared_right = previous.right[:, :count].to(kept).mT @ delta.right.to(kept)  # -> (count, rank)
    rho = shared_left.double().norm(dim=0) * shared_right.double().norm(dim=0)  # (count, rank) -> (rank,)
    return 1.0 - rho.clamp(max=1.0)


RATES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "power_up": power_up,
    "power_down": power_down,
    "wiener": wiener,
    "energy_cut": energy_cut,
    "soft_threshold": soft_threshold,
    "saturate": saturate,
    "rank_linear": rank_linear,
    "overlap": overlap,
}


def find_rate(name: str, options: dict[str, float | str | None]) -> Callable[..., Tensor]:
    """Returns the rate called `name`, having checked that it knows all `options`.

    Raises:
        `SpectralError`: if the name or an option is unknown.
    """
    if name not in RATES:
        raise SpectralError(f"rate {name!r} is unknown.", expected=", ".join(RATES), fix=suggest(name, RATES))
    known = set(inspect.signature(RATES[name]).parameters) - {"sigma", "scale", "delta", "previous"}
    for option in options:
        if option not in known:
            raise SpectralError(
                f"rate {name!r} has no option {option!r}.",
                expected=", ".join(sorted(known)) or "no option at all.",
                fix=suggest(option, known) if known else f"leave {option!r} out.",
            )
    return RATES[name]


def _reference(sigma: Tensor, scale: Tensor | None) -> Tensor:
    """The positive part of the spectrum that statistics are taken from, descending, float64."""
    reference = (sigma if scale is None else scale).double()
    return torch.sort(reference[reference > 0], descending=True).values


def _leading(mass: Tensor, share: float) -> int:
    """How many leading entries of the descending `mass` reach `share` of its sum."""
    short_of_it = mass.cumsum(0) < share * (1 - 1e-12) * mass.sum()
    return min(int(short_of_it.sum()) + 1, mass.numel())


def _noise_level(
    name: str, sigma: Tensor, scale: Tensor | None, tau: float | None, quantile: float, factor: float
) -> float:
    check_range(f"{name}: quantile", quantile, 0, 1)
    check_range(f"{name}: factor", factor, 0)
    if tau is not None:
        check_range(f"{name}: tau", tau, 0)
        return tau
    reference = _reference(sigma, scale)
    return factor * float(torch.quantile(reference, quantile)) if reference.numel() else 0.0
