"""Mixtures made by rule instead of being listed component by component."""

from collections.abc import Sequence

import gin

from t5x_domain.data.tasks import Component, Corpus, Mixture
from t5x_domain.errors import UserError
from t5x_domain.objectives.base import Objective
from t5x_domain.objectives.prefix import Metadata
from t5x_domain.objectives.ul2 import denoising


@gin.configurable
def mixture_of_denoisers(
    corpora: Sequence[Corpus],
    *,
    denoisers: str | Sequence[Sequence] | Sequence[Objective] = "ul2_442",
    rates: Sequence[float] | None = None,
    split: str = "suffix",
    mode_form: str | None = "text",
    metadata: Metadata | None = None,
    name: str = "denoisers",
) -> Mixture:
    """Every corpus with every denoiser: a mixture of `len(corpora) * len(denoisers)` components.

    Args:
      corpora: what is learnt.
      denoisers: a preset (a key of `objectives.ul2.PRESETS`), or a list of (family, mean span length, rate, mode token,
        weight), see `objectives.ul2.Denoiser`. The weights sum to 1. Or a list of objectives, e.g. [MaskedLM()], which
        share the text evenly and have no mode tokens.
      rates: of the corpora, relative to one another; None for equal ones.
      split: how S cuts the text if it has a rate. 'suffix' predicts that share of its end, the paper's definition;
        'uniform' cuts anywhere, the released preprocessor's. See `PrefixLM`.
      mode_form: 'text' writes mode tokens in ordinary pieces; 'id' gives each an id of its own, in a vocabulary that
        `prepare` trains, and calls the released [NLU], [NLG], [S2S] by the paper's [R], [X], [S]; None leaves them out.
      metadata: a document's metadata before it; None for none.
      name: of the mixture.

    Raises:
      UserError: an unknown preset or family, knobs that a family does not have, weights that do not sum to 1, rates
        that do not match the corpora.
    """
    rates = [1.0] * len(corpora) if rates is None else list(rates)
    if len(rates) != len(corpora):
        raise UserError(f"mixture_of_denoisers.rates has {len(rates)} numbers for {len(corpora)} corpora.")
    mix = denoising(denoisers, split=split, mode_form=mode_form)
    return Mixture(
        name,
        [
            Component(corpus, objective, rate * weight, mode, metadata)
            for corpus, rate in zip(corpora, rates, strict=True)
            for objective, mode, weight in mix
        ],
    )
