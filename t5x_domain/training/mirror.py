"""Checkpoints in s3://, which Orbax does not write: it writes to this machine, and what it wrote is copied."""

import concurrent.futures
import shutil

import jax

from t5x_domain.buckets import BucketPath
from t5x_domain.conversion.native import COMMITTED, is_complete_step
from t5x_domain.errors import UserError
from t5x_domain.files import scratch_folder, upload_folder

_ARRAYS = ("params", "rest")  # what makes a step large


class Mirror:
    """A folder of this machine, and the same steps in a bucket.

    `local` begins with the newest step of the bucket, and of the others all but their arrays, so that what is written
    there follows the same rules of what to keep as it would in the bucket.
    """

    def __init__(self, remote: BucketPath) -> None:
        """Removes what an interrupted upload has left, and copies what is complete.

        Raises:
          UserError: there are several processes; each would have a part of the arrays.
        """
        if jax.process_count() > 1:
            raise UserError(
                f"{remote}: a run of several processes cannot keep checkpoints in s3://; set --gin.RUN_DIR to gs:// or "
                "a folder that all of them see."
            )
        self.remote, self.local = remote, scratch_folder()
        self._uploading = concurrent.futures.ThreadPoolExecutor(1)
        self._upload: concurrent.futures.Future | None = None
        for step in [child for child in remote.iterdir() if child.name.isdigit()] if remote.exists() else []:
            if not is_complete_step(step):
                step.rmtree()
        newest = max(self._steps(), key=int, default=None)
        for step in self._steps():
            for name, _, _ in (remote / step).listing():
                if name != COMMITTED and (step == newest or name.partition("/")[0] not in _ARRAYS):
                    (self.local / step / name).parent.mkdir(parents=True, exist_ok=True)
                    (remote / step / name).download(self.local / step / name)

    def push(self) -> None:
        """Starts to upload new steps, and to remove those that are no longer in `local`, in the background."""
        self._upload = self._uploading.submit(self._push)

    def wait(self) -> None:
        """Blocks until the bucket is like `local`. Raises what the upload raised."""
        if self._upload is not None:
            upload, self._upload = self._upload, None
            upload.result()

    def close(self) -> None:
        """Lets go of the local folder."""
        self._uploading.shutdown()
        shutil.rmtree(self.local, ignore_errors=True)

    def _push(self) -> None:
        before, now = self._steps(), {child.name for child in self.local.iterdir() if child.name.isdigit()}
        for step in sorted(now - before, key=int):
            (self.local / step / COMMITTED).touch()
            upload_folder(self.local / step, self.remote / step, last=COMMITTED)
        for step in before - now:
            (self.remote / step / COMMITTED).unlink()  # first, so that half a step is nobody's checkpoint
            (self.remote / step).rmtree()

    def _steps(self) -> set[str]:
        """Complete ones in the bucket."""
        children = self.remote.iterdir() if self.remote.exists() else ()
        return {child.name for child in children if is_complete_step(child)}
