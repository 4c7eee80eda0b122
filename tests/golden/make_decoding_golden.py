"""Writes decoding.json: what transformers writes, greedily and by beam search, with the golden models' weights.

Run it after make_hf_golden.py and in the same environment; tests/inference/test_generator.py compares ours with it.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from make_hf_golden import MODELS, VOCAB_SIZE

NAMES = ("t5_1_0", "t5_1_1", "umt5", "llama", "gemma2", "gemma3")
LENGTHS = (9, 4, 14)  # prompts; the relative bias and the local windows of these models are shorter than what comes
MAX_TOKENS = 18
BEAMS = [
    {"num_beams": 3, "length_penalty": 1.0},
    {"num_beams": 4, "length_penalty": 0.0},
    {"num_beams": 2, "length_penalty": 2.0},
]


def load(name: str, seed: int) -> hf.PreTrainedModel:
    """The model with the weights of its golden file."""
    model, _ = MODELS[name](np.random.default_rng(seed))
    with np.load(Path(__file__).with_name(f"{name}.npz")) as file:
        for key, parameter in model.named_parameters():
            parameter.data = torch.tensor(file[f"weights/{key}"])
    return model


def generate(
    model: hf.PreTrainedModel, prompts: list[list[int]], eos_id: int | None, **how
) -> tuple[list, list | None]:
    """Ids that are written for each prompt and, of a beam search, their scores."""
    whole = model.config.is_encoder_decoder
    prompts = prompts if whole else [[0, *prompt] for prompt in prompts]  # our decoders begin with id 0
    longest = max(map(len, prompts))
    rows, mask = torch.zeros((2, len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if whole else slice(longest - len(prompt), longest)
        rows[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    begin = {"decoder_start_token_id": 0} if whole else {}
    with torch.no_grad():
        result = model.generate(
            input_ids=rows, attention_mask=mask, do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=eos_id,
            pad_token_id=0, use_cache=False, return_dict_in_generate=True, output_scores=True, **begin, **how,
        )  # fmt: skip
    written = result.sequences[:, 1 if whole else longest :].tolist()
    scores = None if "num_beams" not in how else result.sequences_scores.tolist()
    return written, scores


def main() -> None:
    """Writes the file beside this script."""
    cases = {}
    for name in NAMES:
        model = load(name, list(MODELS).index(name))
        rng = np.random.default_rng(7)
        prompts = [rng.integers(3, VOCAB_SIZE, length).tolist() for length in LENGTHS]
        endless, _ = generate(model, prompts, None)
        # Random models seldom end: what the first row writes as its fifth token is made its end.
        eos_id = endless[0][4]
        cases[name] = {"prompts": prompts, "eos_id": eos_id, "greedy": generate(model, prompts, eos_id)[0], "beams": []}
        for how in BEAMS:
            count = how["num_beams"]
            written, scores = generate(model, prompts, eos_id, num_return_sequences=count, **how)
            rows = [written[i : i + count] for i in range(0, len(written), count)]
            cases[name]["beams"].append({**how, "tokens": rows, "scores": np.reshape(scores, (-1, count)).tolist()})
    Path(__file__).with_name("decoding.json").write_text(json.dumps({"max_tokens": MAX_TOKENS, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
