"""What remains of replaced-token detection: the encoder, or encoder-decoder, with a token embedding of its own."""

import dataclasses

from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.models.assemblies import EncoderDecoder, EncoderOnly, LanguageModel
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.rtd import DetectingEncoderDecoder, ReplacedTokenDetection

_REMAINING = {ReplacedTokenDetection: EncoderOnly, DetectingEncoderDecoder: EncoderDecoder}
_TABLE, _SHARED, _DELTA = "embedding/embedding", "generator/embedding/embedding", "embedding_delta"


def remaining_model(model: type[LanguageModel], config: ModelConfig) -> tuple[type[LanguageModel], ModelConfig]:
    """Class and shape of what is kept of a detector; another model's are its own."""
    if model not in _REMAINING:
        return model, config
    changed = {field.name: field.default for field in dataclasses.fields(config) if field.name.startswith("rtd_")}
    if model is ReplacedTokenDetection:  # it scores no vocabulary
        changed["tie_embeddings"] = True
    return _REMAINING[model], dataclasses.replace(config, **changed)


def discriminator(checkpoint: Checkpoint) -> Checkpoint:
    """The encoder, or encoder-decoder, that replaced-token detection has trained; any other model as it is.

    The embedding is materialised (He et al. 2021, section 3.3): what it shares with the generator and the difference
    are added up when it is read. The generator, the head and the optimizer's state are left behind.
    """
    if checkpoint.model not in _REMAINING:
        return checkpoint
    left = ("generator/", "head/", _DELTA)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(left)}
    if _TABLE not in tensors:
        shared, delta = checkpoint.tensors[_SHARED], checkpoint.tensors.get(_DELTA)
        tensors[_TABLE] = shared if delta is None else _sum(shared, delta)
    model, config = remaining_model(checkpoint.model, checkpoint.config)
    return dataclasses.replace(checkpoint, model=model, config=config, tensors=tensors, second_moments=None)


def as_begin_of(checkpoint: Checkpoint, model: type[LanguageModel], config: ModelConfig) -> Checkpoint:
    """The checkpoint as a run of another class begins with it.

    Of a detector that is what remains of it. A detector that shares its token embedding finds that of the checkpoint
    where it has it, with the generator.
    """
    checkpoint = discriminator(checkpoint)
    if model not in _REMAINING or config.rtd_embedding_sharing == "none":
        return checkpoint
    tensors = dict(checkpoint.tensors)
    tensors[_SHARED] = tensors.pop(_TABLE)
    return dataclasses.replace(checkpoint, tensors=tensors)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return Tensor(a.shape, a.dtype, lambda index: a.read(index) + b.read(index))
