"""What a run can start from."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from tiny import CONFIG, blueprint, mesh

from t5x_domain.conversion.checkpoint import Checkpoint, SecondMoments
from t5x_domain.conversion.description import describe
from t5x_domain.conversion.formats import write_checkpoint
from t5x_domain.conversion.layout import leaves
from t5x_domain.conversion.native import find_params, open_native
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderDecoder, EncoderOnly
from t5x_domain.models.names import path_name
from t5x_domain.training.checkpoint import Checkpoints
from t5x_domain.training.initial import restore_params, starting_state
from t5x_domain.training.optimizer import Adafactor, AdamW, Updates
from t5x_domain.training.schedule import constant, rsqrt

VOCABULARY = ByteVocabulary(100)


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """What `starting_state` asks of a run."""

    init_from: str | None
    vocabulary: object = VOCABULARY
    model: type = EncoderDecoder
    config: object = CONFIG
    init_embedding: str | None = None
    init_longer: bool = False
    init_optimizer: bool = False
    seed: int = 5
    total_steps: int = 2000
    updates: object = None


@pytest.fixture(scope="module")
def plan():
    return blueprint()


@pytest.fixture(scope="module")
def transform(plan):
    return updates().build(plan.axes)


def updates(optimizer=None):
    return Updates(optimizer or Adafactor(min_dim_size_to_factor=16), constant(0.1))


@pytest.fixture(scope="module")
def state(plan, transform):
    return plan.init_state(plan.init(3), transform)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, state):
    """A run with checkpoints of steps 1 and 12."""
    folder = tmp_path_factory.mktemp("run")
    describe(folder, EncoderDecoder, CONFIG, VOCABULARY)
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (1, 12):
        checkpoints.save(state, step, {"step": step})
        checkpoints.wait()
    checkpoints.close()
    return folder


def named(params):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


def test_parts_by_name(plan, state, finished):
    found, left, _ = restore_params(open_native(finished), plan, include=["^encoder/", "embedding/embedding"])
    names = named(state.params)
    assert set(found) == {name for name in names if name.startswith("encoder/") or name == "embedding/embedding"}
    assert set(found) | set(left) == set(names)
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, names[name])


@pytest.mark.parametrize("shape", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_value_and_every_place(finished, state, shape, scan_layers):
    """Layers stacked or not, on any mesh."""
    plan = blueprint(mesh(**shape), config=dataclasses.replace(CONFIG, scan_layers=scan_layers))
    found, left, _ = restore_params(open_native(finished), plan)
    assert left == []
    targets = named(plan.abstract_params)
    stored = open_native(finished).tensors
    for leaf in leaves(EncoderDecoder, plan.config):
        array = found[leaf.name]
        expected = np.stack([stored[part].read() for part in leaf.parts])
        np.testing.assert_array_equal(array, expected if leaf.stacked else expected[0])
        assert array.sharding.is_equivalent_to(targets[leaf.name].sharding, array.ndim)


def test_another_shape_is_refused_or_reported(finished):
    wider = blueprint(config=dataclasses.replace(CONFIG, mlp_dim=256))
    with pytest.raises(UserError, match=r"ModelConfig.mlp_dim is 128 there and 256 in this run"):
        restore_params(open_native(finished), wider)
    with pytest.raises(UserError, match=r"mlp/inner/wi/0/kernel has shape \(64, 256\).*\(64, 128\)"):
        restore_params(open_native(finished), wider, include=["mlp"])
    found, left, _ = restore_params(open_native(finished), wider, strict=False)
    assert left and all("/mlp/" in name for name in left)
    assert "encoder/norm/scale" in found


@pytest.mark.parametrize(
    "changes", [{"norm_epsilon": 1e-5}, {"relative_bias_max_distance": 64}, {"mlp_activations": ("silu", "linear")}]
)
def test_what_no_shape_shows_is_refused_too(finished, changes):
    other = blueprint(config=dataclasses.replace(CONFIG, **changes))
    with pytest.raises(UserError, match=f"ModelConfig.{next(iter(changes))} is"):
        restore_params(open_native(finished), other)


def test_another_assembly_is_refused(finished):
    encoder = blueprint(model=EncoderOnly)
    with pytest.raises(UserError, match="its model is EncoderDecoder, this run's EncoderOnly"):
        restore_params(open_native(finished), encoder)
    assert restore_params(open_native(finished), encoder, strict=False).left == []


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"remat": "full"}, {"dropout_rate": 0.1}])
def test_what_a_run_may_decide_is_not(finished, changes):
    assert restore_params(open_native(finished), blueprint(config=dataclasses.replace(CONFIG, **changes)))[1] == []


def test_where_parameters_are_found(tmp_path, monkeypatch, finished, plan):
    last = finished / "checkpoints" / "12" / "params"
    for path in (finished, finished / "checkpoints", finished / "checkpoints" / "12"):
        assert str(find_params(str(path))) == str(last)
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_params(str(tmp_path))
    monkeypatch.chdir(finished.parent)
    assert restore_params(open_native(finished.name), plan)[1] == []  # a relative path


class TestVocabulary:
    """The embedding's rows belong to pieces, not to numbers."""

    def test_another_one_is_refused(self, finished, plan):
        with pytest.raises(UserError, match="Run.init_embedding"):
            restore_params(open_native(finished), plan, vocabulary=ByteVocabulary(80))

    def test_rows_follow_their_tokens(self, finished, plan, state):
        fewer = ByteVocabulary(80)
        found = restore_params(open_native(finished), plan, vocabulary=fewer, init_embedding="mean").params
        before, after = np.asarray(state.params["embedding"]["embedding"]), found["embedding/embedding"]
        np.testing.assert_array_equal(after[:259], before[:259])
        np.testing.assert_array_equal(after[fewer.sentinel_id(0)], before[VOCABULARY.sentinel_id(0)])

    def test_what_does_not_say_its_vocabulary_cannot_be_fitted(self, finished, plan, capsys):
        silent = dataclasses.replace(open_native(finished), vocabulary=None)
        assert restore_params(silent, plan, vocabulary=VOCABULARY).left == []
        assert "taken to be the run's" in capsys.readouterr().out
        with pytest.raises(UserError, match="does not say its vocabulary"):
            restore_params(silent, plan, vocabulary=VOCABULARY, init_embedding="mean")

    def test_the_rest_may_be_taken_without_it(self, finished, plan):
        restore_params(open_native(finished), plan, vocabulary=ByteVocabulary(80), include=["coder/"])


@pytest.mark.parametrize("to_format", ["native", "huggingface"])
def test_a_run_starts_from_any_format(tmp_path, finished, plan, transform, state, to_format):
    write_checkpoint(open_native(finished), str(tmp_path / "model"), to_format)
    found, step = starting_state(
        SmallRun(str(tmp_path / "model")), plan, transform, Checkpoints(tmp_path / "run" / "checkpoints")
    )
    assert step == 0
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)


@pytest.fixture(scope="module")
def before(plan):
    """Three updates of an Adafactor run, the state after two, and the gradients."""
    rng = np.random.default_rng(0)
    transform = Updates(Adafactor(min_dim_size_to_factor=16), functools.partial(rsqrt, base=1.0)(warmup_steps=10))
    transform = transform.build(plan.axes)
    gradients = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), plan.shapes)
    state = plan.init_state(plan.init(3), transform)
    steps = []
    for _ in range(3):
        change, opt_state = jax.jit(transform.update)(gradients, state.opt_state, state.params)
        state = dataclasses.replace(
            state, step=state.step + 1, params=optax.apply_updates(state.params, change), opt_state=opt_state
        )
        steps.append(state)
    return transform, gradients, steps


class TestSecondMoments:
    """A run of T5X goes on here."""

    @staticmethod
    def carried(state) -> Checkpoint:
        """The state as a reader of another format hands it on: by layer, unused slots left out."""
        is_factored = lambda node: isinstance(node, optax.FactoredState)  # noqa: E731
        factored = [
            n for n in jax.tree.leaves(state.opt_state, is_leaf=is_factored) if isinstance(n, optax.FactoredState)
        ]
        by_name = {leaf.name: leaf for leaf in leaves(EncoderDecoder, CONFIG)}
        slots, tensors = {}, {}
        for name, value in named(state.params).items():
            leaf = by_name[name]
            for layer, part in enumerate(leaf.parts):
                tensors[part] = Tensor.of(np.asarray(value[layer] if leaf.stacked else value))
        for node in factored:
            for slot in ("v_row", "v_col", "v"):
                for name, value in named(getattr(node, slot)).items():
                    leaf = by_name[name]
                    for layer, part in enumerate(leaf.parts):
                        array = np.asarray(value[layer] if leaf.stacked else value)
                        if array.shape != (1,):
                            slots.setdefault(part, {})[slot] = array
        moments = SecondMoments(int(state.step), slots)
        return Checkpoint("t5x", EncoderDecoder, CONFIG, tensors, VOCABULARY, moments).checked()

    def test_the_next_update_is_that_of_an_undisturbed_run(self, tmp_path, before, plan):
        transform, gradients, (_, second, third) = before
        write_checkpoint(self.carried(second), str(tmp_path / "model"), "native")
        run = SmallRun(str(tmp_path / "model"), init_optimizer=True)
        state, step = starting_state(run, plan, transform, Checkpoints(tmp_path / "run" / "checkpoints"))
        assert step == int(state.step) == 2
        jax.tree.map(np.testing.assert_array_equal, state.opt_state, second.opt_state)
        change, _ = jax.jit(transform.update)(gradients, state.opt_state, state.params)
        jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(state.params, change), third.params)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"total_steps": 2}, "set TRAIN_STEPS"),
            ({"updates": updates(AdamW())}, "the run uses AdamW"),
            ({"updates": updates(Adafactor())}, "has shape"),
        ],
    )
    def test_what_cannot_go_on(self, tmp_path, before, plan, changes, message):
        write_checkpoint(self.carried(before[2][1]), str(tmp_path / "model"), "native")
        run = SmallRun(str(tmp_path / "model"), init_optimizer=True, **changes)
        transform = (run.updates or updates()).build(plan.axes)
        with pytest.raises(UserError, match=message):
            starting_state(run, plan, transform, Checkpoints(tmp_path / "run" / "checkpoints"))

    def test_they_belong_to_the_vocabulary(self, tmp_path, before, plan, capsys):
        write_checkpoint(self.carried(before[2][1]), str(tmp_path / "model"), "native")
        run = SmallRun(str(tmp_path / "model"), ByteVocabulary(80), init_optimizer=True, init_embedding="mean")
        with pytest.raises(UserError, match="no optimizer state for this vocabulary"):
            starting_state(run, plan, before[0], Checkpoints(tmp_path / "run" / "checkpoints"))
        assert "the optimizer's state was left behind" in capsys.readouterr().out

    def test_none_may_be_missing(self, tmp_path, before, plan):
        checkpoint = self.carried(before[2][1])
        slots = {name: value for name, value in checkpoint.second_moments.slots.items() if "encoder/1/mlp" not in name}
        fewer = dataclasses.replace(checkpoint, second_moments=SecondMoments(2, slots))
        write_checkpoint(fewer, str(tmp_path / "model"), "native")
        run = SmallRun(str(tmp_path / "model"), init_optimizer=True)
        with pytest.raises(UserError, match="is missing for encoder/1/mlp/"):
            starting_state(run, plan, before[0], Checkpoints(tmp_path / "run" / "checkpoints"))

    def test_a_run_has_none(self, tmp_path, finished, plan, transform):
        run = SmallRun(str(finished), init_optimizer=True)
        with pytest.raises(UserError, match="there is no optimizer state"):
            starting_state(run, plan, transform, Checkpoints(tmp_path / "run" / "checkpoints"))
