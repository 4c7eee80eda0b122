"""Where every array of some models' training states lies, as written down in tests/golden/shardings.txt.

A change of the rules, of a layer's axis names or of an optimizer's state is to be seen before a pod runs out of memory.
When it is meant: `python tests/parallel/test_golden_shardings.py` writes the file anew, and its difference is reviewed.
"""

import math
from pathlib import Path

import gin
import jax
import pytest
from jax.sharding import AbstractMesh

from t5x_domain import configurables  # noqa: F401  so that gin knows all names
from t5x_domain.models import assemblies, rtd
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.names import path_name
from t5x_domain.parallel.mesh import AXES
from t5x_domain.training.optimizer import Adafactor, AdamW, Muon, Updates
from t5x_domain.training.schedule import constant
from t5x_domain.training.state import Blueprint

GOLDEN = Path(__file__).parent.parent / "golden" / "shardings.txt"
GIN = Path(__file__).parent.parent.parent / "gin" / "models"
MESH = AbstractMesh((2, 2, 16, 1, 4), AXES)
STATES = {
    "t5_1_1_xl": (assemblies.EncoderDecoder, Adafactor()),
    "llama_1b-like": (assemblies.DecoderOnly, AdamW()),
    "modernbert_base-like": (assemblies.EncoderOnly, Muon()),
    "deberta_v3_base-like": (rtd.ReplacedTokenDetection, AdamW()),
    "ul2_20b": (rtd.DetectingEncoderDecoder, Adafactor()),
}


def lines(name):
    """A line an array: its name, shape, axes of the mesh, and the parts it is cut into."""
    gin.clear_config()
    gin.parse_config_file(str(GIN / f"{name}.gin"))
    model, optimizer = STATES[name]
    plan = Blueprint(model, ModelConfig(), MESH)
    state = plan.abstract_state(Updates(optimizer, constant(1.0)).build(plan.axes))
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        # NamedTuples of optax give their arrays names with a dot in front.
        array = "/".join(part.lstrip(".") for part in path_name(path).split("/"))
        parts = math.prod(MESH.shape[axis] for axis in leaf.sharding.spec if axis is not None)
        axes = ", ".join(str(axis) for axis in leaf.sharding.spec)
        yield f"{array}  {list(leaf.shape)}  ({axes})  {parts}"


def golden():
    """{state: lines} of the file."""
    found = {}
    for line in GOLDEN.read_text().splitlines():
        if line.startswith("# "):
            found[line[2:]] = current = []
        elif line:
            current.append(line)
    return found


@pytest.mark.parametrize("name", STATES)
def test_every_array_lies_where_it_did(name):
    assert list(lines(name)) == golden()[name]


@pytest.mark.parametrize("name", STATES)
def test_what_is_large_is_cut_over_the_devices_of_a_slice(name):
    """An array of a million numbers and more that every device held whole would not be seen on a few of them."""
    for line in golden()[name]:
        array, shape, _, parts = line.split("  ")
        if math.prod(int(size) for size in shape[1:-1].split(",") if size) >= 1 << 20:
            assert int(parts) >= 16, array


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(f"# {name}\n" + "\n".join(lines(name)) + "\n" for name in STATES))
