"""What the miniature of UL2's ablation asks of a model: losses, continuations, and classification after fine-tuning."""

import csv
import functools
import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import study
from ul2_arms import MODES, OBJECTIVES, make_updates

from t5x_domain.data.packing import Example
from t5x_domain.errors import UserError
from t5x_domain.objectives.losses import language_model_loss
from t5x_domain.objectives.span_corruption import SpanCorruption
from t5x_domain.parallel.sharding import use_mesh
from t5x_domain.training.feed import LAYOUTS
from t5x_domain.training.step import make_train_step

# The default task: where a text of the sample comes from, or which of WordNet's lexicographer files a gloss is in.
SAMPLE_LABELS = {
    ("CHEBI", None): "chemical",
    ("MONDO", None): "disease",
    ("GO", "BP"): "biological process",
    ("GO", "MF"): "molecular function",
    ("GO", "CC"): "cellular component",
    ("wordnet", "04"): "act",
    ("wordnet", "05"): "animal",
    ("wordnet", "06"): "artifact",
    ("wordnet", "10"): "communication",
    ("wordnet", "18"): "person",
    ("wordnet", "20"): "plant",
}


class Question:
    """Something to score: `inputs`, `targets` (int32 [n]) and which targets count (bool [n])."""

    def __init__(self, inputs, targets, counted):
        self.inputs, self.targets = np.asarray(inputs, np.int32), np.asarray(targets, np.int32)
        self.counted = np.asarray(counted, bool)

    def example(self, prefix):
        return Example(self.inputs, self.targets, 0, prefix)


class Examiner:
    """Asks one model."""

    def __init__(self, place, architecture, blueprint):
        self.place, self.blueprint, self.architecture = place, blueprint, architecture
        self.layout = LAYOUTS[blueprint.model_class]
        self._likelihoods = jax.jit(self._log_likelihoods)
        self._write = jax.jit(self._greedy, static_argnums=3)

    def _hidden(self, params, batch):
        model = self.blueprint.merge(params)
        return model, model(**{name: batch[name] for name in model.inputs if name in batch})

    def _log_likelihoods(self, params, batch):
        with use_mesh(self.blueprint.mesh):
            model, hidden = self._hidden(params, batch)
            scores = jax.nn.log_softmax(model.logits(hidden)[..., : self.place.vocabulary.vocab_size])
        return jnp.take_along_axis(scores, batch["decoder_target_tokens"][..., None], axis=-1)[..., 0]

    def loss(self, params, questions, mode, rows=32):
        """Nats per target that counts."""
        prefix = self.place.mode(mode)
        lengths = {
            "inputs": 1 + max(len(q.inputs) for q in questions),  # one for the mode token, so that shapes do not change
            "targets": max(len(q.targets) for q in questions),
        }
        total = count = 0
        for start in range(0, len(questions), rows):
            asked = questions[start : start + rows]
            examples = [[q.example(prefix)] for q in asked]
            batch = self.layout.batch(examples + [[]] * (rows - len(asked)), lengths)
            scores, weights = np.asarray(self._likelihoods(params, batch)), batch["decoder_loss_weights"] > 0
            for row, question in enumerate(asked):
                counted = scores[row][weights[row]][question.counted]
                total, count = total - float(counted.sum(dtype=np.float64)), count + len(counted)
        return total / count

    def write(self, params, questions, mode):
        """The likeliest continuations of `questions`, whose targets are what is given; int32 [n, written_length]."""
        length, prefix = self.place.setting.written_length, self.place.mode(mode)
        room = np.zeros(length, np.int32)
        rows = [[Example(q.inputs, np.concatenate([q.targets, room]), 0, prefix)] for q in questions]
        lengths = {
            "inputs": 1 + max(len(q.inputs) for q in questions),
            "targets": length + max(len(q.targets) for q in questions),
        }
        batch = self.layout.batch(rows, lengths)
        first = batch["decoder_loss_weights"].argmax(axis=1) + np.array([len(q.targets) for q in questions])
        return np.asarray(self._write(params, batch, first, length))

    def _greedy(self, params, batch, first, length):
        rows = jnp.arange(len(first))

        def step(index, carry):
            tokens, written = carry
            with use_mesh(self.blueprint.mesh):
                model, hidden = self._hidden(params, {**batch, "decoder_input_tokens": tokens})
                logits = model.logits(hidden[rows, first + index][:, None])[:, 0, : self.place.vocabulary.vocab_size]
            token = logits.argmax(axis=-1).astype(jnp.int32)
            tokens = tokens.at[rows, first + index + 1].set(token, mode="drop")
            return tokens, written.at[:, index].set(token)

        start = (jnp.asarray(batch["decoder_input_tokens"]), jnp.zeros((len(first), length), jnp.int32))
        return jax.lax.fori_loop(0, length, step, start)[1]

    def choose(self, params, texts, labels, mode, rows=32):
        """For each text (int32 [n]) the index of the label (int32 [n], closed by EOS) with the highest likelihood."""
        prefix, setting = self.place.mode(mode), self.place.setting
        lengths = {"inputs": setting.text_length + 2, "targets": max(map(len, labels))}
        chosen = []
        for start in range(0, len(texts), rows):
            asked = texts[start : start + rows]
            batches = [
                self.layout.batch(
                    [[Example(text, label, 0, prefix)] for text in asked] + [[]] * (rows - len(asked)), lengths
                )
                for label in labels
            ]
            # What the labels have in common is computed once: the encoder.
            own = {n for n in batches[0] if self.architecture == "decoder_only" or not n.startswith("encoder_")}
            batch = {n: np.stack([b[n] for b in batches]) if n in own else batches[0][n] for n in batches[0]}
            chosen.append(np.asarray(self._choose(params, batch, frozenset(own)))[: len(asked)])
        return np.concatenate(chosen)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def _choose(self, params, batch, own):
        def likelihood(batch):
            return (self._log_likelihoods(params, batch) * batch["decoder_loss_weights"]).sum(axis=1)

        return jax.vmap(likelihood, in_axes=({name: 0 if name in own else None for name in batch},))(batch).argmax(0)


def held_out_texts(place):
    """The beginnings of some held-out documents, the same for every arm; int32 [n] each."""
    setting, texts = place.setting, []
    for split in place.splits("validation"):
        lengths = np.diff(split.offsets)
        chosen = np.flatnonzero(lengths >= 16)[: setting.held_out_documents]
        texts += [split.documents(int(i), int(i) + 1)[0][: setting.held_out_length] for i in chosen]
    return texts


def continuation(place, architecture, form, begun, rest):
    """The question how `begun` goes on; of the targets just `rest` counts."""
    vocabulary = place.vocabulary
    end, sentinel = [vocabulary.eos_id], [vocabulary.sentinel_id(0)]
    if form == "causal":
        given, inputs = begun, [] if architecture == "decoder_only" else end
    elif form == "sentinel":
        given, inputs = sentinel, [*begun, *sentinel, *end]
    else:
        given, inputs = [], [*begun, *end]
    return Question(inputs, [*given, *rest], np.arange(len(given) + len(rest)) >= len(given))


def blanks(place, texts):
    """R(3, .15) of the texts; sentinels and EOS do not count."""
    vocabulary, questions = place.vocabulary, []
    for number, text in enumerate(texts):
        example = SpanCorruption()(text, np.random.default_rng(number), vocabulary)
        special = (example["targets"] >= vocabulary.vocab_size - vocabulary.num_sentinels) | (
            example["targets"] == vocabulary.eos_id
        )
        questions.append(Question(example["inputs"], example["targets"], ~special))
    return questions


def overlap(place, written, reference):
    """F1 of the bags of tokens of a continuation, up to its EOS, and of what really follows."""
    ends = np.flatnonzero(written == place.vocabulary.eos_id)
    written = written[: ends[0]] if len(ends) else written
    common = sum((Counter(written.tolist()) & Counter(reference.tolist())).values())
    return 2 * common / (len(written) + len(reference))


def measure(place, examiner, objective, params):
    """Losses and continuations right after pretraining."""
    arm, architecture, setting = OBJECTIVES[objective], examiner.architecture, place.setting
    texts = held_out_texts(place)
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    asked = {
        form: [continuation(place, architecture, form, *pair) for pair in halves]
        for form in ("prefix", "sentinel", "causal")
    }
    spans = blanks(place, texts)
    result = {
        "lm_loss_by_form": {form: examiner.loss(params, asked[form], arm.write_mode) for form in asked},
        "span_loss": examiner.loss(params, spans, arm.fill_mode),
        "lm_targets": sum(int(q.counted.sum()) for q in asked["prefix"]),
        "span_targets": sum(int(q.counted.sum()) for q in spans),
    }
    result["lm_loss"] = result["lm_loss_by_form"][arm.continuation]

    start, stop = setting.prompt_length, setting.prompt_length + setting.written_length
    long = [text for text in texts if len(text) >= stop][: setting.prompts]
    prompts = [continuation(place, architecture, arm.continuation, text[:start], []) for text in long]
    modes = MODES if arm.preset.startswith("ul2") else (arm.write_mode,)
    written = {str(mode): examiner.write(params, prompts, mode) for mode in modes}
    result["overlap"] = float(
        np.mean([overlap(place, w, t[start:stop]) for w, t in zip(written[str(arm.write_mode)], long, strict=True)])
    )
    if len(modes) > 1:
        result["modes"] = {
            "lm_loss": {str(mode): examiner.loss(params, asked[arm.continuation], mode) for mode in modes},
            "span_loss": {str(mode): examiner.loss(params, spans, mode) for mode in modes},
            "continuations_that_differ": {
                f"{a} {b}": float((written[a] != written[b]).any(axis=1).mean())
                for a, b in itertools.combinations(written, 2)
            },
        }
    return result


def fine_tune(place, examiner, objective, params, seed):
    """Accuracy on held-out texts after a short fine-tuning on few examples, by rank among the labels."""
    setting, vocabulary = place.setting, place.vocabulary
    blueprint, mode = examiner.blueprint, OBJECTIVES[objective].fill_mode
    task = json.loads(Path(place.work_dir, "task.json").read_text(encoding="utf-8"))
    names = sorted({label for _, label in task["train"]})
    labels = [np.append(vocabulary.encode(name), vocabulary.eos_id).astype(np.int32) for name in names]

    def encoded(text):
        return np.append(vocabulary.encode(text)[: setting.text_length], vocabulary.eos_id).astype(np.int32)

    rng = np.random.default_rng(seed)
    pool = {name: [encoded(text) for text, label in task["train"] if label == name] for name in names}
    examples = [
        Example(pool[name][i], labels[number], 0, place.mode(mode))
        for number, name in enumerate(names)
        for i in rng.permutation(len(pool[name]))[: setting.examples_per_label]
    ]
    steps, rows = setting.fine_tuning_steps, setting.fine_tuning_rows
    transform = make_updates(setting.fine_tuning_peak, steps, max(steps // 10, 1)).build(blueprint.axes)
    loss = functools.partial(language_model_loss, num_components=1)
    step = make_train_step(blueprint, loss, transform, seed=seed)
    state = blueprint.init_state(params, transform)
    lengths = {"inputs": setting.text_length + 2, "targets": max(map(len, labels))}
    order = itertools.chain.from_iterable(rng.permutation(len(examples)) for _ in itertools.count())
    for _ in range(steps):
        batch = examiner.layout.batch([[examples[i]] for i in itertools.islice(order, rows)], lengths)
        state, metrics = step(state, batch)
    texts = [encoded(text) for text, _ in task["test"]]
    truth = np.array([names.index(label) for _, label in task["test"]])
    right = examiner.choose(state.params, texts, labels, mode) == truth
    return {
        "accuracy": float(right.mean()),
        "accuracy_by_label": {name: float(right[truth == number].mean()) for number, name in enumerate(names)},
        "fine_tuning_examples": len(examples),
        "fine_tuning_loss": float(metrics["loss"]),
        "tested": len(texts),
    }


def sample_task(setting):
    """{'train', 'test': [[text, label]]} of the shipped sample: few held-out texts of each label, titles removed."""
    found = {"train": [], "test": []}
    for name in ("biomedical", "general"):
        with gzip.open(study.ROOT / f"data/sample/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                keys = ((record["source"], record.get("section")), (record["source"], None))
                label = next((SAMPLE_LABELS[key] for key in keys if key in SAMPLE_LABELS), None)
                if label is not None:
                    title = record["title"].replace("_", " ") if record["source"] == "wordnet" else record["title"]
                    text = record["text"].removeprefix(title).lstrip(".: ")
                    found["train" if record["split"] == "train" else "test"].append([text, label])
    return {"train": found["train"], "test": _few(found["test"], setting.tested_per_label)}


def labelled_task(file, setting):
    """The same of a table with the columns split, label and text."""
    found = {"train": [], "test": []}
    try:
        with gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
            for record in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                found["train" if record["split"] == "train" else "test"].append([record["text"], record["label"]])
    except (OSError, KeyError) as error:
        raise UserError(
            f"--labelled={file}: {error}; give a gzipped table with the columns split, label, text."
        ) from error
    return {"train": found["train"], "test": _few(found["test"], setting.tested_per_label)}


def _few(examples, most):
    """At most so many of each label, drawn once."""
    count, chosen = Counter(), []
    for number in np.random.default_rng(0).permutation(len(examples)):
        text, label = examples[number]
        count[label] += 1
        if count[label] <= most:
            chosen.append([text, label])
    return chosen
