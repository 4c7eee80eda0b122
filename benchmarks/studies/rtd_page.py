"""The page of the study of replaced-token detection, every sentence about results made from the numbers."""

from rtd_arms import ARMS, MAX_SHARE, TRAINED
from study import shown

# isort: split
from meco_report import table  # study makes its imports findable

METRICS = {"macro_f1": "macro-F1", "accuracy": "accuracy"}  # the first is the headline
PACKAGES = ("jax", "flax", "optax", "numpy", "sentencepiece", "scikit-learn")
# All are expected to be above 0: ELECTRA's claims, DeBERTaV3's, and that there is something to see at all.
COMPARISONS = {
    "rtd_tied − rtd_masked": "a loss over all tokens teaches more than one at the masked positions",
    "rtd_tied − mlm": "detection teaches more than masked language modelling",
    "rtd_gdes − rtd_tied": "disentangled embeddings are better than tied ones",
    "mlm − none": "masked language modelling is better than no pretraining",
    "rtd_tied − none": "detection is better than no pretraining",
}
# How the peak of pretraining was chosen.
LEARNING_RATES = {
    "smoke": "The peak is a guess.",
    "small": "The peak lies between two that were tried on `rtd_tied` for 300 updates of a schedule of 600, one seed: "
    "1e-3 (held-out loss of detection 0.254 nats, of the generator 6.86) and 2e-3 (0.267 and 6.59).",
    "gpu": "The peak is that of ELECTRA small.",
}
TITLE = "Replaced-token detection against masked language modelling at equal compute"
VERDICTS = {"holds": "holds here", "reversed": "is contradicted here", "not resolved": "is not resolved here"}


def reading(report):
    """What the numbers say, in sentences."""
    lines = []
    for name, claim in COMPARISONS.items():
        entry = report["comparisons"][name]
        headline = entry["macro_f1"]
        differences = ", ".join(
            f"{shown(entry[metric]['difference'], signed=True)} {label}" for metric, label in METRICS.items()
        )
        also = entry["accuracy"]["verdict"]
        agrees = "" if also == headline["verdict"] else f"; by accuracy it {VERDICTS[also]}"
        lines.append(f"- *{claim[0].upper()}{claim[1:]}* **{VERDICTS[headline['verdict']]}**{agrees} ({differences}).")
    lexical, scores = report["tf_idf"]["scores"]["macro_f1"], report["scores"]["macro_f1"]
    above = [arm for arm in ARMS if scores[arm]["mean"] > lexical]
    lines.append(
        f"- TF-IDF with logistic regression has a macro-F1 of {lexical:.3f}; arms above it on average: "
        f"{', '.join(above) or 'none of them'}."
    )
    best = max(ARMS, key=lambda arm: scores[arm]["mean"])
    lines.append(f"- The best mean is that of {best}; nothing is corrected for the number of comparisons.")
    for arm in ("rtd_tied", "rtd_gdes"):
        end = _end(report, arm)
        lines.append(
            f"- At the end {arm} finds {end['recall']:.0%} of the replaced tokens (precision "
            f"{_cell(end, 'precision', '.0%')}); its generator is right at {end['generator_accuracy']:.0%} of the "
            "chosen positions."
        )
    masked = _end(report, "rtd_masked")
    lines.append(
        f"- Of the positions that rtd_masked is asked about {masked['share_replaced']:.0%} are replaced, so an answer "
        f"that is always the same has that accuracy; it has {masked['accuracy']:.0%}."
    )
    return "\n".join(lines)


def _end(report, arm):
    return report["pretraining"][arm]["curve"][max(report["pretraining"][arm]["curve"])]


def _cell(scores, key, form):
    return format(scores[key], form) if key in scores else "–"


def page(report, figure):
    versions, found = report["environment"], report["comparisons"]
    again = f"python benchmarks/studies/rtd.py --corpus {report['corpus_file']} --task {report['task_file']}"
    again += "" if report["name"] == "small" else f" --setting {report['name']}"
    results = table(
        ["arm", *METRICS.values(), "updates", "FLOPs", "seconds", "text tokens", "parameters trained"],
        [
            [
                arm,
                *(shown(report["scores"][metric][arm]) for metric in METRICS),
                *_costs(report["pretraining"].get(arm)),
            ]
            for arm in ARMS
        ]
        + [["TF-IDF, logistic regression", *(f"{report['tf_idf']['scores'][m]:.3f}" for m in METRICS), *"–" * 5]],
    )
    compared = table(
        ["difference", *(f"{label}: {part}" for label in METRICS.values() for part in ("mean ± half", "verdict"))],
        [[name, *(cell for metric in METRICS for cell in _compared(entry[metric]))] for name, entry in found.items()],
    )
    keys = ("f1", "precision", "recall", "share_replaced", "loss", "accuracy", "generator_loss", "generator_accuracy")
    detection = table(
        ["arm", *(key.replace("_", " ") for key in keys)],
        [[arm, *(_cell(_end(report, arm), key, ".3f") for key in keys)] for arm in TRAINED],
    )
    return f"""# {TITLE}

*Written by `benchmarks/studies/rtd.py` on {versions["date"]}; all figures are in `benchmarks/results/`. Do not edit.*

Clark et al. 2020 ("ELECTRA", [arXiv:2003.10555](https://arxiv.org/abs/2003.10555), section 3.4) trace the gain of
replaced-token detection to its loss over all tokens: 85.0 on GLUE, 82.4 with the loss at the masked positions alone,
82.2 for BERT. The same arms here, small and from scratch on biomedical definitions:

- `none`: not pretrained, fine-tuned as it was drawn; the floor.
- `mlm`: masked language modelling; 80 % of the chosen tokens masked, 10 % random, 10 % kept.
- `rtd_masked`: replaced-token detection that is asked about the chosen positions only; tied embeddings.
- `rtd_tied`: about all tokens; tied embeddings.
- `rtd_gdes`: about all tokens; gradient-disentangled embedding sharing (He et al. 2021,
  [arXiv:2111.09543](https://arxiv.org/abs/2111.09543), section 3.3).

{reading(report)}

## Results

{results}

{_intervals(report)}

{compared}

Differences are paired by pretraining seed; all were expected to be above 0 before anything was measured.

![Left: replaced tokens found, by step; right: macro-F1]({figure})

*Left: means over seeds, over all tokens of held-out text. Right: means with intervals, beside them the single
pretraining seeds; the paired differences above are known better than these bars suggest.*

At the end, in held-out text; of `mlm` loss and accuracy are those of the chosen tokens, of `rtd_masked` all of
detection is at chosen positions:

{detection}

## Setup

{_setup(report)}

## What this does not show

- Nothing about models of ELECTRA's size and length: its small model learns for a million updates of 128 rows, and how
  good the generator has become decides how hard detection is.
- Equal FLOPs are not equal time: sampling and a second, narrow model cost seconds that the formula does not count.
- One task, one corpus, one learning rate for all arms; another might shift the differences.

## Again

    {again}
"""


def _intervals(report):
    setting, seeds, spread = report["setting"], len(report["seeds"]), report["spread_of_fine_tuning"]
    noise = (
        ""
        if spread is None
        else (
            " Fine-tuning seeds of one model differ by a standard deviation of "
            f"{spread:.3f} macro-F1 (mean over models)."
        )
    )
    many = setting["task_seeds"]
    return (
        f"Mean ± half of the 95 % confidence interval after Student over {seeds} pretraining seed{'s' * (seeds > 1)}, "
        f"each the mean of {many} fine-tuning seed{'s' * (many > 1)}. A seed changes how parameters are drawn, the "
        "order of the text, what is masked and sampled, and all of fine-tuning; arms share seeds. The interval covers "
        f"neither the choice of test items nor that of the corpus or the task.{noise} Rare classes weigh as much as "
        "common ones in macro-F1, so it moves by single test items."
    )


def _setup(report):
    setting, versions, examples = report["setting"], report["environment"], report["examples"]
    return "\n".join(
        [
            f"- **Text**: {report['corpus_file']}, {report['documents']['train']:,} documents of {report['tokens']:,} "
            f"tokens; {setting['vocabulary']:,} SentencePiece pieces trained on it. Rows of {setting['length']} tokens "
            f"packed by first fit, {setting['rows']} rows in an update, 15 % of the tokens chosen.",
            f"- **Encoder**: embed_dim {setting['embed_dim']}, mlp_dim {setting['mlp_dim']}, {setting['layers']} "
            f"layers, {setting['heads']} heads, T5's relative bias, {setting['dtype']}, no dropout in pretraining. The "
            f"generator has {setting['generator_width']:g} of the width and {setting['generator_layers'] or 'all'} "
            "layers. Detection's loss weighs 50 times the generator's.",
            "- **Equal compute**: FLOPs of forward and backward pass by formula: matrix products of generator and "
            "discriminator, attention in full, the backward pass twice the forward pass, sampling's logits once more. "
            f"Logits are computed at {MAX_SHARE:.0%} of the positions in all arms, `mlm` included. XLA's own count of "
            "the compiled updates is within 3 % of the formula (small setting, layers unrolled). Seconds are those of "
            "whole pretraining jobs with compilation and evaluation; on CPUs each job has one core, which other work "
            "may have shared: they say what was waited, not what an arm costs.",
            f"- **Optimizer**: AdamW, linear schedule with a warm-up of {setting['warmup']:.0%} of the steps, peak "
            f"{setting['learning_rate']:g} in all arms, weight decay 0.01, norm clipped at 1. "
            f"{LEARNING_RATES[report['name']]}",
            f"- **Task**: {report['task_file']}, {examples['train']:,} definitions drawn to learn from, "
            f"{examples['test']:,} tested; {setting['task_epochs']:g} epochs, rows of {setting['task_length']} tokens, "
            f"{setting['task_rows']} in an update, peak {setting['task_learning_rate']:g}; the best epoch by "
            "validation macro-F1. TF-IDF reads the same definitions, long ones uncut, C = "
            f"{report['tf_idf']['C']:g} chosen on validation. The unlabelled text holds definitions of the training "
            "split, none of the test split.",
            f"- **Machine**: {report['device']}; {versions['cpu']}, {versions['cores']} cores; Python "
            f"{versions['python']}, {', '.join(f'{name} {versions[name]}' for name in PACKAGES)}; "
            f"{report['minutes']:.0f} minutes for all jobs if done one by one.",
        ]
    )


def _compared(entry):
    return shown(entry["difference"], signed=True), f"**{entry['verdict']}**"


def _costs(arm):
    if arm is None:
        return ["–"] * 5
    return [
        f"{arm['steps']:,}",
        f"{arm['flops']:.2e}",
        f"{arm['seconds']:,.0f}",
        f"{arm['text_tokens']:,.0f}",
        f"{arm['parameters']:,}",
    ]
