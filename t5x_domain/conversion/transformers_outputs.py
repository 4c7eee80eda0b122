"""Run by an interpreter with torch and transformers: FOLDER FEATURES.npz OUTPUTS.npy. Imports nothing of t5x_domain."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def main(folder: str, features_file: str, outputs_file: str) -> None:
    """Loads the model as its config.json says, in float32, and saves its logits, or an encoder's hidden states."""
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder, dtype=torch.float32).eval()
    # transformers 5 sets this to true for umT5 whatever the file says, and then divides the logits by sqrt(d_model).
    model.config.tie_word_embeddings = config.get("tie_word_embeddings", True)
    features = {key: torch.tensor(value, dtype=torch.long) for key, value in np.load(features_file).items()}
    with torch.no_grad():
        outputs = model(**features)
    np.save(outputs_file, (outputs.logits if "logits" in outputs else outputs.last_hidden_state).float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
