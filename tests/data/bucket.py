"""Buckets in memory, in the place of Google's."""

from fsspec.implementations.memory import MemoryFileSystem

from t5x_domain import buckets


class Objects(MemoryFileSystem):
    """fsspec's, where a folder exists while it holds an object, and names are listed as a bucket's are."""

    cachable = False
    store, pseudo_dirs = {}, []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("/").removeprefix("gs:/").replace("//", "/"))

    def mkdir(self, path, create_parents=True, **kwargs):
        """A bucket has no folders to make."""

    makedirs = mkdir


def in_memory(monkeypatch):
    """A fixture: gs://… are objects in memory. Yields {name: content}."""
    objects = Objects()
    monkeypatch.setattr(buckets, "filesystem", lambda scheme: objects)
    yield lambda: {name.removeprefix("/"): file.getvalue() for name, file in objects.store.items()}
    objects.store.clear()
