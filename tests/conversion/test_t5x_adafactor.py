"""T5X's state of Adafactor becomes optax's, checked against the definition of both."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import t5x_fixtures as fixtures
from t5x_fixtures import refused, without

from t5x_domain.conversion.t5x import open_t5x

# What T5X calls the axes of its arrays (`param_with_axes` in its layers), and Adafactor's standard rules for them.
AXES = {
    "token_embedder/embedding": ("vocab", "embed"),
    "logits_dense/kernel": ("embed", "vocab"),
    "rel_embedding": ("heads", "relpos_buckets"),
    "scale": ("embed",),
    "out/kernel": ("heads", "kv", "embed"),
    "wo/kernel": ("mlp", "embed"),
    "wi_0/kernel": ("embed", "mlp"),
    "wi_1/kernel": ("embed", "mlp"),
    **{f"{name}/kernel": ("embed", "heads", "kv") for name in ("query", "key", "value")},
}
COLUMNS, LAST_UPDATE = ("vocab", "mlp", "heads", "kv", "joined_kv"), 3


def axes_of(name: str, ndim: int) -> tuple[str, ...]:
    """Axis names of one of T5X's arrays, with the axis of layers second where layers are scanned."""
    axes = next(axes for end, axes in AXES.items() if name.endswith(end))
    scan = name.startswith(("encoder/encoder/", "decoder/decoder/"))
    if ndim - scan < len(axes):  # joined
        axes = tuple(dict.fromkeys("joined_kv" if axis in ("heads", "kv") else axis for axis in axes))
    return (axes[0], "layers", *axes[1:]) if scan else axes


def slots_of(name: str, gradients: list[np.ndarray], factored: bool) -> dict[str, np.ndarray]:
    """Adafactor's slots after these gradients, from its definition (Shazeer & Stern 2018, algorithm 4).

    T5X: arrays of at most two axes, none of them layers, as optax; others have rows ("embed") and columns by name.
    """
    shape = gradients[0].shape
    axes = axes_of(name, len(shape))
    rows = tuple(i for i, axis in enumerate(axes) if axis == "embed")
    columns = tuple(i for i, axis in enumerate(axes) if axis in COLUMNS)
    if len(shape) <= 2 and "layers" not in axes:
        by_size = tuple((int(i),) for i in np.argsort(shape))
        rows, columns = by_size if len(shape) == 2 and min(shape) >= 128 else ((), ())
    slots = {slot: np.zeros(1) for slot in ("m", "v", "v_col", "v_row")}
    means = {"v_row": columns, "v_col": rows} if factored and rows and columns else {"v": ()}
    for slot, over in means.items():
        average = 0.0
        for step, gradient in enumerate(gradients, start=1):
            decay = 1 - step**-0.8
            average = decay * average + (1 - decay) * (gradient.astype(np.float64) ** 2 + 1e-30).mean(axis=over)
        slots[slot] = average
    return {f"{name}/{slot}": value.astype(np.float32) for slot, value in slots.items()}


BIG = {"vocab": 150, "embed": 130, "mlp": 140, "heads": 2, "width": 140}
SMALL = {"vocab": 50, "embed": 24, "mlp": 40, "heads": 2, "width": 12}


def random_tree(sizes: dict[str, int], rng: np.random.Generator, *, rank_one: bool = False) -> dict[str, np.ndarray]:
    """Arrays of a T5.1.1 with a bias for each layer; `rank_one` matrices are outer products."""
    embed, mlp, width = sizes["embed"], sizes["mlp"], sizes["width"]

    def draw(*shape: int) -> np.ndarray:
        if rank_one and len(shape) == 2:
            return np.outer(draw(shape[0]), draw(shape[1]))
        return (rng.standard_normal(shape) + np.sign(rng.standard_normal(shape))).astype(np.float32)

    weights = {"shared.weight": draw(sizes["vocab"], embed), "lm_head.weight": draw(sizes["vocab"], embed)}
    for stack, kinds in {"encoder": ["Self"], "decoder": ["Self", "EncDec"]}.items():
        weights[f"{stack}.final_layer_norm.weight"] = draw(embed)
        for block in (f"{stack}.block.{i}.layer" for i in range(2)):
            for j, kind in enumerate(kinds):
                for linear in "qkvo":
                    shape = (embed, width) if linear == "o" else (width, embed)
                    weights[f"{block}.{j}.{kind}Attention.{linear}.weight"] = draw(*shape)
            weights[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = draw(8, sizes["heads"])
            last = len(kinds)
            weights |= {f"{block}.{j}.layer_norm.weight": draw(embed) for j in range(last + 1)}
            weights |= {f"{block}.{last}.DenseReluDense.wi_{k}.weight": draw(mlp, embed) for k in (0, 1)}
            weights[f"{block}.{last}.DenseReluDense.wo.weight"] = draw(embed, mlp)
    return fixtures.tree_of(weights)


@pytest.mark.parametrize(
    "sizes, layout, factored",
    [
        (BIG, "joined", True),  # both go by size
        (BIG, "split", True),  # T5X by names, optax by size: the same here
        (BIG, "scanned", True),
        (BIG, "scanned_joined", False),  # T5X keeps everything, optax means
        (SMALL, "scanned", True),  # T5X keeps means of small matrices, optax everything
        (SMALL, "joined", True),  # neither keeps means
    ],
)
def test_adafactor_goes_on_as_if_uninterrupted(sizes, layout, factored, tmp_path):
    """T5X's slots after three gradients, made from their definition, are optax's state after the same three.

    Means that stand in for everything are exact only if squared gradients are outer products in fixed proportion, so
    for small sizes they are. All sums are of float32 numbers above zero, n of them with a relative error of at most
    n u, u = 2^-24; n is 150 at most, three steps round a few times more, and an update divides by two square roots.
    """
    rng = np.random.default_rng(0)
    heads = sizes["heads"]
    lay_out = {
        "joined": lambda tree: tree,
        "split": lambda tree: fixtures.split_heads(tree, heads),
        "scanned": lambda tree: fixtures.scanned(fixtures.split_heads(tree, heads)),
        "scanned_joined": fixtures.scanned,
    }[layout]
    base = random_tree(sizes, rng, rank_one=sizes is SMALL)
    proportions = [1.0, -0.5, 3.0, 2.0]
    gradients = [{name: np.float32(c) * value for name, value in base.items()} for c in proportions]
    if sizes is BIG:
        gradients = [random_tree(sizes, rng) for _ in proportions]
    params = lay_out(random_tree(sizes, rng))

    laid_out = [lay_out(gradient) for gradient in gradients]
    slots = {}
    for name in params:
        slots |= slots_of(name, [gradient[name] for gradient in laid_out[:LAST_UPDATE]], factored)
    fixtures.write_msgpack(tmp_path / "0", fixtures.state_of(params, LAST_UPDATE, slots))
    checkpoint = open_t5x(str(tmp_path / "0"))
    # The same map of names, which the logits above vouch for, brings gradients to our names.
    ours = []
    for i, gradient in enumerate(laid_out, start=1):
        fixtures.write_msgpack(tmp_path / str(i), fixtures.state_of(gradient))
        ours.append({name: tensor.read() for name, tensor in open_t5x(str(tmp_path / str(i))).tensors.items()})

    transform = optax.scale_by_factored_rms()
    values = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    state = transform.init(values)
    for gradient in ours[:LAST_UPDATE]:
        _, state = transform.update(gradient, state, values)
    rtol = 2 * (150 + 10) * 2**-24
    carried = {slot: dict(getattr(transform.init(values), slot)) for slot in ("v_row", "v_col", "v")}
    for name, kept in checkpoint.second_moments.slots.items():
        assert set(kept) == ({"v"} if state.v[name].shape != (1,) else {"v_row", "v_col"})
        for slot, value in kept.items():
            np.testing.assert_allclose(value, getattr(state, slot)[name], rtol=rtol, err_msg=f"{name} {slot}")
            carried[slot][name] = jnp.asarray(value)
    went_on = optax.FactoredState(count=jnp.int32(checkpoint.second_moments.step), **carried)
    update, _ = transform.update(ours[LAST_UPDATE], state, values)
    resumed, _ = transform.update(ours[LAST_UPDATE], went_on, values)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), resumed, update)


def test_slots_that_cannot_be_used_are_refused(tmp_path):
    tree = random_tree(SMALL, np.random.default_rng(0))
    slots = fixtures.unused_slots(tree)

    def write(slots):
        fixtures.write_msgpack(tmp_path, fixtures.state_of(tree, slots=slots))

    write(slots | {"decoder/decoder_norm/scale/m": np.ones(24, np.float32)})
    refused(tmp_path, "momentum .*decoder/decoder_norm/scale/m; .*--skip_optimizer")
    assert open_t5x(str(tmp_path), optimizer=False).second_moments is None
    write({"0/mu/decoder/decoder_norm/scale": np.ones(24, np.float32)})
    refused(tmp_path, "not the state of Adafactor .*0/mu.*--skip_optimizer")
    write(without(slots, "decoder/decoder_norm/scale/v"))
    refused(tmp_path, "not the state of Adafactor .*decoder_norm/scale/v;")
    name = "decoder/layers_0/mlp/wo/kernel"
    write(slots | {f"{name}/v": np.zeros(1), f"{name}/v_row": np.ones(40), f"{name}/v_col": np.ones(24)})
    refused(tmp_path, r"wo/kernel/v_row \(40,\) is no mean of \(40, 24\)")
    fixtures.write_msgpack(tmp_path, without(fixtures.state_of(tree, slots=slots), "state/step"))
    refused(tmp_path, "no state/step")
