"""Every file in gin/models/ loads and builds the model that its comment describes."""

import json
import math
import re
from pathlib import Path

import gin
import pytest
from flax import nnx

import t5x_domain.models.assemblies  # noqa: F401, so that gin knows the models
from t5x_domain.cli import load_gin

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("gin/models/*.gin"))


@gin.configurable
def abstract_model(model, config) -> nnx.Module:
    """The model without values."""
    return nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))


def shapes(path: Path) -> dict[str, list[int]]:
    """Parameter names and shapes of the model that a file configures."""
    load_gin([str(path)], ["abstract_model.model = %MODEL", "abstract_model.config = @ModelConfig()"])
    state = nnx.to_flat_state(nnx.state(abstract_model()))
    gin.clear_config()
    return {".".join(map(str, name)): list(param.shape) for name, param in state}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_parameter_count(path):
    stated = int(re.search(r"# Parameters: ([\d,]+)", path.read_text()).group(1).replace(",", ""))
    assert sum(map(math.prod, shapes(path).values())) == stated


def test_t5_1_1_small_shapes():
    """76,961,152 parameters, as Hugging Face counts for google/t5-v1_1-small; a changed shape shows up by its name."""
    actual = shapes(ROOT / "gin/models/t5_1_1_small.gin")
    assert sum(map(math.prod, actual.values())) == 76_961_152
    assert actual == json.loads((ROOT / "tests/golden/t5_1_1_small_shapes.json").read_text())


def test_t5_1_1_small_count_by_hand():
    """Embeddings, attention (4 D H K, twice in a decoder layer), gated feed-forward (3 D F), norms and bias tables."""
    vocab, dim, inner, mlp, layers = 32128, 512, 6 * 64, 1024, 8
    encoder = layers * (4 * dim * inner + 3 * dim * mlp + 2 * dim)
    decoder = layers * (8 * dim * inner + 3 * dim * mlp + 3 * dim)
    assert 2 * vocab * dim + encoder + decoder + 2 * dim + 2 * 32 * 6 == 76_961_152
