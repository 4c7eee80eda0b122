"""Every file in gin/models/ loads and builds the model that its comment describes."""

import json
import math
import re
from pathlib import Path

import gin
import pytest
from flax import nnx

from t5x_domain.cli import load_gin
from t5x_domain.conversion.huggingface_config import write_config
from t5x_domain.conversion.rtd import remaining_model
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.rtd import ReplacedTokenDetection

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
    """Of width 256 and 64: attention (4 D D), feed-forward (2 D F) and 2 norms a layer; of width 128: positions, their
    norm and a projection; a head (D D, D + 1); one table of embeddings."""

    def encoder(dim: int) -> int:
        return 12 * (4 * dim**2 + 2 * dim * 4 * dim + 2 * dim) + 512 * 128 + 128 + 128 * dim

    head = 256**2 + 256 + 1
    assert 30592 * 128 + encoder(256) + encoder(64) + head == 14_188_545


def test_budget_longformer_base_count_by_hand():
    """Published are 159M: what remains here, a query, key and value map (3 D D) of global tokens in each layer, biases
    (of 7 maps of attention, 2 of the feed-forward layer, 2 norms) and a pooler."""
    dim, layers = 768, 12
    remaining = (64_000 + 4096) * dim + dim + layers * (12 * dim**2 + 2 * dim)
    assert remaining == 137_251_584
    biases = layers * (7 * dim + 5 * dim + 2 * dim) + dim
    assert round((remaining + layers * 3 * dim**2 + biases + dim**2 + dim) / 1e6) == 159


@pytest.mark.parametrize(
    "family", ["electra_small", "electra_base", "budget_longformer_small", "budget_longformer_base"]
)
def test_what_remains_exports(family):
    """No option of these presets is beyond transformers' class of that name."""
    load_gin([str(ROOT / f"gin/models/{family}-like.gin")], [])
    config = gin.get_configurable(ModelConfig)()
    gin.clear_config()
    content = write_config(*remaining_model(ReplacedTokenDetection, config), dtype="float32")
    assert content["model_type"] == ("electra" if "electra" in family else "longformer")


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
