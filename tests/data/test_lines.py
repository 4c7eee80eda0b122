import gzip

import pytest
import zstandard

from t5x_domain.data.lines import read_lines
from t5x_domain.errors import UserError

LINES = [b"line %d %s" % (number, b"x" * (number % 97)) for number in range(40_000)]  # above one block of 1 MiB
CONTENT = b"\n".join(LINES) + b"\n"
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.fixture(params=COMPRESS)
def suffix(request):
    return request.param


def test_lines(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for content in (CONTENT, CONTENT[:-1]):  # with and without a line end at the end
        path.write_bytes(COMPRESS[suffix](content))
        assert list(read_lines(str(path))) == LINES


def test_several_compressed_members_are_one_file(tmp_path, suffix):
    half = CONTENT.index(b"\n", len(CONTENT) // 2) + 1
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](CONTENT[:half]) + COMPRESS[suffix](CONTENT[half:]))
    assert list(read_lines(str(path))) == LINES


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated(tmp_path, suffix, share):
    path = tmp_path / f"a{suffix}"
    whole = COMPRESS[suffix](CONTENT)
    path.write_bytes(whole[: int(len(whole) * share)])
    lines = []
    with pytest.raises(UserError, match=rf"a{suffix}: truncated after line (\d+); fetch the file again") as error:
        lines.extend(read_lines(str(path)))
    assert len(lines) == int(str(error.value).split("line ")[1].split(";")[0]) < len(LINES)
    assert lines == LINES[: len(lines)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_not_compressed_at_all(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(CONTENT)
    with pytest.raises(UserError, match="cannot be read after line 0"):
        list(read_lines(str(path)))


def test_damaged_gzip(tmp_path):
    whole = bytearray(gzip.compress(CONTENT))
    whole[-8:-4] = b"\0\0\0\0"  # the checksum
    (tmp_path / "a.gz").write_bytes(whole)
    with pytest.raises(UserError, match="cannot be read .*CRC"):
        list(read_lines(str(tmp_path / "a.gz")))


def test_empty(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](b""))
    with pytest.raises(UserError, match="the file is empty"):
        list(read_lines(str(path)))
