"""UL2's mixture of denoisers, and the other mixes that its paper compares it with (Tay et al. 2022, arXiv:2205.05131).

A denoiser is an objective with a mode token and a weight; `data.mixtures` gives every corpus all of them.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from t5x_domain.errors import UserError
from t5x_domain.objectives.base import Objective
from t5x_domain.objectives.language_modeling import CausalLM, PrefixLM
from t5x_domain.objectives.prefix import Mode
from t5x_domain.objectives.span_corruption import SpanCorruption


class Denoiser(NamedTuple):
    """One denoiser; in gin a tuple, e.g. ('X', 64, 0.5, '[NLG]', 0.1).

    Attributes:
      family: 'R' and 'X' are span corruption (regular, extreme), 'S' is prefix LM, 'C' is causal LM.
      mean_span_length: tokens, of R and X; None for S and C.
      rate: share of the tokens that is corrupted, of R and X; of S the share predicted, or None for a uniform cut.
      mode: mode token; None for none.
      weight: share in the mix, in [0, 1].
    """

    family: str
    mean_span_length: float | None
    rate: float | None
    mode: str | None
    weight: float


FAMILIES = ("R", "X", "S", "C")
# The mode tokens of the released checkpoints by family, and the names that the paper gives them.
RELEASED_MODES = {"R": "[NLU]", "X": "[NLG]", "S": "[S2S]", "C": "[S2S]"}
PAPER_NAMES = {"[NLU]": "[R]", "[NLG]": "[X]", "[S2S]": "[S]"}

_R = (("R", 3, 0.15), ("R", 8, 0.15))
_S = (("S", None, 0.25),)
_X = (("X", 3, 0.5), ("X", 8, 0.5), ("X", 64, 0.15), ("X", 64, 0.5))


def _mix(*groups: tuple[float, Sequence[tuple]], modes: bool = True) -> tuple[Denoiser, ...]:
    """Groups (weight, denoisers that share it evenly), with the released checkpoints' mode tokens or none."""
    return tuple(
        Denoiser(*denoiser, RELEASED_MODES[denoiser[0]] if modes else None, weight / len(group))
        for weight, group in groups
        for denoiser in group
    )


PRESETS: Mapping[str, tuple[Denoiser, ...]] = {
    # The paper's seven denoisers at equal rates (section 3.1.1, table 1).
    "ul2_uniform7": _mix((1.0, (*_R, *_S, *_X))),
    # R 0.4, X 0.4, S 0.2: public UL2 models in SeqIO form.
    "ul2_442": _mix((0.4, _R), (0.4, _X), (0.2, _S)),
    # UL2R, continued training of a finished model: S 0.5, R 0.25, X 0.25 (Tay et al. 2022, arXiv:2210.11399, 2.3).
    "ul2r_502525": _mix((0.5, _S), (0.25, _R[:1]), (0.25, (("X", 32, 0.15), ("X", 32, 0.5)))),
    # T5's span corruption alone.
    "t5": _mix((1.0, _R[:1]), modes=False),
    # The paper's other baselines (section 4.1.1). UniLM-like: causal LM, prefix LM and single masked tokens alike.
    "causal_lm": _mix((1.0, (("C", None, None),)), modes=False),
    "prefix_lm": _mix((1.0, (("S", None, None),)), modes=False),
    "t5_and_causal_lm": _mix((0.5, _R[:1]), (0.5, (("C", None, None),)), modes=False),
    "unilm": _mix((1.0, (("C", None, None), ("S", None, None), ("R", 1, 0.15))), modes=False),
    # Parts of UL2 alone.
    "r_only": _mix((1.0, _R)),
    "s_only": _mix((1.0, _S)),
    "x_only": _mix((1.0, _X)),
}


def denoising(
    denoisers: str | Sequence[Sequence] | Sequence[Objective], *, split: str, mode_form: str | None
) -> list[tuple[Objective, Mode | None, float]]:
    """Objective, mode token and weight of every denoiser; for the arguments see `data.mixtures`.

    Raises:
      UserError: an unknown preset or family, knobs that a family does not have, weights that do not sum to 1.
    """
    if mode_form not in ("text", "id", None):
        raise UserError(f"mixture_of_denoisers.mode_form={mode_form!r} is not one of 'text', 'id', None.")
    if split not in ("suffix", "uniform"):
        raise UserError(f"mixture_of_denoisers.split={split!r} is not one of 'suffix', 'uniform'.")
    if denoisers and all(isinstance(entry, Objective) for entry in denoisers):
        return [(objective, None, 1 / len(denoisers)) for objective in denoisers]
    chosen = _chosen(denoisers)
    if abs(sum(denoiser.weight for denoiser in chosen) - 1) > 1e-6:
        raise UserError(
            f"mixture_of_denoisers.denoisers: the weights {', '.join(f'{d.weight:g}' for d in chosen)} sum to "
            f"{sum(d.weight for d in chosen):g}; make them sum to 1."
        )
    if bare := [tuple(denoiser) for denoiser in chosen if not denoiser.weight > 0]:
        raise UserError(
            f"mixture_of_denoisers.denoisers: the weight of {bare[0]} must be above 0; leave it out instead."
        )
    objectives = _named_apart([(_objective(denoiser, split), denoiser) for denoiser in chosen])
    return [
        (objective, _mode(denoiser, mode_form), denoiser.weight)
        for objective, denoiser in zip(objectives, chosen, strict=True)
    ]


def _named_apart(objectives: Sequence[tuple[Objective, Denoiser]]) -> list[Objective]:
    """Objectives that differ in their mode token only get it into their name."""
    names = [objective.name for objective, _ in objectives]
    result = []
    for objective, denoiser in objectives:
        if names.count(objective.name) > 1:
            mode = re.sub(r"\W", "", denoiser.mode or "bare").lower()
            objective = dataclasses.replace(objective, name=f"{objective.name}_{mode}")
        if objective in result:
            raise UserError(
                f"mixture_of_denoisers.denoisers: {tuple(denoiser)} comes to the same as another entry; leave one out "
                "and add its weight to the other."
            )
        result.append(objective)
    return result


def _chosen(denoisers: str | Sequence[Sequence]) -> list[Denoiser]:
    if isinstance(denoisers, str):
        if denoisers not in PRESETS:
            raise UserError(
                f"mixture_of_denoisers.denoisers: unknown denoiser mix {denoisers!r}; choose one of "
                f"{', '.join(PRESETS)}, or list (family, mean span length, rate, mode token, weight)."
            )
        return list(PRESETS[denoisers])
    for entry in denoisers:
        if isinstance(entry, Objective) or len(entry) != len(Denoiser._fields):
            shown = entry if isinstance(entry, Objective) else tuple(entry)
            raise UserError(
                f"mixture_of_denoisers.denoisers: {shown!r} must be (family, mean span length, rate, mode token, "
                "weight); or all entries must be objectives."
            )
    return [Denoiser(*entry) for entry in denoisers]


def _objective(denoiser: Denoiser, split: str) -> Objective:
    family, span, rate = denoiser.family, denoiser.mean_span_length, denoiser.rate
    if family not in FAMILIES:
        raise UserError(
            f"mixture_of_denoisers.denoisers: unknown denoiser {family!r}; the families are {', '.join(FAMILIES)}."
        )
    if (family in "RX") != (span is not None) or (family in "RX" and rate is None) or (family == "C" and rate):
        raise UserError(
            f"mixture_of_denoisers.denoisers: {tuple(denoiser)!r} does not fit its family: R and X need a mean span "
            "length and a rate, S may have a rate, C has neither; write None for what is not there."
        )
    if family == "C":
        return CausalLM(name="c")
    if family == "S":
        if rate is None or split == "uniform":
            return PrefixLM(split="uniform", name="s_uniform")
        quarter = PrefixLM(split="suffix", name="s")
        if rate == quarter.mean_suffix:
            return quarter
        return dataclasses.replace(quarter, mean_suffix=rate, name=f"s{_percent(rate)}")
    name = f"{family.lower()}{span:g}".replace(".", "p") + _percent(rate)
    return SpanCorruption(noise_density=rate, mean_span_length=span, name=name)


def _percent(rate: float) -> str:
    """0.155 -> '_15p5'; a name may have letters, digits and underscores."""
    return f"_{100 * rate:g}".replace(".", "p")


def _mode(denoiser: Denoiser, form: str | None) -> Mode | None:
    if form is None or denoiser.mode is None:
        return None
    if form == "text":
        return Mode(denoiser.mode)
    return Mode(PAPER_NAMES.get(denoiser.mode, denoiser.mode), as_text=False)
