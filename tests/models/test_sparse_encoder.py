"""Local layers with global tokens: a layer against its definition, packing, meshes, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_domain.errors import UserError
from t5x_domain.kernels.mask import Mask, SegmentIds
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder
from t5x_domain.models.attention import Attention, RelativeBiasTable, plan
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.stack import Stack
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.parallel.sharding import use_mesh
from tests.kernels.attention_cases import UNITS

SHAPE = {"vocab_size": 1, "embed_dim": 8, "mlp_dim": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
LOCAL = {"layer_pattern": ("local",), "local_window": 2, "global_block_size": 4, "dtype": "float64"}
DOCUMENTS = (9, 3, 8, 4)  # with a token left over, shorter than a block, two blocks, one block
IDS = np.repeat([1, 2, 3, 4, 0], [*DOCUMENTS, 2])
POSITIONS = np.concatenate([np.arange(n) for n in (*DOCUMENTS, 2)])


def config(kind, **more):
    return ModelConfig(**SHAPE | LOCAL | {"global_blocks": kind} | more)


def in_float64(module):
    nnx.update(module, jax.tree.map(lambda p: p.astype(jnp.float64), nnx.state(module)))
    return module


def by_the_definition(layer, x, bias, global_bias):
    """One row's attention, with a softmax over the keys that each query sees, one query after the other."""
    blocks = []  # segment, number in it, tokens
    for segment, length in enumerate(DOCUMENTS, 1):
        tokens = np.flatnonzero(segment == IDS)
        last = length // 4 - 1
        blocks += [(segment, n, tokens[4 * n : 4 * n + 4 if n < last else None]) for n in range(last + 1)]
    number_of = {i: n for _, n, tokens in blocks for i in tokens}
    positions = jnp.asarray(POSITIONS)[None]
    sums = layer.global_norm(jnp.stack([x[0, tokens].sum(0) for *_, tokens in blocks])[None])
    ends = jnp.array([[4 * n + 3 for _, n, _ in blocks]])
    q, keys, block_keys = layer.queries(x, positions), layer.keys_values(x, positions), layer.keys_values(sums, ends)
    (k, v), (block_k, block_v) = ([np.repeat(a[0], 2, axis=1) for a in pair] for pair in (keys, block_keys))
    q, rows = layer.scale * np.asarray(q[0]), np.zeros(q[0].shape)
    for i in np.flatnonzero(IDS):
        seen = [((q[i] * k[j]).sum(1) + bias(j - i), v[j]) for j in np.flatnonzero(IDS[i] == IDS) if abs(j - i) <= 2]
        for slot, (segment, n, _) in enumerate(blocks):
            if segment == IDS[i]:
                seen.append(((q[i] * block_k[slot]).sum(1) + global_bias(n - number_of[i]), block_v[slot]))
        weights = np.exp([logits for logits, _ in seen])
        rows[i] = np.einsum("nh,nhd->hd", weights / weights.sum(0), [value for _, value in seen])
    return layer.output(jnp.asarray(rows)[None])


@pytest.mark.parametrize("options", [{"position": "relative_bias"}, {"position": "rope", "qk_norm": True}])
def test_transient_tokens_by_the_definition(options):
    with jax.enable_x64(True):
        setting = config("transient", **options)
        layer = in_float64(Attention(setting, kind="local", transient=True, rngs=nnx.Rngs(0)))
        nnx.update(layer, {"global_norm": {"scale": jnp.linspace(0.5, 2.0, 8)}})
        x = jax.random.normal(jax.random.key(1), (1, len(IDS), 8), jnp.float64)
        tables = dict.fromkeys(("relative_bias", "global_relative_bias"))
        looked_up = dict.fromkeys(tables, lambda distance: 0.0)
        if options["position"] == "relative_bias":
            for seed, name in enumerate(tables):
                table = in_float64(RelativeBiasTable(setting, bidirectional=True, rngs=nnx.Rngs(seed)))
                tables[name] = table()
                # Distances here are below 8, each of which has a bucket of its own; those after the query from 16 on.
                looked_up[name] = lambda d, rows=np.asarray(table.table[...]): rows[16 + d if d > 0 else -d]
        ids = jnp.asarray(IDS)[None]
        found = plan(setting, x, mask=Mask(window=(2, 2)), segment_ids=SegmentIds(ids, ids))
        run = nnx.jit(lambda layer, **inputs: layer(x, positions=jnp.asarray(POSITIONS)[None], **inputs))
        out = run(layer, plan=found, **tables)
        expected = by_the_definition(layer, x, *looked_up.values())
        # Sums one after the other of 8 terms (norm), 8 (projection), 4 (logit), 7 (keys) and 16 (output): 43 roundings,
        # and some between them.
        np.testing.assert_allclose(out, expected, rtol=0, atol=64 * UNITS["float64"][0] * abs(expected).max())


PACKED = {
    "every": {"global_blocks": "every", "global_tokens": 2, "position": "rope"},
    "transient": {"global_blocks": "transient", "relative_bias_per_layer": True, "layer_pattern": ("local", "global")},
}


@pytest.mark.parametrize("name", PACKED)
def test_packing_changes_no_document(name):
    """A row of all documents and rows of one each, in float64: the order of some dozens of terms is below 1e-12."""
    with jax.enable_x64(True):
        stack = in_float64(Stack(config("none", **PACKED[name]), 2, causal=False, rngs=nnx.Rngs(0)))
        token = np.arange(len(IDS))
        start = np.cumsum([0, *DOCUMENTS])[:-1, None]
        alone = (token < np.array(DOCUMENTS)[:, None]).astype(np.int32)
        where = np.vstack([token, np.where(alone, start + token, 0)])
        x = jax.random.normal(jax.random.key(1), (len(IDS), 8), jnp.float64)[where]
        positions = np.vstack([POSITIONS, np.tile(token, (4, 1))])
        run = nnx.jit(lambda stack, x, ids, positions: stack(x, segment_ids=ids, positions=positions))
        packed, *rows = run(stack, x, jnp.asarray(np.vstack([IDS, alone])), jnp.asarray(positions))
        for first, length, row in zip(start[:, 0], DOCUMENTS, rows, strict=True):
            np.testing.assert_allclose(packed[first : first + length], row[:length], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["every", "transient"])
def test_gradients_do_not_depend_on_the_mesh(kind):
    """In float64, as above."""
    with jax.enable_x64(True):
        graph, params = nnx.split(in_float64(Stack(config(kind), 1, causal=False, rngs=nnx.Rngs(0))))
        x, weights = jax.random.normal(jax.random.key(1), (2, 2, 24, 8), jnp.float64)
        ids = jnp.asarray(np.vstack([IDS[:24], IDS[2:]]))

        def total(params, x):
            return (weights * nnx.merge(graph, params)(x, segment_ids=ids)).sum()

        def gradients(on):
            with use_mesh(on):
                return jax.jit(jax.value_and_grad(total, (0, 1)))(params, x)

        on = MeshShape(data=2, tensor=2, sequence=2).build()
        for got, wanted in zip(jax.tree.leaves(gradients(on)), jax.tree.leaves(gradients(None)), strict=True):
            assert abs(got - wanted).max() <= 1e-12 * max(1, abs(wanted).max())
            assert abs(wanted).max() > 1e-3


def test_decoders_have_none():
    options = SHAPE | LOCAL | {"num_encoder_layers": 1, "num_decoder_layers": 1, "global_tokens": 3}
    model = EncoderDecoder(ModelConfig(**options, global_blocks="transient"), rngs=nnx.Rngs(0))
    names = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model)) if "global" in str(path)]
    assert sorted(names) == [
        "encoder/global_relative_bias/table",
        "encoder/layers/blocks/0/self_attention/inner/global_norm/scale",
    ]
    found = model.decoder.plans(jnp.zeros((1, 8, 8)), None)["local"]
    assert found.side is None and found.intervals.global_start is None


@pytest.mark.parametrize(
    "options, words",
    [
        ({"global_block_size": 0}, "global_block_size = 0: it must be a whole number, 1 or more"),
        ({"global_tokens": -1}, "global_tokens = -1: it must be a whole number, 0 or more"),
        ({"global_blocks": "some"}, "global_blocks = 'some': choose one of none, every, transient"),
        ({"global_blocks": "every", "layer_pattern": ("global",)}, "global_blocks = 'every' is for local layers"),
        ({"global_tokens": 1, "layer_pattern": ("global",)}, "global_tokens = 1 is for local layers"),
        ({"global_blocks": "every", "sequence_attention": "ring"}, "does not go with sequence_attention = 'ring'"),
        ({"global_blocks": "transient", "position": "alibi"}, "does not go with position = 'alibi'"),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        ModelConfig(**SHAPE | LOCAL | options)


@pytest.mark.parametrize("options", [{"global_blocks": "every"}, {"global_tokens": 1}])
def test_a_model_without_encoder_is_refused(options):
    with pytest.raises(UserError, match=f"{next(iter(options))} = .* is for encoders, but DecoderOnly has none"):
        DecoderOnly(ModelConfig(**SHAPE | LOCAL | options), rngs=nnx.Rngs(0))


def test_a_sequence_shorter_than_a_block_is_refused():
    stack = Stack(config("every", dtype="float32"), 1, causal=False, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="global_block_size = 4, but the encoder's sequences have 3 tokens"):
        stack(jnp.zeros((1, 3, 8)))
