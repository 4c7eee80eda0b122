"""Checkpoints as T5X writes them, made of the weights of Hugging Face's models.

Trees are {name joined with slashes: array}, named as in `t5x/examples`, without looking at our own map of names.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from flax import serialization, traverse_util

from t5x_domain.conversion.t5x import open_t5x
from t5x_domain.errors import UserError

# T5X's names of a layer -> Hugging Face's. Matrices of `torch.nn.Linear` are (out, in), those of T5X (in, out).
_MLP = ["wi", "wi_0", "wi_1", "wo"]
_LAYER_OF = {
    "encoder": {
        "pre_attention_layer_norm/scale": "layer.0.layer_norm.weight",
        **{f"attention/{name}/kernel": f"layer.0.SelfAttention.{name[0]}.weight" for name in ["query", "key", "value"]},
        "attention/out/kernel": "layer.0.SelfAttention.o.weight",
        "pre_mlp_layer_norm/scale": "layer.1.layer_norm.weight",
        **{f"mlp/{name}/kernel": f"layer.1.DenseReluDense.{name}.weight" for name in _MLP},
    },
    "decoder": {
        "pre_self_attention_layer_norm/scale": "layer.0.layer_norm.weight",
        **{f"self_attention/{n}/kernel": f"layer.0.SelfAttention.{n[0]}.weight" for n in ["query", "key", "value"]},
        "self_attention/out/kernel": "layer.0.SelfAttention.o.weight",
        "pre_cross_attention_layer_norm/scale": "layer.1.layer_norm.weight",
        **{
            f"encoder_decoder_attention/{n}/kernel": f"layer.1.EncDecAttention.{n[0]}.weight"
            for n in ["query", "key", "value"]
        },
        "encoder_decoder_attention/out/kernel": "layer.1.EncDecAttention.o.weight",
        "pre_mlp_layer_norm/scale": "layer.2.layer_norm.weight",
        **{f"mlp/{name}/kernel": f"layer.2.DenseReluDense.{name}.weight" for name in _MLP},
    },
}
_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


def tree_of(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """T5X's tree of a T5 or umT5 of Hugging Face: layers apart, heads and their width joined."""
    tree = {
        "token_embedder/embedding": weights["shared.weight"],
        "encoder/encoder_norm/scale": weights["encoder.final_layer_norm.weight"],
        "decoder/decoder_norm/scale": weights["decoder.final_layer_norm.weight"],
    }
    if "lm_head.weight" in weights:
        tree["decoder/logits_dense/kernel"] = weights["lm_head.weight"].T
    for stack, names in _LAYER_OF.items():
        depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith(f"{stack}.block."))
        biases = [f"{stack}.block.{i}.{_BIAS}" for i in range(depth)]
        if biases[-1] in weights:  # umT5
            tree |= {f"{stack}/layers_{i}/relpos_bias/rel_embedding": weights[b].T for i, b in enumerate(biases)}
        else:
            tree[f"{stack}/relpos_bias/rel_embedding"] = weights[biases[0]].T
        for i in range(depth):
            for theirs, hf in names.items():
                if (weight := weights.get(f"{stack}.block.{i}.{hf}")) is not None:
                    tree[f"{stack}/layers_{i}/{theirs}"] = weight.T
    return tree


def split_heads(tree: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """As `scalable_t5` keeps attention: (embed, heads, head_dim) and (heads, head_dim, embed)."""

    def split(name: str, kernel: np.ndarray) -> np.ndarray:
        if name.endswith("out/kernel"):
            return kernel.reshape(heads, -1, kernel.shape[-1])
        if name.endswith(("query/kernel", "key/kernel", "value/kernel")):
            return kernel.reshape(kernel.shape[0], heads, -1)
        return kernel

    return {name: split(name, kernel) for name, kernel in tree.items()}


def scanned(tree: dict[str, np.ndarray], axis: int = 1) -> dict[str, np.ndarray]:
    """Layers stacked along `axis` (`param_scan_axis`)."""
    layers: dict[str, list[np.ndarray]] = {}
    rest = {}
    for name, value in tree.items():
        stack, layer, *inner = name.split("/")
        if layer.startswith("layers_"):
            same = layers.setdefault("/".join([stack, stack, *inner]), [])
            assert len(same) == int(layer.removeprefix("layers_"))
            same.append(value)
        else:
            rest[name] = value
    return rest | {name: np.stack(values, axis) for name, values in layers.items()}


def decoder_alone(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As `examples/decoder_only` names what an encoder-decoder's decoder has without the encoder."""
    return {
        name.replace("token_embedder", "decoder/token_embedder"): value
        for name, value in tree.items()
        if not name.startswith("encoder/") and "cross_attention" not in name and "encoder_decoder" not in name
    }


def unused_slots(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adafactor's slots of parameters that are not factored, all second moments ones."""
    empty = np.zeros(1, np.float32)
    return {
        f"{name}/{slot}": np.ones(value.shape, np.float32) if slot == "v" else empty
        for name, value in tree.items()
        for slot in ("m", "v", "v_col", "v_row")
    }


def state_of(
    tree: dict[str, np.ndarray], step: int = 7, slots: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """T5X's training state."""
    state = {"state/step": np.asarray(step, np.int32)}
    state |= {f"target/{name}": value for name, value in tree.items()}
    return state | {f"state/param_states/{name}": value for name, value in (slots or {}).items()}


def write_msgpack(folder: Path, state: dict[str, np.ndarray], version: int = 3) -> None:
    """All arrays in one file."""
    _write_file(folder, {"version": version, "optimizer": traverse_util.unflatten_dict(state, sep="/")})


def write_zarr(
    folder: Path, state: dict[str, np.ndarray], *, driver: str = "file", old_path: bool = False, chunk: int = 10**9
) -> None:
    """Matrices in folders of their own, at most `chunk` rows a file."""
    leaves = {}
    for name, value in state.items():
        place = name.replace("/", ".")
        if value.ndim < 2:
            leaves[name] = value
            continue
        metadata = {
            "shape": list(value.shape),
            "chunks": [min(chunk, value.shape[0]), *value.shape[1:]],
            "compressor": {"id": "gzip", "level": 1},
        }
        spec = {"driver": "zarr", "dtype": value.dtype.name, "metadata": metadata}
        store = {"driver": "file", "path": f"{folder}/{place}/"}
        ts.open({**spec, "kvstore": store}, create=True).result().write(value).result()
        # What is noted is wrong about the compression, as after `gsutil` has recompressed a checkpoint.
        metadata["compressor"] = {"id": "zlib", "level": 9}
        kvstore = {"driver": driver} | ({"bucket": "t5x-dummy-bucket"} if driver == "gcs" else {})
        leaves[name] = {**spec, "kvstore": kvstore}
        (leaves[name] if old_path else kvstore)["path"] = f"{place}/"
    tree = traverse_util.unflatten_dict(leaves, sep="/")
    _write_file(folder, {"version": 3, "optimizer": tree})


def write_orbax(folder: Path, state: dict[str, np.ndarray], *, bundled: bool = True) -> None:
    """`folder/state`, as T5X's manager of Orbax checkpoints lays it out."""
    import orbax.checkpoint as ocp

    tree = traverse_util.unflatten_dict(state, sep="/")
    tree["flax_mutables"] = {}  # an empty node, as in some checkpoints
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=bundled)) as checkpointer:
        checkpointer.save(folder / "state", args=ocp.args.PyTreeSave(tree))


def write_placeholders(folder: Path, state: dict[str, np.ndarray]) -> None:
    """As the first Orbax did: a folder for each array, and a msgpack file that names them and keeps scalars itself."""
    write_orbax(folder, state, bundled=False)
    leaves = {
        name: value if value.ndim == 0 else "PLACEHOLDER://" + name.replace("/", ".") for name, value in state.items()
    }
    (folder / "state" / "_METADATA").write_text(json.dumps({"use_zarr3": False}))
    _write_file(folder / "state", traverse_util.unflatten_dict(leaves, sep="/"))


FORMATS = {
    "msgpack": write_msgpack,
    "zarr": write_zarr,
    "zarr_of_gcs": lambda folder, state: write_zarr(folder, state, driver="gcs", old_path=True),
    "zarr_of_gfile": lambda folder, state: write_zarr(folder, state, driver="gfile"),
    "orbax": write_orbax,
    "orbax_folders": lambda folder, state: write_orbax(folder, state, bundled=False),
    "placeholders": write_placeholders,
}


def _write_file(folder: Path, tree: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


def without(arrays, *names):
    return {name: value for name, value in arrays.items() if name not in names}


def refused(folder, match, **options):
    with pytest.raises(UserError, match=match):
        open_t5x(str(folder), **options)
