"""Phases in whole runs: what is recorded of them, and the recipes in gin/recipes/."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from t5x_domain import cli
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.tasks import Mixture
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.prefix import Mode

VOCABULARY = ByteVocabulary(extra_ids=100)


class Notice:
    """Told to stop at a certain question, which comes once in a step."""

    def __init__(self, stops_at):
        self._left = stops_at

    def poll(self):
        self._left -= 1
        return self._left == 0

    def close(self):
        pass


def test_what_was_seen_is_counted_once_across_an_interruption(two_corpora, monkeypatch):
    """Stopped after 10 steps, between the logged steps 8 and 12."""
    import jax

    from t5x_domain.data.preparation import prepare
    from t5x_domain.training import loop
    from t5x_domain.training.run import Run

    monkeypatch.setattr("jax.devices", lambda *_: jax.local_devices()[:1])
    files = ["models/tiny", "mixtures/sample", "runs/pretrain", "recipes/upsampling"]
    cli.load_gin([f"gin/{file}.gin" for file in files], [*two_corpora, "UPSAMPLED_RATES = [9.0, 1.0]"])
    cli.build(prepare)
    run = cli.build(Run)
    assert loop.train(run) == 0
    stopped = dataclasses.replace(run, run_dir=f"{run.run_dir}-stopped")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "PreemptionNotice", lambda: Notice(10))
        assert loop.train(stopped) == loop.EXIT_PREEMPTED
    assert loop.train(stopped) == 0
    assert (Path(stopped.run_dir) / "phases.json").read_bytes() == (Path(run.run_dir) / "phases.json").read_bytes()


def test_conditional_evaluation_puts_metadata_where_training_did(two_corpora, monkeypatch):
    """Held-out text without, with its own, with given metadata, and in another mode: what the model gets to read."""
    import jax

    from t5x_domain.data.preparation import prepare
    from t5x_domain.training.feed import Feed
    from t5x_domain.training.run import Run

    monkeypatch.setattr("jax.devices", lambda *_: jax.local_devices()[:1])
    files = ["models/tiny", "mixtures/sample", "runs/pretrain", "recipes/meco"]
    settings = ["Metadata.templates = ('Source: {source} ',)", "Metadata.rate = 0.5", "DENOISERS = 'ul2_442'"]
    scored = ["Run.eval_mixture = @s/mixture_of_denoisers()", "s/mixture_of_denoisers.denoisers = 's_only'"]
    cli.load_gin([f"gin/{file}.gin" for file in files], [*two_corpora, *settings, *scored])
    cli.build(prepare)
    run = cli.build(Run)
    feed = Feed(run, run.mesh.build())

    targets = []

    def starts(**conditions):
        """The first bytes that the encoder reads of every held-out example."""
        read = []
        targets.append([])

        def eval_step(params, batch):
            tokens = np.asarray(batch["encoder_input_tokens"])
            for row, start in np.argwhere(
                (np.asarray(batch["encoder_positions"]) == 0) & (np.asarray(batch["encoder_segment_ids"]) > 0)
            ):
                read.append(VOCABULARY.decode(tokens[row, start : start + 30]))
            targets[-1].append(np.asarray(batch["decoder_target_tokens"]))
            return {"nll": 1.0, "correct": 0.0, "weight": 1.0}

        feed.held_out(eval_step, None, **conditions)
        return read

    own = tuple(f"Source: {corpus}{i} [S2S]" for corpus in ("biomedical", "general") for i in range(3))
    assert all(text.startswith("[S2S]") for text in starts())
    assert all(text.startswith(own) for text in starts(metadata="own"))
    assert all(text.startswith("Source: law [NLG]") for text in starts(metadata={"source": "law"}, mode=Mode("[NLG]")))
    assert not any(text.startswith(("[", "S")) for text in starts(mode=None))
    # The same text is scored under all conditions, in the same rows.
    for other in targets[1:]:
        np.testing.assert_array_equal(other, targets[0])
    with pytest.raises(UserError, match="the given metadata name the field court, but .* have only source"):
        starts(metadata={"court": "law"})
    bare = mixture_of_denoisers(run.phases[0].mixture.corpora, denoisers="t5", metadata=None)
    plain = dataclasses.replace(run, eval_mixture=bare)
    with pytest.raises(UserError, match="'biomedical_r3_15' was trained without metadata"):
        Feed(plain, run.mesh.build()).held_out(None, None, metadata="own")


def test_phases_may_not_give_one_name_to_two_objectives(two_corpora, monkeypatch):
    import jax

    from t5x_domain.data.preparation import prepare
    from t5x_domain.training.feed import Feed
    from t5x_domain.training.run import Run

    monkeypatch.setattr("jax.devices", lambda *_: jax.local_devices()[:1])
    cli.load_gin([f"gin/{f}.gin" for f in ("models/tiny", "mixtures/sample", "runs/pretrain")], two_corpora)
    cli.build(prepare)
    run = cli.build(Run)
    (component, *_) = run.phases[0].mixture.components
    changed = dataclasses.replace(component.objective, mean_span_length=8)
    other = Mixture("other", [dataclasses.replace(component, objective=changed)])
    with pytest.raises(UserError, match="different objectives named 'biomedical_r3_15'"):
        Feed(dataclasses.replace(run, eval_mixture=other), run.mesh.build())
    # A mix with causal LM trains an encoder-decoder, and its causal part is scored by itself.
    unilm = mixture_of_denoisers(run.phases[0].mixture.corpora, denoisers="unilm")
    feed = Feed(dataclasses.replace(run, phases=[Phase(unilm)], packing="first_fit"), run.mesh.build())
    assert len(feed.eval_components) == 6


@pytest.fixture
def two_corpora(tmp_path):
    """gin bindings for two corpora of 300 documents with sources, as bytes."""
    rng = np.random.default_rng(0)
    for name in ("biomedical", "general"):
        records = [
            {
                "text": " ".join(rng.choice(["law", "cell", "of", "the", "tissue"], rng.integers(3, 25))),
                "source": f"{name}{i % 3}",
                "split": ("train", "train", "validation", "test")[i % 4],
            }
            for i in range(300)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    bindings = {
        "BIOMEDICAL": repr(str(tmp_path / "biomedical.jsonl")),
        "GENERAL": repr(str(tmp_path / "general.jsonl")),
        "CACHE_DIR": repr(str(tmp_path / "cache")),
        "RUN_DIR": repr(str(tmp_path / "run")),
        "VOCABULARY": "@ByteVocabulary()",
        "ByteVocabulary.extra_ids": 256,
        "ModelConfig.vocab_size": 640,
        "ModelConfig.embed_dim": 16,
        "ModelConfig.mlp_dim": 16,
        "ModelConfig.num_heads": 1,
        "ModelConfig.head_dim": 16,
        "ModelConfig.num_encoder_layers": 1,
        "ModelConfig.num_decoder_layers": 1,
        "LENGTHS": {"inputs": 64, "targets": 64},
        "BATCH_SIZE": 8,
        "TRAIN_STEPS": 20,
        "VOCABULARY_SIZE": None,
        "prepare.inputs_length": None,
        "Run.eval_batches": 1,
        "Run.log_every": 4,
    }
    return [f"{name} = {value}" for name, value in bindings.items()]


RECIPES = {
    # name: (bindings, start of each phase)
    "meco": (["Metadata.templates = ('Source: {source} ',)"], [0, 18]),
    "upsampling": (["UPSAMPLED_RATES = [9.0, 1.0]"], [0, 17]),
    "replay": (["REPLAY_RATES = [0.9, 0.1]"], [0]),
    "rewarm": (["REWARMED_STEPS = 8", "rewarmed/cosine.warmup_steps = 2"], [0, 12]),
    "stability_gap": (
        ["SUBSET = {'biomedical': 20}", "Run.packing = 'first_fit'", "Batches.rows_per_window = 8"],
        None,
    ),
    "ul2r": ([], [0]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run(name, two_corpora, monkeypatch, capsys):
    """Each file of gin/recipes trains, and what it promises is in the logs."""
    import jax

    from t5x_domain.data.preparation import prepare
    from t5x_domain.training.loop import train
    from t5x_domain.training.run import Run

    monkeypatch.setattr("jax.devices", lambda *_: jax.local_devices()[:1])
    bindings, starts = RECIPES[name]
    files = ["models/tiny", "mixtures/sample", "runs/pretrain", f"recipes/{name}"]
    cli.load_gin([f"gin/{file}.gin" for file in files], [*two_corpora, *bindings])
    cli.build(prepare)
    run = cli.build(Run)
    folder = Path(run.run_dir)
    if name == "ul2r":  # a finished model of another objective
        base = mixture_of_denoisers(run.phases[0].mixture.corpora, denoisers="t5")
        finished = dataclasses.replace(run, run_dir=str(folder / "base"), phases=[Phase(base)], total_steps=4)
        assert train(finished) == 0
        run = dataclasses.replace(run, init_from=finished.run_dir, eval_mixture=base)
    assert train(run) == 0
    phases = json.loads((folder / "phases.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if starts is not None:
        assert [phase["start"] for phase in phases] == starts
    assert phases[-1]["stop"] == 20 and all(phase["raw_tokens"] > 0 for phase in phases)
    corpora = [phase["corpora"] for phase in phases]
    rates = [line["learning_rate"] for line in lines]  # of steps 4, 8, 12, 16, 20
    if name == "meco":
        metadata = [phase.components[0].metadata.rate for phase in run.phases]
        assert metadata == [1.0, 0.0]
        assert len(set(rates)) == 1, "rsqrt during its warm-up: the schedule goes on"
    elif name == "upsampling":
        assert corpora[0]["biomedical"] == pytest.approx(0.5, abs=0.1)
        assert corpora[1]["biomedical"] == pytest.approx(0.9, abs=0.1)
    elif name == "replay":
        assert corpora[0] == pytest.approx({"biomedical": 0.9, "general": 0.1}, abs=0.05)
    elif name == "rewarm":
        # Steps 13 … 20 are steps 0 … 7 of the phase: 16 is its step 3, half a cosine of 6 steps after 2 of warm-up.
        assert rates[:3] == [rates[0]] * 3
        assert rates[3:] == pytest.approx([0.01 * (1 + np.cos(np.pi * n / 6)) / 2 for n in (1, 5)], rel=1e-5)
    elif name == "stability_gap":
        assert [phase["name"] for phase in phases] == ["subset", "whole"]
        assert 0 < phases[1]["start"] < 20
    else:
        before = json.loads((folder / "eval.json").read_text())["before"]
        assert before == json.loads((folder / "base" / "eval.json").read_text())["after"] | {"step": 0}
        assert phases[0]["denoisers"] == pytest.approx(
            {"s": 0.5, "r3_15": 0.25, "x32_15": 0.125, "x32_50": 0.125}, abs=0.04
        )
        assert rates[-1] == pytest.approx(1e-6 + (1e-4 - 1e-6) * (1 + np.cos(np.pi * 19 / 20)) / 2, rel=1e-4)


def trained_to_the_bit(run, monkeypatch):
    """What a run learns, which stopped after 3 steps it learns as well, to the bit."""
    from t5x_domain.conversion.native import open_native
    from t5x_domain.training import loop

    assert loop.train(run) == 0
    stopped = dataclasses.replace(run, run_dir=f"{run.run_dir}-stopped", export_on_finish=None)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "PreemptionNotice", lambda: Notice(3))
        assert loop.train(stopped) == loop.EXIT_PREEMPTED
    assert loop.train(stopped) == 0
    ours, again = (open_native(folder) for folder in (run.run_dir, stopped.run_dir))
    for name, tensor in ours.tensors.items():
        np.testing.assert_array_equal(again.tensors[name].read(), tensor.read(), err_msg=name)
    return ours


def test_replaced_token_detection_on_eight_devices(two_corpora, monkeypatch, capsys, tmp_path):
    """Stopped after 3 of 6 steps it ends to the bit as if it was not; what it leaves is an encoder."""
    from t5x_domain.conversion.formats import open_checkpoint
    from t5x_domain.conversion.rtd import discriminator
    from t5x_domain.data.preparation import prepare
    from t5x_domain.training.run import Run

    files = ["models/tiny", "mixtures/sample", "runs/rtd"]
    settings = [
        "MODEL = @ReplacedTokenDetection",
        "Run.packing = 'first_fit'",
        "MeshShape.data = 1",
        "MeshShape.fsdp = 8",
        "TRAIN_STEPS = 6",
        "Run.log_every = 1",
        "linear.peak = 0.01",
        "linear.warmup_steps = 1",
        "mixture_of_denoisers.metadata = @Metadata()",
        "Metadata.templates = ('Source: {source} ',)",
        "Updates.groups = {'^generator/': @generator/ParameterGroup()}",
        "generator/ParameterGroup.optimizer = @AdamW()",
        "generator/ParameterGroup.schedule = @generator/linear()",
        "generator/linear.peak = 0.001",
        "generator/linear.total_steps = 6",
    ]
    cli.load_gin([f"gin/{file}.gin" for file in files], [*two_corpora, *settings])
    cli.build(prepare)
    run = dataclasses.replace(cli.build(Run), export_on_finish=str(tmp_path / "hf"))
    ours = trained_to_the_bit(run, monkeypatch)
    assert "held-out binary cross-entropy" in capsys.readouterr().out
    scores = json.loads((Path(run.run_dir) / "eval.json").read_text())
    for corpus in ("biomedical", "general"):
        before, after = (scores[when][corpus] for when in ("before", "after"))
        assert after["loss"] < before["loss"] and after["generator_loss"] < before["generator_loss"]
        assert "perplexity" not in after and after["without_room"] == 0
    exported, encoder = open_checkpoint(str(tmp_path / "hf")), discriminator(ours)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["T5EncoderModel"]
    assert exported.tensors.keys() == encoder.tensors.keys()
    for name, tensor in encoder.tensors.items():
        np.testing.assert_array_equal(exported.tensors[name].read(), tensor.read(), err_msg=name)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| corpus | binary cross-entropy | targets guessed right |" in card and "| layers | 1 encoder |" in card


def test_ul2_with_detection_on_eight_devices(two_corpora, monkeypatch, tmp_path):
    """Stopped after 3 of 6 steps it ends to the bit as if it was not; what it leaves is an encoder-decoder."""
    import jax

    from t5x_domain.data.preparation import prepare
    from t5x_domain.inference.opened import open_model
    from t5x_domain.models.assemblies import EncoderDecoder
    from t5x_domain.models.rtd import DetectingEncoderDecoder
    from t5x_domain.training.run import Run

    files = ["models/tiny", "mixtures/sample", "runs/ul2_rtd"]
    settings = [
        "MeshShape.data = 1",
        "MeshShape.fsdp = 8",
        "TRAIN_STEPS = 6",
        "Run.log_every = 1",
        "rsqrt.warmup_steps = 100",
        "DENOISERS = 't5'",
        "detection/schedule.constant.warmup_steps = 4",
        "mixture_of_denoisers.metadata = @Metadata()",
        "Metadata.templates = ('Source: {source} ',)",
    ]
    cli.load_gin([f"gin/{file}.gin" for file in files], [*two_corpora, *settings])
    cli.build(prepare)
    run = dataclasses.replace(cli.build(Run), export_on_finish=str(tmp_path / "hf"))
    assert run.model is DetectingEncoderDecoder
    trained_to_the_bit(run, monkeypatch)
    scores = json.loads((Path(run.run_dir) / "eval.json").read_text())
    for corpus in ("biomedical", "general"):
        before, after = (scores[when][corpus] for when in ("before", "after"))
        assert after["perplexity"] < before["perplexity"] and after["generator_loss"] < before["generator_loss"]
        assert after["detection_loss"] < before["detection_loss"] and after["without_room"] == 0
    # The schedule is in the loss: at the first step its weight is 0, so it is the decoder's, a mean over its corpora.
    lines = [json.loads(line) for line in (Path(run.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert min(lines[0]["corpus_loss"].values()) <= lines[0]["loss"] <= max(lines[0]["corpus_loss"].values()) + 0.1
    assert lines[5]["loss"] > max(lines[5]["corpus_loss"].values()) + 1
    ours, exported = open_model(run.run_dir), open_model(str(tmp_path / "hf"))
    assert ours.blueprint.model_class is exported.blueprint.model_class is EncoderDecoder
    tokens = np.random.default_rng(0).integers(3, 259, (2, 2, 8)).astype(np.int32)

    def logits(plan, params):
        def of(params):
            model = plan.merge(params)
            return model.logits(model(*tokens))

        return np.asarray(jax.jit(of)(params))

    wanted = logits(ours.blueprint, ours.params)
    np.testing.assert_array_equal(logits(exported.blueprint, exported.params), wanted)


@pytest.mark.parametrize(
    ("model", "loss"),
    [("EncoderDecoder", "denoising_with_detection_loss"), ("DetectingEncoderDecoder", "language_model_loss")],
)
def test_model_and_loss_that_do_not_go_together(two_corpora, model, loss):
    from t5x_domain.data.preparation import prepare
    from t5x_domain.training import loop
    from t5x_domain.training.run import Run

    settings = [*two_corpora, f"MODEL = @{model}", f"Run.loss = @{loss}"]
    cli.load_gin([f"gin/{file}.gin" for file in ("models/tiny", "mixtures/sample", "runs/ul2_rtd")], settings)
    cli.build(prepare)
    with pytest.raises(
        UserError, match=f"Run.model = {model} does not learn with Run.loss = {loss}; @Detecting.* go t"
    ):
        loop.train(cli.build(Run))
