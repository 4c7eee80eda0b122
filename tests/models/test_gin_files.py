"""Every file in gin/models/ loads and builds the model that its comment describes."""

import json
import math
import re
from pathlib import Path

import gin
import pytest
from flax import nnx

import t5x_domain.models.rtd  # noqa: F401, so that gin knows the models
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


@pytest.mark.parametrize("path", [path for path in FILES if "remain" in path.read_text()], ids=lambda path: path.stem)
def test_count_of_what_replaced_token_detection_leaves(path):
    """All but the generator, the head and the second table, of which only the sum remains."""
    stated = int(re.search(r"; ([\d,]+) remain in the encoder", path.read_text()).group(1).replace(",", ""))
    found = shapes(path)
    table = math.prod(found["generator.embedding.embedding"])
    rest = [name for name in found if not name.startswith(("generator.", "head.", "embedding_delta"))]
    assert sum(math.prod(found[name]) for name in rest) + table == stated


def test_electra_small_count_by_hand():
    """Of width 256 and 64: attention (4 D D), feed-forward (2 D F), 2 norms a layer, a norm before and after all, bias
    tables of 32 buckets; projections from 128; a head (D D, D + 1); one table of embeddings."""

    def encoder(dim: int, heads: int) -> int:
        return 12 * (4 * dim**2 + 2 * dim * 4 * dim + 2 * dim) + 2 * dim + 32 * heads + 128 * dim

    both, head = encoder(256, 4) + encoder(64, 1), 256**2 + 256 + 1
    assert 30592 * 128 + both + head == 14_058_017


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
