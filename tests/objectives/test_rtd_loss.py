import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import MESHES, assert_exact, loss_and_gradients
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxpr_shapes import intermediate_shapes
from tiny import CONFIG, blueprint, masked_batch, mesh

from t5x_domain.errors import UserError
from t5x_domain.kernels.sample import sample_tokens
from t5x_domain.models.assemblies import DecoderOnly, EncoderOnly
from t5x_domain.models.names import path_name
from t5x_domain.models.rtd import ReplacedTokenDetection
from t5x_domain.objectives import rtd
from t5x_domain.objectives.losses import language_model_loss, ratios
from t5x_domain.objectives.rtd import Chosen, replaced_token_detection_loss
from t5x_domain.parallel.sharding import use_mesh

CONFIG = dataclasses.replace(
    CONFIG,
    embedding_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=0,
    scan_layers=False,
    tie_embeddings=True,
    scale_logits=True,
    rtd_generator_width=0.5,
)
LOSS = functools.partial(replaced_token_detection_loss, num_components=2, max_share=0.5)


@functools.cache
def made(**options):
    """Model and parameters; the difference of embeddings is not 0, as after some steps."""
    plan = blueprint(model=ReplacedTokenDetection, config=dataclasses.replace(CONFIG, **options))
    params = plan.init(0)
    if "embedding_delta" in params:
        noise = np.random.default_rng(1).standard_normal(params["embedding_delta"].shape)
        params["embedding_delta"] = jnp.asarray(0.1 * noise, jnp.float32)
    return plan, params


@pytest.fixture(scope="module")
def gdes():
    return made(rtd_embedding_sharing="gdes")


# --- which positions, which labels ---


def test_chosen_positions_samples_and_labels_by_hand():
    """Two of six positions have room. A sample that equals the token leaves the text, hence the label, as it was."""
    text = np.array([[5, 6, 7, 8, 9, 0], [5, 6, 7, 8, 9, 0], [5, 6, 7, 8, 9, 0]])
    chosen = np.array([[0, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], np.float32)
    picked = Chosen.of({"encoder_loss_weights": chosen, "encoder_target_tokens": text}, 0.3)  # ceil(1.8) = 2
    np.testing.assert_array_equal(picked.positions[:2], [[1, 3], [0, 3]])
    np.testing.assert_array_equal(picked.targets[:2], [[6, 8], [5, 8]])
    np.testing.assert_array_equal(picked.weights, [[1, 1], [1, 1], [0, 0]])
    got = picked.replace(text, np.array([[6, 99], [77, 88], [55, 66]]))
    # Row 0: 6 was drawn where 6 stood. Row 1: the third chosen position has no room. Row 2: nothing was chosen.
    np.testing.assert_array_equal(got, [[5, 6, 7, 99, 9, 0], [77, 6, 7, 88, 9, 0], [5, 6, 7, 8, 9, 0]])
    np.testing.assert_array_equal(got != text, [[0, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0], [0] * 6])


# --- the value ---


def outputs(plan, params, rows):
    """What both models compute, float64: log p [B, S, V] of the generator, tokens [B, S], logits [B, S]."""
    model = plan.merge(params)
    more = {name: rows[name] for name in ("encoder_segment_ids", "encoder_positions")}

    @jax.jit
    def generated():
        hidden, generator = model.generator(rows["encoder_input_tokens"], **more), model.generator
        gathered, scale = Chosen.of(rows, 0.5).gather(hidden), generator.logit_scale
        samples = sample_tokens(gathered, generator.output_kernel, jax.random.key(0), logit_scale=scale)
        return jax.nn.log_softmax(generator.logits(hidden)), samples

    with use_mesh(plan.mesh):
        log_p, samples = (np.asarray(array) for array in generated())
        tokens = rows["encoder_target_tokens"].copy()
        for row, where in enumerate(rows["encoder_loss_weights"] > 0):
            tokens[row, where] = samples[row, : where.sum()]
        logits = np.asarray(jax.jit(lambda tokens: model.head(model(tokens, **more)))(tokens), np.float64)
    return log_p.astype(np.float64), tokens, logits


def by_numpy(rows, log_p, tokens, logits, masked_only):
    """The loss of equations 1 to 5 of Clark et al. 2020 in float64, and the counts."""
    chosen = rows["encoder_loss_weights"] > 0
    nll = -np.take_along_axis(log_p, rows["encoder_target_tokens"][..., None], -1)[..., 0]
    replaced = tokens != rows["encoder_target_tokens"]
    p = 1 / (1 + np.exp(-logits))
    cross_entropy = -np.where(replaced, np.log(p), np.log(1 - p))
    counted = chosen if masked_only else rows["encoder_token_weights"] > 0
    loss = nll[chosen].mean() + 50 * cross_entropy[counted].mean()
    said, there = (logits > 0) & counted, replaced & counted
    right = log_p.argmax(-1) == rows["encoder_target_tokens"]
    return loss, {
        "generator_loss": nll[chosen].mean(),
        "generator_accuracy": right[chosen].mean(),
        "without_room": 0.0,
        "share_replaced": there.sum() / counted.sum(),
        "precision": (said & there).sum() / said.sum(),
        "recall": (said & there).sum() / there.sum(),
        "f1": 2 * (said & there).sum() / (said.sum() + there.sum()),
    }


def test_loss_and_counts_against_numpy(gdes):
    plan, params = gdes
    rows, both = masked_batch(), (False, True)
    with use_mesh(plan.mesh):
        found = jax.jit(lambda p: [LOSS(plan.merge(p), rows, None, masked_only=only) for only in both])(params)
    computed = outputs(plan, params, rows)
    for masked_only, (value, sums) in zip(both, found, strict=True):
        wanted, counts = by_numpy(rows, *computed, masked_only)
        # float32 sums of 16 x 24 terms near 1: 384 u relative, u = 2^-24; those of the hidden states a few times that.
        assert float(value / sums["weight"]) == pytest.approx(wanted, rel=4 * 384 * 2.0**-24)
        assert ratios(jax.device_get(sums)) == pytest.approx(counts, rel=4 * 384 * 2.0**-24)
        assert sums["component_nll"].sum() == pytest.approx(float(sums["binary_nll"]), rel=384 * 2.0**-24)
        assert sums["component_weight"].sum() == sums["weight"]


def test_positions_without_room_are_counted_and_keep_their_token(gdes):
    plan, params = gdes
    rows = masked_batch()
    # Room for one in a row, and each row has one.
    sums = jax.jit(lambda params: LOSS(plan.merge(params), rows, None, max_share=1 / 24)[1])(params)
    chosen = rows["encoder_loss_weights"].sum()
    np.testing.assert_array_equal(sums["ratios"]["without_room"], [chosen - 16, chosen])
    assert sums["ratios"]["share_replaced"][0] <= 16


def test_no_logits_of_whole_rows(gdes):
    """The vocabulary only meets chosen positions: 16 rows of 4 at most."""
    plan, params = gdes
    grad = jax.grad(lambda p, rows: LOSS(plan.merge(p), rows, None, max_share=1 / 6)[0])
    shapes = intermediate_shapes(grad, params, masked_batch())
    rows_by_vocabulary = [shape for shape in shapes if shape[-1:] == (512,) and len(shape) > 2]
    assert max(np.prod(shape) for shape in rows_by_vocabulary) == 16 * 4 * 512


# --- the gradient ---


def gradients(plan, params, *detection_weights):
    """By name, for each weight."""
    grad = jax.jit(jax.grad(lambda p, weight: LOSS(plan.merge(p), masked_batch(), None, detection_weight=weight)[0]))
    for weight in detection_weights:
        leaves = jax.tree_util.tree_flatten_with_path(grad(params, weight))[0]
        yield {path_name(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("sharing", ["gdes", "none", "tied"])
def test_where_each_loss_reaches(sharing):
    """Nothing flows through sampling, so the generator learns from its own loss alone; unless its table is tied."""
    plan, params = made(rtd_embedding_sharing=sharing)
    both, generators = gradients(plan, params, 50.0, 0.0)
    table = "generator/embedding/embedding"
    for name in both:
        if name.startswith("generator/") and (name, sharing) != (table, "tied"):
            np.testing.assert_array_equal(both[name], generators[name], err_msg=name)
            assert np.abs(generators[name]).max() > 0, name
        elif name != table:
            assert np.abs(generators[name]).max() == 0, name
            assert np.abs(both[name]).max() > 0, name
    assert np.array_equal(both[table], generators[table]) == (sharing != "tied")
    own = {"gdes": {"embedding_delta"}, "none": {"embedding/embedding"}, "tied": set()}[sharing]
    assert {name for name in both if both[name].shape[0] == 512} == own | {table}


# --- devices, parts of a batch, dropout ---


LIKELIEST = functools.partial(LOSS, temperature=1e-9)  # parts of a batch have keys of their own


@pytest.fixture(scope="module")
def exact():
    """In float64: parameters, and loss and gradients of one device."""
    config = dataclasses.replace(CONFIG, dtype="float64")
    with jax.enable_x64(True):
        plan = blueprint(model=ReplacedTokenDetection, config=config)
        params = jax.tree.map(lambda p: np.asarray(p, np.float64), made(rtd_embedding_sharing="gdes")[1])
        return config, params, loss_and_gradients(plan, LIKELIEST, params, masked_batch())


@pytest.mark.parametrize("shape", ["fsdp", "sequence"])
def test_loss_and_gradients_do_not_depend_on_the_mesh(exact, shape):
    config, params, wanted = exact
    with jax.enable_x64(True):
        plan = blueprint(mesh(**MESHES[shape]), ReplacedTokenDetection, config)
        assert_exact(loss_and_gradients(plan, LIKELIEST, params, masked_batch()), wanted)


def test_what_is_sampled_does_not_depend_on_the_mesh():
    rng, devices = np.random.default_rng(3), mesh(**MESHES["fsdp"])
    hidden, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 12, 8), (512, 8)))
    draw = jax.jit(sample_tokens)
    wanted = draw(hidden, kernel, jax.random.key(0))
    split = [jax.device_put(array, NamedSharding(devices, P("fsdp"))) for array in (hidden, kernel)]
    with use_mesh(devices):
        np.testing.assert_array_equal(draw(*split, jax.random.key(0)), wanted)


def test_accumulation_equals_the_large_batch(exact):
    """The parts have other numbers of chosen positions and tokens."""
    config, params, wanted = exact
    rows = masked_batch()
    chosen, tokens = (rows[f"encoder_{name}_weights"] for name in ("loss", "token"))
    assert chosen[::2].sum() / chosen.sum() != tokens[::2].sum() / tokens.sum()
    with jax.enable_x64(True):
        plan = blueprint(model=ReplacedTokenDetection, config=config)
        assert_exact(loss_and_gradients(plan, LIKELIEST, params, rows, accumulation_steps=2), wanted)


@pytest.mark.parametrize("sampling_dropout", [False, True])
def test_sampling_with_and_without_dropout(monkeypatch, sampling_dropout):
    """Towards temperature 0 only dropout makes what is drawn depend on the key; the generator learns with it anyway."""
    plan = blueprint(model=ReplacedTokenDetection, config=dataclasses.replace(CONFIG, dropout_rate=0.5))
    params = made(rtd_embedding_sharing="gdes")[1]
    drawn = []
    monkeypatch.setattr(
        rtd, "sample_tokens", lambda *args, **more: drawn.append(sample_tokens(*args, **more)) or drawn[-1]
    )

    @jax.jit
    def samples(key):
        sums = LOSS(plan.merge(params), masked_batch(), key, temperature=1e-6, sampling_dropout=sampling_dropout)[1]
        return drawn.pop(), sums["ratios"]["generator_loss"][0]

    (first, first_loss), (second, second_loss) = (samples(jax.random.key(seed)) for seed in (0, 1))
    assert np.array_equal(first, second) == (not sampling_dropout)
    assert first_loss != second_loss


def test_a_discriminator_is_no_masked_language_model(gdes):
    plan, params = gdes
    rows = {name.replace("encoder_", "decoder_"): value for name, value in masked_batch().items()} | masked_batch()
    with pytest.raises(UserError, match="predicts no tokens; set Run.loss = @replaced_token_detection_loss, or MODEL"):
        jax.eval_shape(lambda p: language_model_loss(plan.merge(p), rows, None, num_components=2), params)


@pytest.mark.parametrize(("model", "layers"), [(DecoderOnly, {"num_decoder_layers": 1}), (EncoderOnly, {})])
def test_another_model_is_refused(model, layers):
    plan = blueprint(model=model, config=dataclasses.replace(CONFIG, **layers))
    with pytest.raises(UserError, match=f"{model.__name__} has no generator .* set MODEL = @ReplacedTokenDetection"):
        LOSS(plan.merge(plan.shapes), masked_batch(), None)
