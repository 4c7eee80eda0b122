"""Times transformers' generate on a folder and inputs, for decode.py to compare ours with.

Run by a Python that has torch and transformers; it imports nothing of this repository. Reads from standard input one
line of JSON, {"folder", "inputs": ids of each row, "max_tokens", "num_beams", "repeats", "threads"}, and prints one:
{"seconds": [...], "tokens": what was written, "versions": {...}}.
"""

import json
import sys
import time

import torch
import transformers


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    torch.set_num_threads(asked["threads"])
    model = transformers.T5ForConditionalGeneration.from_pretrained(asked["folder"], dtype=torch.float32).eval()
    longest = max(map(len, asked["inputs"]))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in asked["inputs"]])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in asked["inputs"]])

    def write() -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, num_beams=asked["num_beams"],
                max_new_tokens=asked["max_tokens"], min_new_tokens=None, eos_token_id=None,
            )[:, 1:]  # fmt: skip

    tokens, seconds = write(), []
    for _ in range(asked["repeats"]):
        began = time.perf_counter()
        write()
        seconds.append(time.perf_counter() - began)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"seconds": seconds, "tokens": tokens.tolist(), "versions": versions}))


if __name__ == "__main__":
    main()
