"""Paths in buckets, gs:// and s3://, as `epath.Path`: what passes is tried again, what does not is explained.

Importing this module makes `epath.Path("gs://…")` and `epath.Path("s3://…")` a `BucketPath`, for Orbax too. They are
reached with fsspec (gcsfs, s3fs: the extras `gcp` and `aws`), which find credentials where Google's and Amazon's own
tools do.
"""

import contextlib
import errno
import io
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath
from etils.epath.gpath import PosixGPath
from etils.epath.stat_utils import StatResult

from t5x_domain.errors import StorageError, UserError

GIVE_UP_SECONDS = 120.0
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 20.0  # seconds
_CONNECT_SECONDS, _SILENT_SECONDS = 30.0, 60.0  # after which a connection counts as lost
_BLOCK_BYTES = 8 << 20  # read at once from an object that is read as a stream

# What a connection may raise that the next one may not. Named, because the packages may be absent.
_TRANSIENT = {
    *("builtins.ConnectionError", "builtins.TimeoutError", "http.IncompleteRead"),
    *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError", "aiohttp.ServerDisconnectedError"),
    *("requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError", "google.TransportError"),
    *(
        "botocore.HTTPClientError",
        "botocore.ConnectionError",
        "botocore.IncompleteReadError",
        "botocore.ResponseParserError",
    ),
}
_NO_CREDENTIALS = {
    *("google.DefaultCredentialsError", "google.RefreshError"),
    *("botocore.NoCredentialsError", "botocore.PartialCredentialsError", "botocore.ProfileNotFound"),
}


class _Cloud(NamedTuple):
    extra: str  # of this package's
    login: str  # what gives credentials
    make: str  # what makes a bucket


_CLOUDS = {
    "gs": _Cloud(
        "gcp",
        "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
        "gcloud storage buckets create",
    ),
    "s3": _Cloud(
        "aws",
        "run `aws configure`, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "aws s3 mb",
    ),
}


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: 408, 429, 5xx, and connections that break or time out."""
    for cause in _causes(error):
        status = _status(cause)
        if status is not None:
            return status in (408, 429) or 500 <= status < 600
        if _names(cause) & _TRANSIENT:
            return True
    return False


def retrying[T](place: object, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Calls `call(*arguments, **options)` until it succeeds, for as long as its errors are transient.

    The time between attempts doubles from half a second to twenty, less a random part, so that many processes do not
    come back together (Brooker 2015, "Exponential Backoff And Jitter"). Each failed attempt is logged in a line. Of an
    attempt's own time no more than twenty seconds count: a transfer may have gone well for long before it broke off.

    Args:
      place: the path at which it works, for messages.
      call: something that may be done twice, such as reading or writing an object whole.
      *arguments, **options: its arguments.

    Raises:
      StorageError: it failed for `GIVE_UP_SECONDS`.
      UserError: credentials or permission are missing.
      Any other error of `call`, at once.
    """
    start, attempts, failing = time.monotonic(), 0, 0.0
    while True:
        began = time.monotonic()
        try:
            return call(*arguments, **options)
        except Exception as error:
            attempts += 1
            if not is_transient(error):
                raise _explained(place, error) from error
            now, reason = time.monotonic(), _one_line(error)
            delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** (attempts - 1)) * random.uniform(0.5, 1.0)
            failing += min(now - began, _LONGEST_DELAY) + delay
            if failing > GIVE_UP_SECONDS:
                raise StorageError(
                    f"{place}: the storage did not answer in {attempts} attempts over {now - start:.0f} s ({reason}); "
                    "what was complete is safe, start the same command again when it does."
                ) from error
        logging.getLogger(__name__).warning("%s: %s; attempt %d in %.1f s", place, reason, attempts + 1, delay)
        time.sleep(delay)


def filesystem(scheme: str) -> Any:
    """The file system of "gs" or "s3"; fsspec keeps one for each process.

    Raises:
      UserError: its package is not installed.
    """
    import fsspec

    try:
        # What other processes have written must be seen.
        found = fsspec.filesystem(scheme, use_listings_cache=False, **_client_options(scheme))
    except ImportError as error:
        raise UserError(
            f"{scheme}://: a package is missing ({error}); pip install 't5x_domain[{_CLOUDS[scheme].extra}]'."
        ) from error
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # errors are explained here
    return found


def _client_options(scheme: str) -> dict[str, Any]:
    """After how long a client takes a connection for lost, and how often it repeats a request itself, quietly.

    It does so that one of the many parts of a large object does not cost the others; `retrying` does the rest. s3fs is
    told to repeat it twice; gcsfs sends it six times in all and cannot be told otherwise.
    """
    if scheme == "s3":
        times = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _SILENT_SECONDS}
        return {"config_kwargs": {"retries": {"max_attempts": 2, "mode": "standard"}, **times}}
    import aiohttp

    return {"requests_timeout": aiohttp.ClientTimeout(sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS)}


@epath.register_path_cls(("gs://", "s3://"))
class BucketPath(PosixGPath):
    """An object, or all objects whose names begin with this and a slash: a folder exists while it holds one."""

    def _info(self) -> dict[str, Any] | None:
        try:
            return self._call("info")
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        return self._info() is not None

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def stat(self) -> StatResult:
        info = self._call("info")
        return StatResult(info["type"] == "directory", info["size"], _nanoseconds(info) // 10**9)

    def iterdir(self) -> Iterator["BucketPath"]:
        folder = "/".join(self.parts[2:])
        for name in self._call("ls", detail=False):
            name = name.strip("/")
            if name != folder:  # what some tools write to mark an empty folder
                yield self / name.rpartition("/")[2]

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        for name in (self / pattern)._call("glob"):
            yield type(self)(f"{self.parts[1]}://{name}")

    def matching(self) -> list[tuple[str, int]]:
        """(object, bytes) where this path matches, in which *, ?, [ ] and ** do what they do in a shell; sorted."""
        found = self._call("glob", detail=True).items()
        return sorted((f"{self.parts[1]}://{name}", info["size"]) for name, info in found if info["type"] == "file")

    def listing(self) -> list[tuple[str, int, int]]:
        """(name below this folder, bytes, nanoseconds) of every object, by name, in one request for each thousand."""
        found = self._call("find", detail=True)
        root = "/".join(self.parts[2:]) + "/"
        return sorted((name.removeprefix(root), info["size"], _nanoseconds(info)) for name, info in found.items())

    def walk(self, **options: Any) -> Iterator[tuple["BucketPath", list[str], list[str]]]:
        for folder, folders, names in self._call("walk", on_error="raise"):
            yield type(self)(f"{self.parts[1]}://{folder}"), list(folders), [name for name in names if name]

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Makes nothing: a folder comes with its first object. A bucket is its owner's to make."""
        if not exist_ok and self.exists():
            raise FileExistsError(f"{self} already exists.")

    def rmdir(self) -> None:
        if self.exists():
            raise OSError(f"{self} is not empty.")

    def unlink(self, missing_ok: bool = False) -> None:
        self._remove("rm_file", missing_ok or self.is_file())

    def rmtree(self, missing_ok: bool = False) -> None:
        self._remove("rm", missing_ok or self.exists(), recursive=True)
        for name, _, _ in self.listing():  # s3fs does not say what it could not remove; one by one the reason is given
            (self / name).unlink(missing_ok=True)

    def _remove(self, method: str, expected: bool, **options: Any) -> None:
        """Looks first: "not found" is also what is said when the answer to an earlier attempt was lost."""
        if not expected:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        with contextlib.suppress(FileNotFoundError):
            self._call(method, **options)

    def rename(self, target: epath.PathLike) -> "BucketPath":
        """Refused: buckets cannot do it in one step. Write whole objects instead."""
        raise io.UnsupportedOperation(f"{self}: objects cannot be renamed to {target}.")

    replace = rename

    def open(self, mode: str = "r", **options: Any) -> Any:
        """A stream to read from; objects are written whole, by `write_bytes`."""
        if "w" in mode or "a" in mode:
            raise io.UnsupportedOperation(f"{self}: mode {mode!r}; objects are written whole, with write_bytes.")
        stream = io.BufferedReader(_Reader(self), _BLOCK_BYTES)
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding="utf-8")

    def read_bytes(self) -> bytes:
        return self._call("cat_file")

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode("utf-8")

    def write_bytes(self, data: bytes) -> int:
        """The object appears whole, or stays as it was."""
        self._write(lambda files: files.pipe_file(str(self), bytes(data)))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode("utf-8"))

    def upload(self, file: os.PathLike) -> None:
        """Makes this object of a file of this machine; it appears whole, or stays as it was."""
        self._write(lambda files: files.put_file(os.fspath(file), str(self)))

    def download(self, file: os.PathLike) -> None:
        """Copies this object into a file of this machine."""
        self._call("get_file", os.fspath(file))

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A method of fsspec's with this path."""

        def call() -> Any:  # making the file system asks for credentials, which may fail like any request
            return getattr(filesystem(self.parts[1]), method)(str(self), *arguments, **options)

        return retrying(self, call)

    def _write(self, write: Callable[[Any], None]) -> None:
        try:
            retrying(self, lambda: write(filesystem(self.parts[1])))
        except FileNotFoundError as error:  # an object needs nothing but its bucket
            bucket = f"{self.parts[1]}://{self.parts[2]}"
            raise UserError(
                f"{self}: there is no bucket {bucket}, or you may not see it; mend the path, or make it with "
                f"`{_CLOUDS[self.parts[1]].make} {bucket}`."
            ) from error


class _Reader(io.RawIOBase):
    """An object read by ranges, each tried again by itself: a lost connection costs a block, not the file."""

    def __init__(self, path: BucketPath) -> None:
        super().__init__()
        self._path, self._size, self._position = path, path.stat().length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        stop = min(self._position + len(buffer), self._size)
        if stop <= self._position:
            return 0
        block = self._path._call("cat_file", start=self._position, end=stop)
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)


def _nanoseconds(info: Mapping[str, Any]) -> int:
    """The date of an object's last change; 0 of a folder."""
    changed = info.get("mtime", info.get("LastModified"))
    return 0 if changed is None else int(changed.timestamp() * 1e9)


def _explained(place: object, error: Exception) -> Exception:
    """The sentence for what the user can mend; any other error as it is."""
    cloud = _CLOUDS.get(str(place).partition("://")[0])
    if cloud is None:
        return error
    if isinstance(error, FileNotFoundError):  # with the fields that a disk's has, from which messages are made
        return FileNotFoundError(errno.ENOENT, "there is no such object", str(place))
    names = set().union(*(_names(cause) for cause in _causes(error)))
    statuses = {_status(cause) for cause in _causes(error)}
    if names & _NO_CREDENTIALS or 401 in statuses:
        return UserError(f"{place}: no valid credentials ({_one_line(error)}); {cloud.login}.")
    if "builtins.PermissionError" in names or 403 in statuses or str(error).startswith("Forbidden:"):
        return UserError(
            f"{place}: permission refused ({_one_line(error)}); have the bucket's owner grant your account reading and "
            f"writing of objects, or {cloud.login}."
        )
    return error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _names(error: BaseException) -> set[str]:
    """Its classes as `package.Class`."""
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    """HTTP's status, where gcsfs, aiohttp, requests and botocore keep it."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = next((getattr(error, name) for name in ("code", "status") if hasattr(error, name)), None)
        found = getattr(response, "status_code", found)
    return int(found) if str(found).isdigit() else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
