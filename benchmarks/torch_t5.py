"""Times one training step of transformers' T5 1.1 small, for train_step.py to compare ours with.

Run by a Python that has torch and transformers; it imports nothing of this repository. Prints one line of JSON:
{"tokens_per_second": inputs and targets by the median step, "seconds_per_step": [...], "versions": {...}}.
"""

import argparse
import json
import statistics
import time

import torch
import transformers

BATCH_SIZE, INPUTS, TARGETS = 8, 512, 114


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=5, help="steps that are timed")
    arguments.add_argument("--warmup", type=int, default=2, help="steps before them")
    arguments.add_argument("--threads", type=int, default=2)
    flags = arguments.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)

    model = t5_1_1_small().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # fused is the fastest of its forms on a CPU
    inputs = torch.randint(1, 32000, (BATCH_SIZE, INPUTS))
    targets = torch.randint(1, 32000, (BATCH_SIZE, TARGETS))
    seconds = [timed_step(model, optimizer, inputs, targets) for _ in range(flags.warmup + flags.steps)][flags.warmup :]
    report = {
        "tokens_per_second": BATCH_SIZE * (INPUTS + TARGETS) / statistics.median(seconds),
        "seconds_per_step": seconds,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(report))


def t5_1_1_small() -> transformers.T5ForConditionalGeneration:
    """gin/models/t5_1_1_small.gin in float32, without dropout, with an output embedding of its own."""
    config = transformers.T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    model = transformers.T5ForConditionalGeneration(config)
    if model.lm_head.weight is model.shared.weight:  # transformers 5 ties them whatever the configuration says
        model.lm_head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == 76_961_152, parameters
    return model


def timed_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor):
    """Seconds of forward, backward and update."""
    start = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    model(input_ids=inputs, labels=targets).loss.backward()
    optimizer.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
