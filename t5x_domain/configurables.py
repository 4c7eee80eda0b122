"""Imports everything that a gin file may name, so that the names are known before the file is read."""

from typing import TextIO

import gin

from t5x_domain import files
from t5x_domain.adaptation import finetune_config, lora  # noqa: F401
from t5x_domain.data import curriculum, labelled, loader, mixtures, preparation, sources, tasks, vocabulary  # noqa: F401
from t5x_domain.evaluation import downstream, fine_tuned, head_to_head  # noqa: F401
from t5x_domain.inference import decoding  # noqa: F401
from t5x_domain.models import assemblies, config, heads, rtd  # noqa: F401
from t5x_domain.objectives import auxiliary_detection as detection_loss  # noqa: F401
from t5x_domain.objectives import labels, language_modeling, losses, masked_lm, prefix, span_corruption  # noqa: F401
from t5x_domain.objectives import rtd as rtd_loss  # noqa: F401
from t5x_domain.parallel import mesh  # noqa: F401
from t5x_domain.training import checkpoint, initial, optimizer, run, schedule  # noqa: F401


@gin.config.register_file_reader(lambda name: files.is_remote(name) and files.path(name).is_file())
def _gin_file_in_a_bucket(name: str) -> TextIO:
    return files.path(name).open()
