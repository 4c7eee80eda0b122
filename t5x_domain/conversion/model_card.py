"""README.md of a Hugging Face folder: what the model is, what it was trained on, how well it did, how it is loaded."""

import math
from collections.abc import Mapping
from typing import Any

from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.layout import part_shapes
from t5x_domain.evaluation.perplexity import measures
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig

_CLASSES = {EncoderDecoder: "AutoModelForSeq2SeqLM", DecoderOnly: "AutoModelForCausalLM", EncoderOnly: "AutoModel"}
_KINDS = {EncoderDecoder: "Encoder-decoder", DecoderOnly: "Decoder-only", EncoderOnly: "Encoder-only"}


def model_card(checkpoint: Checkpoint, content: Mapping[str, Any]) -> str:
    """Markdown with the header that model hubs read; `content` is config.json's."""
    sections = [_header(checkpoint), _shape(checkpoint), _loading(checkpoint, content["model_type"])]
    run = checkpoint.facts.get("run")
    if run is not None:
        sections.append(_training(checkpoint.facts, run))
    if "scores" in checkpoint.facts:
        sections.append(_scores(checkpoint.facts["scores"]))
    return "\n\n".join(sections) + "\n"


def _header(checkpoint: Checkpoint) -> str:
    return (
        "---\nlibrary_name: transformers\ntags:\n- t5x_domain\n---\n\n"
        f"# {_KINDS[checkpoint.model]} model {'trained' if 'run' in checkpoint.facts else 'converted'} with t5x_domain"
    )


def _shape(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    shapes = part_shapes(checkpoint.model, config)
    stacks = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    has = {name.partition("/")[0] for name in shapes}  # a model of one stack does not look at the other's count
    layers = " + ".join(f"{count} {stack}" for stack, count in stacks.items() if stack in has)
    rows = {
        "parameters": f"{sum(math.prod(shape) for shape in shapes.values()):,}",
        "layers": layers,
        "width, feed-forward width": f"{config.embed_dim:,}, {config.mlp_dim:,}",
        "heads": f"{config.num_heads} of {config.head_dim}",
        "rows of the embedding": f"{config.vocab_size:,}",
    }
    if config.longest is not None:
        rows["tokens of a text"] = f"{config.longest:,} at most"
    vocabulary = checkpoint.vocabulary
    if vocabulary is not None:
        rows["vocabulary"] = (
            f"{vocabulary.vocab_size:,} ids ({vocabulary.description['kind']}), "
            f"{vocabulary.extra_ids} of them sentinels"
        )
    return _table(("", ""), rows.items())


def _loading(checkpoint: Checkpoint, model_type: str) -> str:
    name = _CLASSES[checkpoint.model]
    # A Longformer is made with a pooler, which ours has not and transformers would fill at random.
    options = ", add_pooling_layer=False" if model_type == "longformer" else ""
    loaded = f'model = {name}.from_pretrained("<this folder>"{options})'
    lines = [f"from transformers import AutoTokenizer, {name}", "", loaded]
    if checkpoint.vocabulary is not None:
        lines.append('tokenizer = AutoTokenizer.from_pretrained("<this folder>")')
    if checkpoint.model is EncoderDecoder and checkpoint.config.relative_bias_per_layer:
        lines.append("model.config.tie_word_embeddings = False  # or transformers 5 divides logits by sqrt(d_model)")
    text = "\n".join(["## Use", "", "```python", *lines, "```"])
    if checkpoint.model is EncoderDecoder and not checkpoint.config.tie_embeddings:
        text += "\n\ntransformers 5 remarks that `lm_head` and the embedding are not tied. So it should be."
    if checkpoint.model is DecoderOnly:
        text += "\n\nEvery text starts with id 0, which the tokenizer puts there. Attention is causal throughout."
    if model_type in ("electra", "longformer"):
        text += (
            "\n\nBiases and token types are zeros: the model was trained without. No text starts with a class token."
        )
    if model_type == "longformer":
        text += "\n\n" + _global_attention(checkpoint.config)
    return text


def _global_attention(config: ModelConfig) -> str:
    marked = []
    if config.global_tokens:
        marked.append(f"`[:, :{config.global_tokens}] = 1`")
    if config.global_blocks == "every":
        marked.append(f"`[:, {config.global_block_size - 1}::{config.global_block_size}] = 1`")
    if not marked:
        return "No token was trained to attend globally, so leave `global_attention_mask` out."
    return f"Global tokens belong to the model: give a `global_attention_mask` of zeros with {' and '.join(marked)}."


def _training(facts: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    lengths = ", ".join(f"{length} {name}" for name, length in run["Run.lengths"].items())
    rows = {
        "started from": facts.get("started_from", "fresh parameters"),
        "updates": f"{facts['step']:,}",
        "batch": f"{run['Run.batch_size']} rows of {lengths}",
        "packing": run["Run.packing"],
        "optimizer": f"`{run['Updates.optimizer']}`",
        "seed": run["Run.seed"],
    }
    if "phases" in facts:
        rows["tokens of text seen"] = f"{sum(phase['raw_tokens'] for phase in facts['phases']):,}"
    text = "## Training\n\n" + _table(("", ""), rows.items())
    components = [
        (number, phase["start"], corpus, f"`{objective}`", rate, "" if mode == "None" else f"`{mode}`")
        for number, phase in enumerate(run["phases"], 1)
        for corpus, _, objective, rate, mode, _ in phase["components"]
    ]
    return text + "\n\n" + _table(("phase", "from step", "corpus", "objective", "rate", "mode"), components)


def _scores(scores: Mapping[str, Any]) -> str:
    """What the loss has to say of held-out text: of predicted tokens their perplexity, else of its binary decisions."""
    by_corpus = {corpus: score for corpus, score in scores.items() if corpus != "step"}
    columns = measures(next(iter(by_corpus.values())))
    rows = [
        (corpus, *(format(score[key], form) for key, _, form in columns), format(score["accuracy"], ".1%"))
        for corpus, score in by_corpus.items()
    ]
    head = ("corpus", *(name for _, name, _ in columns), "targets guessed right")
    return f"## Held-out text, step {scores['step']:,}\n\n" + _table(head, rows)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
