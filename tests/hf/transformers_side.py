"""What the live tests have transformers do, in an interpreter that has it. Imports nothing of t5x_domain.

python transformers_side.py make FOLDER                       # small random models, as save_pretrained writes them
python transformers_side.py generate FOLDER TEXTS OUTPUTS     # greedy and beam search from a folder
python transformers_side.py embed FOLDER OUTPUTS              # what the tokenizer and the encoder of a folder give
"""

import json
import sys
from pathlib import Path

import torch
import transformers as hf

T5 = {
    "vocab_size": 384, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 3,
    "decoder_start_token_id": 0,
}  # fmt: skip
LLAMA = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "head_dim": 12,
}  # fmt: skip
MODELS = {
    "t5_1_0": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="relu")),
    "t5_1_1": lambda: untied(
        hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    ),
    "ul2": lambda: untied(
        hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="gated-silu", tie_word_embeddings=False))
    ),
    "mt5": lambda: untied(hf.MT5ForConditionalGeneration(hf.MT5Config(**T5))),
    "umt5": lambda: untied(hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5))),
    "t5_encoder": lambda: hf.T5EncoderModel(hf.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=False)),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
}


def untied(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """With an output embedding of its own, which transformers 5 ties whatever the configuration says."""
    model.lm_head = torch.nn.Linear(model.config.d_model, model.config.vocab_size, bias=False)
    return model


def make(folder: str) -> None:
    """Saves each of `MODELS`."""
    for seed, (name, build) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = build()
        for parameter in model.parameters():  # away from initial values that hide mistakes: norms of one
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(Path(folder, name))


def generate(folder: str, texts_file: str, outputs_file: str) -> None:
    """Tokens of the inputs, and of what greedy and beam search (4 beams) write, with the beams' scores."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    outputs = []
    for text in json.loads(Path(texts_file).read_text(encoding="utf-8")):
        inputs = tokenizer(text, return_tensors="pt")
        greedy = model.generate(inputs.input_ids, max_new_tokens=24, do_sample=False)
        beams = model.generate(
            inputs.input_ids, max_new_tokens=24, num_beams=4, return_dict_in_generate=True, output_scores=True
        )
        outputs.append(
            {
                "inputs": inputs.input_ids[0].tolist(),
                "greedy": greedy[0].tolist(),
                "beam": beams.sequences[0].tolist(),
                "beam_score": float(beams.sequences_scores[0]),
                "text": tokenizer.decode(greedy[0], skip_special_tokens=True),
            }
        )
    Path(outputs_file).write_text(json.dumps(outputs), encoding="utf-8")


def embed(folder: str, outputs_file: str) -> None:
    """Ids of two words, the shape of their states, and how long a text the tokenizer leaves whole."""
    tokenizer, model = hf.AutoTokenizer.from_pretrained(folder), hf.AutoModel.from_pretrained(folder)
    inputs = tokenizer(["heart", "liver"], return_tensors="pt")
    outputs = {
        "ids": inputs.input_ids.tolist(),
        "shape": list(model(**inputs).last_hidden_state.shape),
        "longest": tokenizer.model_max_length,
    }
    Path(outputs_file).write_text(json.dumps(outputs), encoding="utf-8")


if __name__ == "__main__":
    {"make": make, "generate": generate, "embed": embed}[sys.argv[1]](*sys.argv[2:])
