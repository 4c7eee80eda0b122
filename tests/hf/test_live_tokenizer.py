"""Transformers itself on the tokenizers that are written. Needs an environment with transformers of its own:

HF_PYTHON=/path/to/python pytest tests/hf
"""

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from t5x_domain.conversion.tokenizer import read_vocabulary, write_tokenizer
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece

HF_PYTHON = os.environ.get("HF_PYTHON")
pytestmark = pytest.mark.skipif(
    HF_PYTHON is None, reason="set HF_PYTHON to the interpreter of an environment with transformers"
)
SCRIPT = Path(__file__).with_name("tokenize_lines.py")
SAMPLES = sorted(Path("data/sample").glob("*.jsonl.gz"))
EXTRA_IDS = 256
KINDS = ("nmt_nfkc", "identity", "bytes")


def passages(count):
    """The first texts of each file of the sample, cut where float32 scores stop telling segmentations apart."""
    texts = []
    for path in SAMPLES:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(next(file))["text"][:2000] for _ in range(count)]
    return texts


@pytest.fixture(scope="module", params=KINDS)
def vocabulary(request, tmp_path_factory):
    if request.param == "bytes":
        return ByteVocabulary(EXTRA_IDS)
    model_file = str(tmp_path_factory.mktemp("live") / f"{request.param}.model")
    train_sentencepiece(passages(800), model_file, 2000, special_tokens=["[NLU]"], normalization=request.param)
    return Vocabulary(model_file, EXTRA_IDS)


def transformers_on(folder, texts, ids, save_to):
    request = json.dumps({"texts": texts, "ids": ids})
    command = [HF_PYTHON, str(SCRIPT), str(folder), str(save_to)]
    done = subprocess.run(command, input=request, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("start_token", [False, True])
def test_transformers_has_our_ids_and_texts(vocabulary, start_token, tmp_path):
    (tmp_path / "ours").mkdir()
    write_tokenizer(tmp_path / "ours", vocabulary, start_token=start_token)
    texts = [*passages(2500), " a  b\n\nc\t<0x0A> 😀 ", ""]
    if isinstance(vocabulary, Vocabulary):
        texts += ["The <extra_id_0> of the <extra_id_255>, then", "<extra_id_3> heart"]
    ids = [vocabulary.encode(text).tolist() for text in texts]
    theirs = transformers_on(tmp_path / "ours", texts, ids, tmp_path / "saved")
    assert (theirs["size"], theirs["specials"]) == (vocabulary.vocab_size, [0, 1, 2])
    expected = [[0, *row] if start_token else [*row, 1] for row in ids]
    differing = [text for text, *rows in zip(texts, theirs["ids"], expected, strict=True) if rows[0] != rows[1]]
    assert len(differing) <= len(texts) // 1000, differing  # ties, see test_tokenizer.py
    assert theirs["texts"] == [vocabulary.decode(row) for row in ids]

    saved = read_vocabulary(tmp_path / "saved", tmp_path / "saved.model")
    assert (saved.vocab_size, saved.num_sentinels) == (vocabulary.vocab_size, EXTRA_IDS)
    assert [saved.encode(text).tolist() for text in texts] == ids


def test_transformers_reads_a_mode_token_before_the_text(vocabulary, tmp_path):
    if isinstance(vocabulary, ByteVocabulary):
        pytest.skip("bytes have no mode tokens")
    write_tokenizer(tmp_path, vocabulary, start_token=False)
    theirs = transformers_on(tmp_path, ["[NLU] heart disease"], [], tmp_path / "saved")
    assert theirs["ids"] == [[vocabulary.special_id("[NLU]"), *vocabulary.encode("heart disease"), 1]]
