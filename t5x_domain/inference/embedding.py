"""Texts as vectors: mean-pooled encoder states (Sentence-T5: Ni et al. 2022, arXiv:2108.08877, section 3)."""

import functools
from collections.abc import Sequence

import numpy as np

from t5x_domain.errors import UserError
from t5x_domain.inference.generator import padded
from t5x_domain.inference.heads import reader, with_head
from t5x_domain.inference.opened import Opened
from t5x_domain.models.heads import EncoderEmbedder


class Embedder:
    """Unit vectors of texts; the dot product of two is their cosine similarity."""

    def __init__(self, model: Opened, *, batch_size: int = 8) -> None:
        """Compiles nothing yet.

        Args:
          model: any with an encoder. The projection of one fine-tuned on pairs is applied; other heads are left out.
          batch_size: texts at once.

        Raises:
          UserError: the model has no encoder.
        """
        if "encoder" not in model.params:
            raise UserError(f"{model.origin}: it has no encoder to embed texts with; use another model.")
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size}: it must be at least 1.")
        if model.blueprint.model_class is not EncoderEmbedder:
            identity = np.eye(model.blueprint.config.embed_dim, dtype=np.float32)
            model = with_head(model, EncoderEmbedder, {"kernel": identity})
        self._model, self._batch_size = model, batch_size
        self._read = functools.partial(reader(model.blueprint), model.params)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[n, embed_dim] float32 of length 1. Texts are read whole, however long, and closed by EOS.

        Raises:
          UserError: a text is longer than the learned positions of the model.
        """
        inputs = [self._model.inputs(text) for text in texts]
        config = self._model.blueprint.config
        vectors = np.zeros((len(inputs), config.embed_dim), np.float32)
        # Texts of like lengths share a batch.
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            tokens, lengths = padded([inputs[i] for i in chosen], self._batch_size, at_most=config.longest)
            segment_ids = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
            vectors[chosen] = self._read(tokens, segment_ids)[: len(chosen)]
        return vectors
