"""What the miniature of UL2's ablation reports: means over seeds, the orderings of the paper, a page and a figure."""

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import study
from ul2_arms import MODES, NO_PRETRAINING, PAPER_ARMS

STACKS = ("encoder", "decoder")


def orderings(values, architecture, objectives):
    """What section 4 of the paper leads one to expect, each as a paired difference with the sign that it should have.

    `values(objective, measure)` is {seed: value}.
    """
    result = []

    def compare(number, statement, ours, theirs, sign):
        difference = study.paired(ours, theirs)
        verdict = study.verdict(difference, expected_sign=sign)
        result.append(
            {
                "architecture": architecture,
                "ordering": number,
                "statement": statement,
                "expected": ">" if sign > 0 else "<",
                "difference": difference,
                "verdict": verdict,
            }
        )

    def arms(number, ours, theirs, measure, sign):
        if {ours, theirs} <= set(objectives):
            shown = {"accuracy": "accuracy", "lm_loss": "LM loss", "overlap": "overlap", "span_loss": "span loss"}
            statement = f"{shown[measure]}: {ours} − {theirs}"
            compare(number, statement, values(ours, measure), values(theirs, measure), sign)

    arms("i", "t5", "causal_lm", "accuracy", +1)
    for lm in ("causal_lm", "prefix_lm"):
        arms("ii", lm, "t5", "lm_loss", -1)
        arms("ii", lm, "t5", "overlap", +1)
    arms("iii", "ul2", "t5", "lm_loss", -1)
    for lm in ("causal_lm", "prefix_lm"):
        arms("iii", "ul2", lm, "accuracy", +1)
    others = [name for name in PAPER_ARMS if name in objectives and name != "ul2"]
    if "ul2" in objectives:
        for measure, best in (("accuracy", max), ("lm_loss", min)):
            rival = best(others, key=lambda name: np.mean(list(values(name, measure).values())))
            arms("iii, best of the others", "ul2", rival, measure, +1 if best is max else -1)
        for measure, right in (("lm_loss", "[S]"), ("span_loss", "[R]")):
            for wrong in (mode for mode in MODES if mode != right):
                compare(
                    "iv",
                    f"ul2, {'LM' if measure == 'lm_loss' else 'span'} loss: mode {right} − "
                    f"{'no mode' if wrong is None else 'mode ' + wrong}",
                    values("ul2", f"modes/{measure}/{right}"),
                    values("ul2", f"modes/{measure}/{wrong}"),
                    -1,
                )
    for part in ("s_only", "x_only", "r_only"):
        for measure, sign in (("accuracy", +1), ("lm_loss", -1), ("span_loss", -1)):
            arms("v", "ul2", part, measure, sign)
    return result


def summarise(results, setting):
    """Means with intervals by arm, and the orderings, of the jobs that are there."""
    arms, found = {}, []
    for architecture in setting.architectures:

        def values(objective, path, architecture=architecture):
            done = {
                seed: results[name]
                for seed in setting.seeds
                if (name := job_name(objective, architecture, seed)) in results
            }
            return {seed: functools.reduce(lambda v, k: v[k], path.split("/"), r) for seed, r in done.items()}

        there = [name for name in setting.objectives if values(name, "accuracy")]
        arms[architecture] = {
            name: {
                measure: study.interval(values(name, measure).values())
                for measure in ("accuracy", "lm_loss", "overlap", "span_loss", "raw_tokens")
            }
            | {
                f"lm_loss, {form}": study.interval(values(name, f"lm_loss_by_form/{form}").values())
                for form in ("prefix", "sentinel", "causal")
            }
            for name in there
        }
        if "ul2" in there:
            example = next(results[n] for n in results if n.startswith(f"ul2-{architecture}"))
            arms[architecture]["ul2"]["modes"] = {
                group: {key: study.interval(values("ul2", f"modes/{group}/{key}").values()) for key in table}
                for group, table in example["modes"].items()
            }
        found += orderings(values, architecture, there)
    return {"arms": arms, "orderings": found}


def job_name(objective, architecture, seed):
    return f"{objective}-{architecture}-{seed}"


ORDERINGS = {
    "i": "Span corruption beats causal LM in fine-tuned classification.",
    "ii": "Causal LM and prefix LM beat span corruption in LM loss and in open generation.",
    "iii": "UL2 is strong on both axes: ahead of span corruption in LM loss, ahead of the LMs in classification.",
    "iii, best of the others": "UL2 against the best of the other objectives on each axis. The best is picked by its "
    "mean, so this is strict: 'at or near the best' is contradicted only where it is reversed.",
    "iv": "The right mode token makes UL2 better at its task than another one or none.",
    "v": "Parts of UL2 alone lose to the mixture.",
}


def draw(report, path):
    """Accuracy against LM loss, a point for each objective: the upper left is good at both."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ul2_ablation", "font.size": 9}):
        figure = Figure(figsize=(7.2 * len(report["arms"]), 4.4), layout="constrained")
        for axes, (architecture, arms) in zip(
            np.atleast_1d(figure.subplots(1, len(report["arms"]))), report["arms"].items(), strict=True
        ):
            for number, (name, arm) in enumerate((n, a) for n, a in arms.items() if n != NO_PRETRAINING):
                x, y = arm["lm_loss"], arm["accuracy"]
                error = {
                    f"{axis}err": None if v["low"] is None else v["high"] - v["mean"]
                    for axis, v in (("x", x), ("y", y))
                }
                colour = f"C{number}"
                marker = "osD^v<>PX"[number % 9]  # told apart by form, too: points may lie close together
                style = {"marker": marker, "color": colour, "linestyle": "none", "elinewidth": 0.8, "capsize": 2}
                axes.errorbar(x["mean"], y["mean"], label=name, **style, **error)
            if NO_PRETRAINING in arms:
                level = arms[NO_PRETRAINING]["accuracy"]["mean"]
                axes.axhline(level, color="grey", linewidth=0.8, linestyle=":")
                axes.annotate("no pretraining", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom")
            axes.set_xlabel("LM loss of held-out text, nats per token (less is better)")
            axes.set_ylabel("accuracy after fine-tuning")
            axes.set_title(architecture.replace("_", "-"))
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def write_report(report, results_dir, docs_dir):
    """{results_dir}/NAME.json, {docs_dir}/NAME.md and NAME.svg."""
    name = "ul2_ablation" + ("" if report["setting_name"] == "cpu" else f"_{report['setting_name']}")
    study.write_json(Path(results_dir, f"{name}.json"), report)
    draw(report, Path(docs_dir, f"{name}.svg"))
    Path(docs_dir, f"{name}.md").write_text(markdown(report, name), encoding="utf-8")
    print(f"{results_dir}/{name}.json, {docs_dir}/{name}.md, {docs_dir}/{name}.svg")


def markdown(report, name):
    setting, where = report["setting"], report["environment"]
    counts = Counter(ordering["verdict"] for ordering in report["orderings"])
    parts = [
        "# A miniature of UL2's ablation",
        "",
        f"*Written by `benchmarks/studies/ul2_ablation.py --setting {report['setting_name']}` on {where['date']}; the "
        f"figures are in [{name}.json](../../benchmarks/results/{name}.json).*",
        "",
        "The same small model learns the same text with each pretraining objective of the ablation in UL2 (Tay et al. "
        "2022, [arXiv:2205.05131](https://arxiv.org/abs/2205.05131), section 4), and is then asked for what the paper "
        "distinguishes. The orderings that the paper leads one to expect are checked **at this size**: an ordering "
        "*holds* or is *reversed* if the 95 % confidence interval of the paired difference excludes 0, and is *not "
        "resolved* otherwise. Nothing was tuned to make them hold. A model of this size on so little text says nothing "
        "about a large one.",
        "",
        f"Of {len(report['orderings'])} comparisons {counts['holds']} hold, {counts['reversed']} are reversed, "
        f"{counts['not resolved']} are not resolved."
        + ("" if report["complete"] else " **Some jobs are missing: this is an interim report.**"),
        "",
        "## Setup",
        "",
        *_setup(report, setting, where),
        "",
        "## Results",
        "",
        f"Mean ± half of the 95 % confidence interval over {len(setting['seeds'])} seeds (Student's t). A seed changes "
        "the parameters, the order of the text and the texts that are fine-tuned on; what is held out is the same.",
    ]
    for architecture, arms in report["arms"].items():
        parts += ["", f"### {architecture.replace('_', '-').capitalize()}", "", *_arms(arms)]
    parts += ["", f"![Accuracy against LM loss]({name}.svg)", "", "## Orderings", ""]
    parts += [
        "Differences are paired by seed: mean ± half of the 95 % interval. With so few seeds an interval is wide, and "
        "nothing is corrected for the number of comparisons: of twenty true ties one is expected to look resolved."
    ]
    for number, text in ORDERINGS.items():
        rows = [ordering for ordering in report["orderings"] if ordering["ordering"] == number]
        if rows:
            cells = [
                [
                    row["architecture"].replace("_", "-"),
                    row["statement"],
                    f"{row['expected']} 0",
                    study.shown(row["difference"], signed=True),
                    row["verdict"],
                ]
                for row in rows
            ]
            head = "architecture | difference | expected | measured | verdict"
            parts += ["", f"**({number})** {text}", "", *_table(head, cells)]
    for architecture, arms in report["arms"].items():
        if "ul2" in arms:
            parts += ["", *_modes(architecture, arms["ul2"]["modes"])]
    return "\n".join(parts) + "\n"


def _setup(report, setting, where):
    tokens = setting["raw_tokens"] * setting["rows"]
    parameters = ", ".join(f"{n.replace('_', '-')} {count:,}" for n, count in report["parameters"].items())
    corpora = "; ".join(
        f"{name} {c['documents']:,} documents, {c['tokens']:,} tokens" for name, c in report["corpora"].items()
    )
    size = sum(c["tokens"] for c in report["corpora"].values())
    machine = ", ".join(f"{key} {value}" for key, value in where.items())
    return [
        f"- **Text**: {corpora}; at equal rates. A vocabulary of {setting['vocabulary_size']:,} SentencePiece pieces "
        "trained on it, with the mode tokens [R], [S], [X] as ids of their own, and 256 sentinels.",
        f"- **Model**: embed_dim {setting['embed_dim']}, mlp_dim {setting['mlp_dim']} (gated GELU), heads "
        f"{setting['num_heads']}, layers {setting['layers']} in each stack, T5's relative bias, {setting['dtype']}; "
        f"parameters with embeddings: {parameters}.",
        f"- **Training**: {setting['steps']:,} updates of Adafactor, linear decay from {setting['peak']:g} after "
        f"{setting['warmup']} updates of warm-up, z-loss 1e-4, no dropout; the same for all.",
        f"- **Equal tokens** means equal text: every update holds about {tokens:,} tokens of text ({setting['rows']} "
        f"rows of {setting['raw_tokens']}) whatever the objective, whole documents packed first-fit, in the same order "
        f"up to rounding; {tokens * setting['steps'] / size:.2f} passes in all. An objective's row lengths are what "
        "this text takes (table below), so positions are nearly equal too: what corruption takes from the encoder, "
        "the decoder gets, and sentinels and EOS come on top. Arithmetic is not equal: a position in the decoder costs "
        "more than one in the encoder.",
        "- **Objectives**: presets of `mixture_of_denoisers`. `ul2` is `ul2_uniform7`, the paper's seven denoisers at "
        "equal rates; `unilm` is causal LM, prefix LM and single masked tokens in equal parts; `s_only` and `x_only` "
        "are UL2's parts; `none` is not pretrained. The prefix LM of `prefix_lm` and `unilm` cuts the text anywhere "
        "(Raffel et al. 2020, 3.2.3), UL2's S before the last quarter. In the encoder-decoder, causal LM has an "
        "encoder that reads EOS alone (the paper trains causal LM in decoders only), so that encoder has seen no text "
        "before fine-tuning.",
        f"- **Accuracy**: {report['task']}. Fine-tuning on {report['fine_tuning_examples']:,} texts "
        f"({setting['fine_tuning_steps']} updates of {setting['fine_tuning_rows']} rows, text to label words, the same "
        f"for all), then the label with the highest likelihood for {report['tested']:,} texts of the held-out splits. "
        "`ul2` is fine-tuned with mode [R], its parts with the only mode they know.",
        f"- **LM loss**: nats per token of the second half of held-out texts of up to {setting['held_out_length']} "
        f"tokens, given the first half; {report['lm_targets']:,} tokens, the same for all, without sentinels and EOS. "
        "The question has the form that the objective knows, which was chosen beforehand: *prefix* (first half in the "
        "inputs, second half as targets) for `prefix_lm`, `unilm`, `s_only`, `none` and, with mode [S], `ul2`; "
        "*sentinel* (the second half is the last corrupted span) for `t5` and `x_only`; *causal* (all in the targets) "
        "for `causal_lm` and `t5_and_causal_lm`.",
        "- **Span loss**: nats per token of the corrupted tokens of the same texts, R(3, 0.15); "
        f"{report['span_targets']:,} tokens, the same for all, without sentinels and EOS; with mode [R] for `ul2`. "
        "Objectives without sentinels cannot know what is asked.",
        f"- **Overlap**: greedy continuations, {setting['written_length']} tokens after {setting['prompt_length']} of "
        f"{setting['prompts']} held-out texts: F1 of their tokens, as bags, and of those that really follow.",
        f"- **Machine**: {machine}. On CPUs every job has one core; {report['job_hours']:.1f} hours of jobs in all.",
        "",
        *_table(
            "objective | architecture | inputs, targets | text in an update | encoder + decoder tokens for one of text "
            "| encoder, decoder filled | dropped",
            [
                [
                    *name.split("-"),
                    f"{packed['lengths']['inputs']}, {packed['lengths']['targets']}",
                    f"{packed['raw_tokens_per_row'] * setting['rows']:,.0f}",
                    f"{packed['encoder_tokens_per_raw_token']:.2f} + {packed['decoder_tokens_per_raw_token']:.2f}",
                    ", ".join("–" if packed[f"{s}_filled"] is None else f"{packed[f'{s}_filled']:.0%}" for s in STACKS),
                    f"{packed['dropped_share']:.1%}",
                ]
                for name, packed in report["packing"].items()
            ],
        ),
    ]


def _table(head, rows):
    """Lines of a Markdown table; `head` has its columns between bars."""
    lines = [head, "|".join(["---"] * (head.count("|") + 1)), *(" | ".join(map(str, row)) for row in rows)]
    return [f"| {line} |" for line in lines]


def _arms(arms):
    measures, forms = ("accuracy", "lm_loss", "overlap", "span_loss"), ("prefix", "sentinel", "causal")
    return [
        *_table(
            "objective | seeds | text tokens | accuracy | LM loss | overlap | span loss",
            [
                [name, arm["accuracy"]["n"], f"{arm['raw_tokens']['mean']:,.0f}"]
                + [study.shown(arm[measure]) for measure in measures]
                for name, arm in arms.items()
            ],
        ),
        "",
        "LM loss by the form of the question (with mode [S] for `ul2`); in a form that it was not trained for, an "
        "objective mostly shows that it does not know what is asked:",
        "",
        *_table(
            "objective | prefix | sentinel | causal",
            [[name, *(study.shown(arm[f"lm_loss, {form}"]) for form in forms)] for name, arm in arms.items()],
        ),
    ]


def _modes(architecture, modes):
    differ = "; ".join(
        f"{_mode_name(a)} and {_mode_name(b)} {study.shown(share, 2)}"
        for (a, b), share in ((pair.split(), share) for pair, share in modes["continuations_that_differ"].items())
    )
    return [
        f"UL2 ({architecture.replace('_', '-')}) by mode token; LM loss belongs to [S], span loss to [R]:",
        "",
        *_table(
            "mode | LM loss | span loss",
            [
                [_mode_name(mode), study.shown(loss), study.shown(modes["span_loss"][mode])]
                for mode, loss in modes["lm_loss"].items()
            ],
        ),
        "",
        f"Share of greedy continuations that differ between two modes: {differ}.",
    ]


def _mode_name(mode):
    return "no mode" if mode == "None" else mode
