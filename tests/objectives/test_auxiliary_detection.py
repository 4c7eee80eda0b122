import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact import MESHES, assert_exact, loss_and_gradients
from jax.sharding import NamedSharding, PartitionSpec
from tiny import CONFIG, LOSS, VOCAB, batch, blueprint, mesh

from t5x_domain.data import packing
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder
from t5x_domain.models.names import path_name
from t5x_domain.models.rtd import DetectingEncoderDecoder
from t5x_domain.objectives import auxiliary_detection
from t5x_domain.objectives.auxiliary_detection import choose, denoising_with_detection_loss, masked
from t5x_domain.objectives.losses import language_model_loss
from t5x_domain.objectives.span_corruption import SpanCorruption
from t5x_domain.training.schedule import constant
from t5x_domain.training.step import make_train_step

CONFIG = dataclasses.replace(
    CONFIG,
    embed_dim=32,
    mlp_dim=32,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    scan_layers=False,
    rtd_generator_width=0.5,
)
MASK = VOCAB - 1
BOTH = functools.partial(denoising_with_detection_loss, num_components=2, mask_id=MASK)


def rows_of(seed=0):
    """As `tiny.batch`: the first two tokens of a segment are its prefix, and some others sentinels."""
    rows = {name: value for name, value in batch(seed=seed).items() if name not in UNUSED}
    sentinel = np.random.default_rng(seed).random(rows["encoder_positions"].shape) < 0.1
    text = (rows["encoder_segment_ids"] > 0) & (rows["encoder_positions"] >= 2) & ~sentinel
    return {**rows, "encoder_token_weights": text.astype(np.float32)}


UNUSED = ("encoder_target_tokens", "encoder_loss_weights", "decoder_prefix")


def by_name(tree):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


# --- what is chosen ---


def test_the_exact_share_of_each_row_is_chosen_and_nothing_but_text():
    """Rows of 0 to 40 tokens of text among 40; np.round and jnp.round both round half to even."""
    rng = np.random.default_rng(0)
    text = rng.permuted(np.arange(40) < np.arange(41)[:, None], axis=1)
    draw = jax.jit(choose, static_argnums=2)
    for seed in range(20):
        chosen = np.asarray(draw(jax.random.key(seed), text, 0.15))
        assert not (chosen & ~text).any()
        wanted = np.maximum(np.round(np.arange(41) * 0.15), 1)
        np.testing.assert_array_equal(chosen.sum(axis=1), [0, *wanted[1:]])
    # All alike: 2,000 draws of 6 from 40, each 300 times, with a deviation of sqrt(2000 * 0.15 * 0.85) = 16.
    whole = np.ones((2000, 40), bool)
    assert np.abs(np.asarray(draw(jax.random.key(0), whole, 0.15)).sum(axis=0) - 300).max() < 5 * 16


def test_prefix_sentinels_and_ends_are_never_replaced():
    """Of packed rows as the loader makes them; all their other features are those of an encoder-decoder."""
    vocabulary, lengths = ByteVocabulary(extra_ids=20), {"inputs": 64, "targets": 32}
    objective, rng = SpanCorruption(), np.random.default_rng(0)
    layout = packing.DetectingEncoderDecoder(vocabulary)
    for seed in range(30):
        rows = [[_example(objective, vocabulary, rng) for _ in range(count)] for count in (2, 1, 0)]
        features = layout.batch(rows, lengths)
        plain = packing.EncoderDecoder().batch(rows, lengths)
        assert features.keys() - plain.keys() == {"encoder_token_weights"}
        for name, value in plain.items():
            np.testing.assert_array_equal(features[name], value)
        for row, examples in enumerate(rows):  # bytes have the ids 3 to 258, sentinels those above, EOS is 1
            wanted = [[*(0 * e.prefix), *((e.inputs >= 3) & (e.inputs < 259))] for e in examples]
            padding = np.zeros(64 - sum(map(len, wanted)))
            np.testing.assert_array_equal(features["encoder_token_weights"][row], np.concatenate([*wanted, padding]))
        found = masked(features, jax.random.key(seed), 0.15, vocabulary.mask_id)
        changed = found["encoder_input_tokens"] != features["encoder_input_tokens"]
        assert changed.any() and not (changed & (features["encoder_token_weights"] == 0)).any()
        np.testing.assert_array_equal(found["encoder_target_tokens"], features["encoder_input_tokens"])
        np.testing.assert_array_equal(found["encoder_loss_weights"] > 0, changed)
        # Each chosen token stands for those it was chosen from: the weights add up to the text.
        text = features["encoder_token_weights"].sum(axis=1)
        np.testing.assert_allclose(found["encoder_loss_weights"].sum(axis=1), text, rtol=8 * 2.0**-24)


def _example(objective, vocabulary, rng):
    made = objective(rng.integers(3, 259, rng.integers(8, 22)).astype(np.int32), rng, vocabulary)
    return packing.Example(made["inputs"], made["targets"], 0, rng.integers(3, 259, 5).astype(np.int32))


# --- the weight ---


def trained(plan, loss):
    """Losses of two updates with dropout, and parameters after each."""
    transform = optax.sgd(0.1)
    step = make_train_step(plan, loss, transform, seed=0)
    state, losses, params = plan.init_state(plan.init(0), transform), [], []
    for seed in range(2):
        state, metrics = step(state, rows_of(seed))
        losses.append(float(metrics["loss"]))
        params.append(by_name(jax.device_get(state.params)))
    return losses, params


def test_a_weight_of_zero_changes_nothing(monkeypatch):
    """To the bit: loss and update of an encoder-decoder, at the first step of a warm-up; at the second it is 1/4."""
    config = dataclasses.replace(CONFIG, dropout_rate=0.1, rtd_embedding_sharing="tied")
    monkeypatch.setattr(auxiliary_detection, "language_model_loss", functools.partial(language_model_loss, z_loss=1e-4))
    alone = trained(blueprint(config=config), LOSS)
    beside = blueprint(model=DetectingEncoderDecoder, config=config)
    both = trained(beside, functools.partial(BOTH, weight=constant(1.0, warmup_steps=4)))
    assert both[0][0] == alone[0][0] and both[0][1] > alone[0][1] + 1
    shared = {"embedding/embedding": "generator/embedding/embedding"}
    changed = set()
    for name, wanted in alone[1][0].items():
        first, second = (params[shared.get(name, name)] for params in both[1])
        np.testing.assert_array_equal(first, wanted, err_msg=name)
        changed |= {name} if not np.array_equal(second, alone[1][1][name]) else set()
    start = by_name(jax.device_get(beside.init(0)))
    assert "embedding/embedding" in changed and any(name.startswith("encoder/") for name in changed)
    for name in set(start) - set(alone[1][0]) - set(shared.values()):
        np.testing.assert_array_equal(both[1][0][name], start[name], err_msg=name)


# --- the gradient ---


@functools.cache
def made(**options):
    """Model and parameters; the difference of embeddings is not 0, as after some steps."""
    plan = blueprint(model=DetectingEncoderDecoder, config=dataclasses.replace(CONFIG, **options))
    params = plan.init(0)
    if "embedding_delta" in params:
        noise = np.random.default_rng(1).standard_normal(params["embedding_delta"].shape)
        params["embedding_delta"] = jnp.asarray(0.1 * noise, jnp.float32)
    return plan, params


@pytest.mark.parametrize("tie", [False, True])
def test_where_each_loss_reaches(tie):
    """With 'gdes' the shared table learns from the generator's loss alone, the difference from all others."""
    plan, params = made(rtd_embedding_sharing="gdes", tie_embeddings=tie, scale_logits=tie)
    rows = {**rows_of(), "step": jnp.int32(7)}

    @jax.jit
    def grad(weight, detection_weight):
        loss = functools.partial(BOTH, weight=lambda step: weight * step / 7, detection_weight=detection_weight)
        return jax.value_and_grad(lambda p: loss(plan.merge(p), rows, None), has_aux=True)(params)

    (alone, sums), plain = grad(0.0, 50.0)
    (generators, _), generator = grad(1.0, 0.0)
    (all_, _), both = grad(1.0, 50.0)
    plain, generator, both = (by_name(tree) for tree in (plain, generator, both))
    for name in both:
        reached = {"ul2": np.abs(plain[name]).max() > 0}
        reached["generator"] = not np.array_equal(generator[name], plain[name])
        reached["detection"] = not np.array_equal(both[name], generator[name])
        wanted = {
            "ul2": name.startswith(("encoder/", "decoder/", "embedding")),
            "generator": name.startswith("generator/"),
            "detection": name.startswith(("encoder/", "head/", "embedding_delta")),
        }
        assert reached == wanted, name
    # Means over the text, each on its own; and the step divides by the number of targets.
    ratio = {name: float(pair[0] / pair[1]) for name, pair in sums["ratios"].items()}
    targets = float(sums["weight"])
    rounding = 4 * 512 * 2.0**-24  # sums of at most 512 terms in another order
    assert float(alone) == pytest.approx(float(sums["nll"]), rel=rounding)
    wanted = float(sums["nll"]) / targets + ratio["generator_loss"]
    assert float(generators) / targets == pytest.approx(wanted, rel=rounding)
    assert float(all_) / targets == pytest.approx(wanted + 50 * ratio["detection_loss"], rel=rounding)


def test_held_out_scores_are_those_of_the_decoder():
    plan, params = made(rtd_embedding_sharing="gdes", tie_embeddings=False, scale_logits=False)
    model = plan.merge(params)
    value, sums = jax.jit(lambda: BOTH(model, rows_of(), None))()
    wanted = jax.jit(lambda: LOSS(model, rows_of(), None))()[1]
    assert float(value) == float(sums["nll"])
    for name, total in wanted.items():
        np.testing.assert_array_equal(sums[name], total, err_msg=name)
    text = rows_of()["encoder_token_weights"].sum()
    assert sums["ratios"]["detection_loss"][1] == text and sums["ratios"]["without_room"][0] == 0


# --- devices, parts of a batch ---


# Parts of a batch have keys of their own, so what is drawn must not depend on them: the likeliest of the first.
LIKELIEST = functools.partial(BOTH, weight=lambda step: 1 - step, share=0.25, temperature=1e-9)


def first_of(key, text, share):
    return text & (jnp.cumsum(text, axis=1) <= 1 + share * text.sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def exact():
    """In float64: the gradient's plan and parameters, and loss and gradients of one device."""
    config = dataclasses.replace(CONFIG, dtype="float64", tie_embeddings=True, scale_logits=True)
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patched:
        patched.setattr(auxiliary_detection, "choose", first_of)
        plan = blueprint(model=DetectingEncoderDecoder, config=config)
        params = jax.tree.map(
            lambda p: np.asarray(p, np.float64),
            made(rtd_embedding_sharing="gdes", tie_embeddings=True, scale_logits=True)[1],
        )
        yield config, params, loss_and_gradients(plan, LIKELIEST, params, rows_of())


def test_accumulation_equals_the_large_batch(exact):
    """The parts have other numbers of targets and of tokens of text."""
    config, params, wanted = exact
    targets, text = (rows_of()[name] for name in ("decoder_loss_weights", "encoder_token_weights"))
    assert targets[::2].sum() / targets.sum() != text[::2].sum() / text.sum()
    plan = blueprint(model=DetectingEncoderDecoder, config=config)
    assert_exact(loss_and_gradients(plan, LIKELIEST, params, rows_of(), accumulation_steps=2), wanted)


def test_loss_and_gradients_do_not_depend_on_the_mesh(exact):
    config, params, wanted = exact
    plan = blueprint(mesh(**MESHES["fsdp"]), DetectingEncoderDecoder, config)
    assert_exact(loss_and_gradients(plan, LIKELIEST, params, rows_of()), wanted)


def test_what_is_chosen_does_not_depend_on_the_mesh():
    text, draw = rows_of()["encoder_token_weights"] > 0, jax.jit(choose, static_argnums=2)
    wanted = draw(jax.random.key(0), text, 0.15)
    split = jax.device_put(text, NamedSharding(mesh(**MESHES["fsdp"]), PartitionSpec("fsdp")))
    np.testing.assert_array_equal(draw(jax.random.key(0), split, 0.15), wanted)


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weight": -1.0}, r"denoising_with_detection_loss\.weight = -1\.0: it must be 0 or more"),
        ({"detection_weight": -2.0}, r"detection_weight = -2\.0: it must be 0 or more"),
        ({"share": 0.0}, r"a share of 0\.0: set .* its share \(or max_share\) above 0 and at most 1"),
        ({"temperature": 0.0}, r"temperature = 0\.0 .* temperature above 0"),
    ],
)
def test_settings_out_of_range(options, named):
    plan = blueprint(model=DetectingEncoderDecoder, config=CONFIG)
    with pytest.raises(UserError, match=named):
        jax.eval_shape(lambda params: BOTH(plan.merge(params), rows_of(), None, **options), plan.shapes)


@pytest.mark.parametrize("model", [DecoderOnly, EncoderDecoder])
def test_another_model_is_refused(model):
    plan = blueprint(model=model, config=CONFIG)
    with pytest.raises(UserError, match=f"{model.__name__} has no generator .* MODEL = @DetectingEncoderDecoder"):
        BOTH(plan.merge(plan.shapes), rows_of(), None)
