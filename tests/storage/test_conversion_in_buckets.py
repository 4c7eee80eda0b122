"""Models read from buckets and written into them."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from small_models import all_bits, random_checkpoint, write_folder

from t5x_domain import buckets, convert, files
from t5x_domain.conversion.checkpoint import SecondMoments
from t5x_domain.conversion.formats import detect, open_checkpoint, state_of, write_checkpoint
from t5x_domain.conversion.safetensors_files import open_file
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderDecoder


def test_native_there_and_back_to_the_bit(bucket):
    slots = {"encoder/norm/scale": {"v": np.arange(8, dtype=np.float32)}}
    before = random_checkpoint(EncoderDecoder, second_moments=SecondMoments(7, slots))
    target = f"{bucket}/models/one"
    write_checkpoint(before, target, "native")
    after = open_checkpoint(target)
    assert all_bits(after) == all_bits(before) and after.config == before.config
    assert after.second_moments.step == 7
    np.testing.assert_array_equal(after.second_moments.slots["encoder/norm/scale"]["v"], np.arange(8))
    with pytest.raises(UserError, match=f"--to={target}: exists and is not empty"):
        write_checkpoint(before, target, "native")


def test_hugging_face_from_one_bucket_folder_to_another(bucket, tmp_path, capsys):
    source = files.path(f"{bucket}/hub/t5")
    files.upload_folder(Path(write_folder(tmp_path / "t5", "t5_1_1")), source, last="config.json")
    for origin, target, to_format in ((source, "ours", "native"), (f"{bucket}/ours", "back", "huggingface")):
        with pytest.raises(SystemExit) as ended:
            convert.main([f"--from={origin}", f"--to={bucket}/{target}", f"--to_format={to_format}"])
        assert ended.value.code == 0, capsys.readouterr()
    back = files.local_copy(files.path(f"{bucket}/back/model.safetensors"))
    expected = safetensors.numpy.load_file(tmp_path / "t5" / "model.safetensors")
    found = safetensors.numpy.load_file(back)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert f"VOCABULARY_FILE = '{bucket}" not in files.path(f"{bucket}/ours/model.gin").read_text()  # it has none


def test_the_rows_asked_for_are_all_that_is_fetched(bucket, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "_BLOCK_BYTES", 64)
    array = np.arange(20000, dtype=np.float32).reshape(2000, 10)
    safetensors.numpy.save_file({"a": array}, tmp_path / "model.safetensors")
    place = files.path(f"{bucket}/model.safetensors")
    place.upload(tmp_path / "model.safetensors")
    fetched = []
    call = buckets.BucketPath._call

    def counting(self, method, *arguments, **options):
        result = call(self, method, *arguments, **options)
        fetched.append(len(result) if method == "cat_file" else 0)
        return result

    monkeypatch.setattr(buckets.BucketPath, "_call", counting)
    rows = open_file(place)["a"].read((slice(1990, 1995),))
    np.testing.assert_array_equal(rows, array[1990:1995])
    assert sum(fetched) < 1000  # of 80,000 bytes: the header, the rows, and what is left of a block


@pytest.mark.parametrize(("to_format", "last"), [("native", "model.json"), ("huggingface", "config.json")])
def test_an_upload_that_breaks_off_leaves_no_model(bucket, proxy, to_format, last):
    target = f"{bucket}/broken"
    uploads = []

    def three_and_no_more(number, method, path):
        uploads.extend([path] if method in ("PUT", "POST") else [])
        return "403" if len(uploads) > 3 else None

    proxy.fault = three_and_no_more
    with pytest.raises(UserError, match="permission refused"):
        write_checkpoint(random_checkpoint(EncoderDecoder), target, to_format)
    proxy.fault = None
    left = [name for name, _, _ in files.listing(files.path(target))]
    assert len(left) == 3 and last not in left
    with pytest.raises(UserError):
        open_checkpoint(target)


def test_the_state_of_a_model_tells_it_from_another_in_its_place(bucket):
    target = f"{bucket}/model"
    states = []
    for seed in (0, 1):
        write_checkpoint(random_checkpoint(EncoderDecoder, seed=seed), target, "native")
        states.append(state_of(target))
        assert state_of(target) == states[-1] and states[-1].startswith(f"{target}/params (")
        files.path(target).rmtree()
    assert states[0] != states[1]
    with pytest.raises(UserError, match=f"--from={target}: there is no such folder"):
        detect(target)
