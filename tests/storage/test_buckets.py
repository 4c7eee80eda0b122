import sys

import pytest

from t5x_domain import buckets, files
from t5x_domain.errors import StorageError, UserError

TEXT = b"first\nsecond\n"


def first(*faults):
    """Makes the next requests fail so, one after the other."""
    left = list(faults)
    return lambda number, method, path: left.pop(0) if left else None


@pytest.fixture
def hasty(monkeypatch):
    """gcsfs does not wait between its own attempts, which take over half a minute otherwise."""
    monkeypatch.setattr("gcsfs.retry.min", lambda *seconds: 0.0, raising=False)


def test_a_path_is_used_like_one_of_this_machine(bucket, tmp_path):
    for root in (files.path(bucket), files.path(tmp_path)):
        folder = root / "a" / "b"
        assert not folder.exists() and not folder.is_dir()
        files.write_atomically(folder / "c.txt", TEXT)
        assert folder.is_dir() and folder.parent.is_dir() and (folder / "c.txt").is_file() and not folder.is_file()
        assert (folder / "c.txt").read_bytes() == TEXT and (folder / "c.txt").read_text() == TEXT.decode()
        assert (folder / "c.txt").stat().length == len(TEXT) and (folder / "c.txt").stat().mtime > 0
        assert list(root.iterdir()) == [root / "a"] and list(folder.glob("*.txt")) == [folder / "c.txt"]
        assert [(name, size) for name, size, _ in files.listing(root)] == [("a/b/c.txt", len(TEXT))]
        assert files.local_copy(folder / "c.txt").read_bytes() == TEXT
        with pytest.raises(FileExistsError):
            folder.mkdir()
        (folder / "c.txt").unlink()
        (folder / "c.txt").unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError) as missing:
            (folder / "c.txt").read_bytes()
        assert missing.value.strerror and missing.value.filename == str(folder / "c.txt")
    assert files.is_remote(bucket) and not files.is_remote(tmp_path)


def test_a_copy_is_made_anew_when_the_object_is(bucket):
    place = files.path(bucket) / "a.txt"
    for content in (b"old", b"newer"):
        files.write_atomically(place, content)
        assert files.local_copy(place).read_bytes() == content
    assert files.local_copy(place) == files.local_copy(place)


def test_a_stream_reads_by_blocks_and_survives_a_fault_in_the_middle(bucket, proxy, hasty, monkeypatch):
    monkeypatch.setattr(buckets, "_BLOCK_BYTES", 4)
    place = files.path(bucket) / "a.txt"
    place.write_bytes(TEXT)
    with place.open("rb") as stream:
        assert stream.read(3) == b"fir"
        proxy.fault = first("503", "reset", "429")
        assert stream.readlines() == [b"st\n", b"second\n"]
        assert (stream.seek(-4, 2), stream.read(), stream.read()) == (len(TEXT) - 4, b"ond\n", b"")
    with place.open() as stream:
        assert stream.readlines() == ["first\n", "second\n"]


def test_objects_are_neither_renamed_nor_appended_to(bucket):
    place = files.path(bucket) / "a.txt"
    for refused in (lambda: place.open("a"), lambda: place.open("w"), lambda: place.replace(files.path(bucket) / "b")):
        with pytest.raises(OSError, match="a.txt: "):
            refused()


@pytest.mark.parametrize("fault", ["503", "500", "429", "408", "reset"])
def test_what_passes_is_tried_again(bucket, proxy, hasty, fault):
    place = files.path(bucket) / "a.txt"
    proxy.fault = first(fault)
    files.write_atomically(place, TEXT)
    proxy.fault = first(fault)
    assert place.read_bytes() == TEXT
    proxy.fault = first(fault)
    assert place.exists()


def test_a_connection_on_which_nothing_comes_is_given_up(bucket, proxy, hasty, monkeypatch):
    place = files.path(bucket) / "a.txt"
    place.write_bytes(TEXT)
    monkeypatch.setattr(buckets, "_SILENT_SECONDS", 0.3)
    proxy.fault = first("stall")
    assert place.read_bytes() == TEXT


def test_each_attempt_is_a_line_and_giving_up_a_sentence(bucket, proxy, hasty, monkeypatch, caplog):
    place = files.path(bucket) / "a.txt"
    requests = 3 if bucket.startswith("s3") else 6  # that the client makes of one
    proxy.fault = first(*["503"] * 2 * requests)
    files.write_atomically(place, TEXT)
    said = [record.message for record in caplog.records if record.name == "t5x_domain.buckets"]
    assert [text.startswith(f"{place}: ") for text in said] == [True, True]
    assert "; attempt 2 in 0." in said[0] and "; attempt 3 in " in said[1]
    monkeypatch.setattr(buckets, "GIVE_UP_SECONDS", 0.2)
    proxy.fault = lambda *request: "503"
    with pytest.raises(StorageError, match=f"{place}: the storage did not answer in 1 attempts over . s .*start"):
        place.read_bytes()


@pytest.mark.parametrize("proxy", ["s3"], indirect=True)
def test_a_server_that_is_gone(proxy, monkeypatch):
    monkeypatch.setattr(buckets, "GIVE_UP_SECONDS", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # "discard": nobody listens
    buckets.filesystem("s3").clear_instance_cache()
    try:
        with pytest.raises(StorageError, match="s3://gone/a: the storage did not answer in 1 attempts"):
            files.path("s3://gone/a").read_bytes()
    finally:
        buckets.filesystem("s3").clear_instance_cache()


def test_the_time_between_attempts_doubles_up_to_a_bound(monkeypatch):
    delays, now = [], [0.0]

    def sleep(seconds):
        delays.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(buckets.time, "sleep", sleep)
    monkeypatch.setattr(buckets.time, "monotonic", lambda: now[0])
    with pytest.raises(StorageError, match="gs://b/a: .* in \\d+ attempts over 1[012]. s"):
        buckets.retrying("gs://b/a", lambda: (_ for _ in ()).throw(ConnectionResetError("reset")))
    for delay, longest in zip(delays, [0.5, 1, 2, 4, 8, 16, 20, 20, 20], strict=False):
        assert longest / 2 <= delay <= longest
    left = ["reset", "reset"]

    def breaks_off_twice():
        now[0] += 10 * buckets.GIVE_UP_SECONDS
        if left:
            raise ConnectionResetError(left.pop())
        return "done"

    assert buckets.retrying("gs://b/a", breaks_off_twice) == "done"


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [("403", "permission refused .*have the bucket's owner grant"), ("401", "no valid credentials .*, or set ")],
)
def test_what_does_not_pass_is_said_at_once(bucket, proxy, fault, sentence):
    place = files.path(bucket) / "a.txt"
    proxy.fault = lambda *request: fault
    for use in (lambda: place.write_bytes(TEXT), place.exists, place.read_bytes, lambda: list(place.parent.iterdir())):
        before = len(proxy.requests)
        with pytest.raises(UserError, match=f"{bucket}.*: {sentence}"):
            use()
        assert len(proxy.requests) - before <= 3  # fsspec may look for an object, then for a folder


def test_a_missing_bucket(proxy, proxies):
    root = "gs://no-such-bucket" if proxy is proxies["gs"] else "s3://no-such-bucket"
    place = files.path(root) / "a.txt"
    assert not place.exists()
    with pytest.raises(FileNotFoundError):
        place.read_bytes()
    with pytest.raises(UserError, match=f"{place}: there is no bucket {root}, or you may not see it; .*`(aws|gcloud) "):
        place.write_bytes(TEXT)


def test_missing_credentials(proxies, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    buckets.filesystem("s3").clear_instance_cache()
    try:
        with pytest.raises(UserError, match="s3://b/a: no valid credentials .*; run `aws configure`, or set"):
            files.path("s3://b/a").read_bytes()
    finally:
        buckets.filesystem("s3").clear_instance_cache()


@pytest.mark.parametrize(("path", "package", "extra"), [("gs://b/a", "gcsfs", "gcp"), ("s3://b/a", "s3fs", "aws")])
def test_a_missing_package(monkeypatch, path, package, extra):
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, path[:2], raising=False)
    with pytest.raises(UserError, match=rf"{path[:5]}: a package is missing .*pip install 't5x_domain\[{extra}\]'"):
        files.path(path).exists()


@pytest.mark.parametrize("path", ["http://a/b", "gs:/a/b", "s3:/a"])  # pathlib makes one slash of two
def test_another_kind_of_path(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (files.path, lambda path: files.write_atomically(path, b"")):
        with pytest.raises(UserError, match=f"{path}: neither a path of this machine nor gs:// or s3://"):
            use(path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_what_was_there(bucket, proxy):
    place = files.path(bucket) / "a.txt"
    place.write_bytes(b"before")
    proxy.fault = lambda number, method, path: "403" if method in ("PUT", "POST") else None
    with pytest.raises(UserError):
        files.write_atomically(place, TEXT * 1000)
    proxy.fault = None
    assert place.read_bytes() == b"before"


def test_what_was_removed_though_the_answer_was_lost(bucket, proxy, hasty):
    folder = files.path(bucket) / "a"
    for remove in (lambda: (folder / "b").unlink(), folder.rmtree):
        (folder / "b").write_bytes(TEXT)
        lost = ["lost"]  # of the first request that removes: the batches of gs:// and s3:// are POST
        proxy.fault = lambda n, method, p, lost=lost: lost.pop() if lost and method in ("DELETE", "POST") else None
        remove()
        assert not lost and not folder.exists()
        with pytest.raises(FileNotFoundError):
            remove()


@pytest.mark.parametrize("proxy", ["s3"], indirect=True)
def test_what_a_batch_did_not_remove_is_removed_alone(bucket, proxy, monkeypatch):
    """Of a batch s3fs drops the errors, so that nothing tells that an object is still there."""

    async def without_a_word(*_, **__):
        return []

    monkeypatch.setattr("s3fs.core.S3FileSystem._bulk_delete", without_a_word)
    folder = files.path(bucket) / "a"
    (folder / "b").write_bytes(TEXT)
    proxy.fault = lambda number, method, path: "403" if method == "DELETE" else None
    with pytest.raises(UserError, match=f"{folder}/b: permission refused"):
        folder.rmtree()
    proxy.fault = None
    folder.rmtree()
    assert not folder.exists()


def test_a_folder_in_a_folder_of_its_name(bucket):
    (files.path(bucket) / "a" / "a" / "b").write_bytes(TEXT)
    assert list((files.path(bucket) / "a").iterdir()) == [files.path(bucket) / "a" / "a"]


def test_a_growing_file_is_replaced_by_a_longer_one(bucket, proxy):
    growing = files.Growing(files.path(bucket) / "run")
    file = growing.local / "lines.txt"
    for text in ("one\n", "two\n"):
        with file.open("a") as stream:
            stream.write(text)
        assert (files.path(bucket) / "run" / "lines.txt").exists() == (text == "two\n")
        growing.publish()
    assert (files.path(bucket) / "run" / "lines.txt").read_text() == "one\ntwo\n"
    before = len(proxy.requests)
    growing.publish()
    assert len(proxy.requests) == before  # nothing has changed
