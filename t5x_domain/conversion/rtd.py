"""What remains of replaced-token detection: the discriminator's encoder, with a token embedding of its own."""

import dataclasses

from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.models.assemblies import EncoderOnly, LanguageModel
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.rtd import ReplacedTokenDetection

_TABLE, _SHARED, _DELTA = "embedding/embedding", "generator/embedding/embedding", "embedding_delta"


def remaining_model(model: type[LanguageModel], config: ModelConfig) -> tuple[type[LanguageModel], ModelConfig]:
    """The encoder's class and shape; another model's are its own."""
    if model is not ReplacedTokenDetection:
        return model, config
    unset = {field.name: field.default for field in dataclasses.fields(config) if field.name.startswith("rtd_")}
    return EncoderOnly, dataclasses.replace(config, tie_embeddings=True, **unset)


def discriminator(checkpoint: Checkpoint) -> Checkpoint:
    """The encoder that replaced-token detection has trained; any other model as it is.

    The embedding is materialised (He et al. 2021, section 3.3): what it shares with the generator and the difference
    are added up when it is read. The generator, the head and the optimizer's state are left behind.
    """
    if checkpoint.model is not ReplacedTokenDetection:
        return checkpoint
    left = ("generator/", "head/", _DELTA)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(left)}
    if _TABLE not in tensors:
        shared, delta = checkpoint.tensors[_SHARED], checkpoint.tensors.get(_DELTA)
        tensors[_TABLE] = shared if delta is None else _sum(shared, delta)
    model, config = remaining_model(checkpoint.model, checkpoint.config)
    return dataclasses.replace(checkpoint, model=model, config=config, tensors=tensors, second_moments=None)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return Tensor(a.shape, a.dtype, lambda index: a.read(index) + b.read(index))
