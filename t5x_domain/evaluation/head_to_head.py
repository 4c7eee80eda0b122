"""A base model against the model adapted from it: both are asked, and the verdict is written, see `verdict`.

What a model answered is kept in the output folder as soon as it is there, by model, task and prompt, so the same
command goes on where an interrupted one stopped, and a finished comparison opens no model again.
"""

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from typing import Any

import gin
from etils import epath

from t5x_domain import files
from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.formats import open_checkpoint, state_of
from t5x_domain.conversion.rtd import discriminator
from t5x_domain.data.labelled import Task
from t5x_domain.data.tasks import Corpus
from t5x_domain.errors import UserError
from t5x_domain.evaluation import metrics, prompts
from t5x_domain.evaluation.asking import Kept, Prompted, Side
from t5x_domain.evaluation.document_scores import BITS_PER_BYTE, FEWEST_WORDS, NATS_PER_TOKEN
from t5x_domain.evaluation.fine_tuned import FineTuned, run_curves
from t5x_domain.evaluation.verdict import (
    Answers,
    Bootstrap,
    check_items,
    compare_corpus,
    compare_fine_tuned,
    compare_task,
    conclude,
    write_verdict,
)
from t5x_domain.evaluation.verdict_report import write_report
from t5x_domain.inference.decoding import Decoding
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder

DEFAULT_TEMPLATE = "{inputs}"
# Settings that change neither what models are asked nor what they answer.
_FREE = ("out_dir", "fine_tuned", "training_runs", "confidence", "resamples", "batch_size")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class HeadToHead:
    """What is compared, and how.

    Attributes:
      out_dir: where verdict.json, report.html and the answers go.
      tasks: asked with prompts; each needs the splits train, validation and test.
      templates: by task, templates to try beside the default "{inputs}", see `prompts.Prompt`.
      metrics: by task, names of `metrics.METRICS` instead of its own; the first decides.
      shots: worked examples in a prompt.
      num_few_shot_draws: draws of worked examples to try with each template.
      max_validation_items: a prompt is chosen on so many validation items; None for all.
      decoding: how answers are written that are not chosen among labels.
      domain_corpora, general_corpora: held-out text, on which the adapted model should gain, and should not forget.
      corpus_split: the split of the corpora that is scored.
      max_documents: of each corpus; None for all.
      max_document_words: documents are cut after so many words.
      fine_tuned: fine-tuned models to compare.
      training_runs: {name: run directory} whose training loss is drawn.
      confidence, resamples, seed: of the bootstrap; the seed also draws prompts, items, documents and hidden words.
      batch_size: rows asked at once.
    """

    out_dir: str
    tasks: Sequence[Task] = ()
    templates: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    shots: int = 3
    num_few_shot_draws: int = 10
    max_validation_items: int | None = 200
    decoding: Decoding = Decoding()
    domain_corpora: Sequence[Corpus] = ()
    general_corpora: Sequence[Corpus] = ()
    corpus_split: str = "validation"
    max_documents: int | None = 500
    max_document_words: int = 300
    fine_tuned: Sequence[FineTuned] = ()
    training_runs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Raises UserError for settings that nothing can be compared with."""
        for key, least in {"shots": 0, "num_few_shot_draws": 1, "max_document_words": FEWEST_WORDS}.items():
            if getattr(self, key) < least:
                raise UserError(f"HeadToHead.{key} = {getattr(self, key)}: it must be {least} or more.")
        if not (self.tasks or self.domain_corpora or self.general_corpora or self.fine_tuned):
            raise UserError("nothing to compare; set HeadToHead.tasks, domain_corpora, general_corpora or fine_tuned.")
        names = [task.name for task in self.tasks]
        for what, known in (("tasks", names), ("corpora", [corpus.name for _, corpus in self.corpora])):
            if len(set(known)) < len(known):
                raise UserError(f"HeadToHead: two {what} have the same name among {', '.join(known)}; rename one.")
        for key in ("templates", "metrics"):
            if unknown := [name for name in getattr(self, key) if name not in names]:
                raise UserError(f"HeadToHead.{key} names a task '{unknown[0]}', which HeadToHead.tasks does not have.")

    @property
    def corpora(self) -> list[tuple[str, Corpus]]:
        """(role, corpus) of all corpora."""
        roles = (("domain", self.domain_corpora), ("general", self.general_corpora))
        return [(role, corpus) for role, corpora in roles for corpus in corpora]

    @property
    def bootstrap(self) -> Bootstrap:
        """How intervals are made."""
        return Bootstrap(self.confidence, self.resamples, self.seed)


def head_to_head(settings: HeadToHead, base: str, adapted: str) -> epath.Path:
    """Compares, and writes verdict.json and report.html into `settings.out_dir`.

    Args:
      settings: what is compared.
      base, adapted: where the models are, in any format.

    Returns:
      The path of the report.

    Raises:
      UserError: a model, task or corpus is not fit for it, or the folder holds another comparison.
    """
    bootstrap = settings.bootstrap  # what is wrong with it is said before any model is asked
    paths = {"base": base, "adapted": adapted}
    checkpoints = {role: _checked(role, path) for role, path in paths.items()}
    prompted = [prepare_task(settings, task) for task in settings.tasks]
    measure = _measure(settings, checkpoints)
    texts, notes = _texts(settings, checkpoints, measure)
    notes += [
        f"{one.leaked} of {len(one.test)} test items of {one.task.name} also stand in its training or validation split."
        for one in prompted
        if one.leaked
    ]
    notes += [
        f"{one.name}: base and adapted were fine-tuned with different {', '.join(differences)}."
        for one in settings.fine_tuned
        if (differences := one.differences())
    ]
    kept = Kept(files.path(settings.out_dir), _identity(settings, paths))
    tuned = [compare_fine_tuned(one.name, one.metric, *one.predictions(), bootstrap) for one in settings.fine_tuned]
    curves = {title: runs for one in settings.fine_tuned for title, runs in one.curves().items()}
    curves |= run_curves(settings.training_runs)
    answers, costs = {}, {}
    for role, path in paths.items():  # one model in memory at a time
        side = Side(role, path, settings, kept)
        answers[role] = [side.answer(one) for one in prompted]
        costs[role] = [side.costs(corpus, texts[corpus.name], measure) for _, corpus in settings.corpora]
        del side
        gc.collect()  # compiled functions and the models they belong to refer to each other
    verdict = conclude(
        base,
        adapted,
        bootstrap,
        tasks=[_compared(*three, bootstrap) for three in zip(prompted, *answers.values(), strict=True)],
        perplexity=[
            compare_corpus(corpus.name, role, measure, *both, bootstrap)
            for (role, corpus), *both in zip(settings.corpora, *costs.values(), strict=True)
        ],
        fine_tuned=tuned,
        method=_method(settings),
        notes=notes,
    )
    write_verdict(verdict, settings.out_dir)
    return write_report(verdict, settings.out_dir, curves=curves)


def prepare_task(settings: HeadToHead, task: Task) -> Prompted:
    """Reads a task and draws its prompts.

    Raises:
      UserError: a split or field is missing, its kind or metrics do not suit prompts, or there is only one label.
    """
    names = settings.metrics.get(task.name, task.metrics)
    if unknown := [name for name in names if name not in metrics.METRICS]:
        raise UserError(
            f"task '{task.name}': metric '{unknown[0]}' cannot be resampled; set HeadToHead.metrics of the task to "
            f"some of {', '.join(metrics.METRICS)}."
        )
    if task.kind not in ("classification", "text_to_text", "spans"):
        raise UserError(f"task '{task.name}' of kind '{task.kind}' cannot be prompted; compare it in fine_tuned.")
    if task.kind == "classification" and len(task.labels) < 2:
        raise UserError(f"task '{task.name}' has {len(task.labels)} label to choose from; set its labels, two or more.")
    if missing := [split for split in ("train", "validation", "test") if split not in task.splits]:
        raise UserError(
            f"task '{task.name}' has no split '{missing[0]}'; prompts are drawn from train, chosen on "
            "validation and compared on test."
        )
    templates = list(dict.fromkeys([DEFAULT_TEMPLATE, *settings.templates.get(task.name, ())]))
    for template in templates:
        prompts.check_template(template, getattr(task, "target_field", None))
    train, validation, test = (task.examples(split) for split in ("train", "validation", "test"))
    check_items(f"task '{task.name}'", test)
    candidates = prompts.candidates(
        templates, train, shots=settings.shots, draws=settings.num_few_shot_draws, seed=settings.seed
    )
    return Prompted(
        task,
        names,
        prompts.subsample(validation, settings.max_validation_items, seed=settings.seed),
        test,
        candidates,
        prompts.leaked(test, train, validation),
    )


def _checked(role: str, path: str) -> Checkpoint:
    """The model's description; its parameters are not read yet."""
    checkpoint = discriminator(open_checkpoint(path, flag=f"--{role}"))
    if checkpoint.model not in (EncoderDecoder, DecoderOnly):
        raise UserError(f"--{role}={path}: {checkpoint.model.__name__} cannot write; compare it in fine_tuned.")
    if checkpoint.vocabulary is None:
        raise UserError(f"--{role}={path}: does not say its vocabulary; convert it first, naming its --vocabulary.")
    return checkpoint


def _measure(settings: HeadToHead, checkpoints: Mapping[str, Checkpoint]) -> str:
    base, adapted = checkpoints.values()
    if settings.corpora and base.model is not adapted.model:
        raise UserError(
            f"the base is {base.model.__name__}, the adapted model {adapted.model.__name__}: one fills blanks, the "
            "other writes on, so text costs them different things; leave domain_corpora and general_corpora empty."
        )
    same = base.vocabulary.fingerprint == adapted.vocabulary.fingerprint
    return NATS_PER_TOKEN if same else BITS_PER_BYTE


def _texts(
    settings: HeadToHead, checkpoints: Mapping[str, Checkpoint], measure: str
) -> tuple[dict[str, list[str]], list[str]]:
    """Documents of each corpus that both models are scored on, and what is to be said of them."""
    found, notes = {}, []
    if measure == BITS_PER_BYTE:
        notes.append("The models have different vocabularies: held-out text is compared in bits per byte only.")
    for _, corpus in settings.corpora:
        words = (document.text.split() for document in corpus.source.documents(settings.corpus_split))
        texts = [" ".join(some[: settings.max_document_words]) for some in words if len(some) >= FEWEST_WORDS]
        texts = prompts.subsample(texts, settings.max_documents, seed=settings.seed)
        if measure == BITS_PER_BYTE:  # an unknown piece is cheap, so a vocabulary would gain by what it cannot write
            known = [text for text in texts if all(_writes(one.vocabulary, text) for one in checkpoints.values())]
            if left_out := len(texts) - len(known):
                notes.append(f"{left_out} documents of {corpus.name} were left out: a vocabulary cannot write them.")
            texts = known
        if len(texts) < 2:
            raise UserError(
                f"corpus '{corpus.name}', split '{settings.corpus_split}': {len(texts)} documents of {FEWEST_WORDS} "
                "words or more, too few to compare models on; give more text."
            )
        found[corpus.name] = texts
    return found, notes


def _writes(vocabulary: Any, text: str) -> bool:
    return vocabulary.unk_id not in vocabulary.encode(text)


def _identity(settings: HeadToHead, paths: Mapping[str, str]) -> dict[str, str]:
    """What makes kept answers this comparison's."""
    models = {role: state_of(path, f"--{role}") for role, path in paths.items()}
    if models["base"] == models["adapted"]:
        raise UserError(f"--base and --adapted are the same model, {models['base']}; give two.")
    fields = [field.name for field in dataclasses.fields(settings) if field.name not in _FREE]
    return {**models, **{name: repr(getattr(settings, name)) for name in fields}}


def _compared(one: Prompted, base: Answers, adapted: Answers, bootstrap: Bootstrap) -> dict[str, Any]:
    labels = one.task.labels if one.task.kind == "classification" else None
    targets = [item.target for item in one.test]
    return compare_task(one.task.name, one.task.kind, one.metrics, targets, base, adapted, bootstrap, labels=labels)


def _method(settings: HeadToHead) -> dict[str, Any]:
    shown = ("shots", "num_few_shot_draws", "max_validation_items", "max_documents", "max_document_words", "templates")
    return {key: getattr(settings, key) for key in shown}
