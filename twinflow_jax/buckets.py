"""Object storage, `gs://BUCKET/...`, where it is otherwise than folders on a disk.

An object appears whole or not at all, nothing is renamed or appended to, and there are no locks.
"""

import concurrent.futures
import logging
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterable

import fsspec.config
from etils import epath

from twinflow_jax.errors import UserError, reason

# gcsfs would keep what it once listed for ever, and never see what other processes write.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it raises what it logs with tracebacks

PACKAGES = ("aiohttp.", "gcsfs.", "google.api_core.", "google.auth.", "requests.")  # of its errors
REFUSED = re.compile(r"\b403\b|Forbidden")
UNKNOWN = re.compile(r"\b401\b|credential|token", re.IGNORECASE)


def is_remote(path: epath.PathLike) -> bool:
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """A path from the root, or from its bucket, which epath takes for a folder here."""
    path = epath.Path(path)
    return path if is_remote(path) else path.resolve()


class Copying:
    """A copy that one thread keeps up to date in the background. writes: whether there is one."""

    def __init__(self, writes: bool):
        self._writes = writes
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._running: concurrent.futures.Future | None = None

    def _copy(self) -> None:
        """Copies what has changed."""
        raise NotImplementedError

    def copy(self) -> None:
        """Begins to copy what has changed, unless that is going on."""
        if self._writes and (self._running is None or self._running.done()):
            self._running = self._thread.submit(self._copy)

    def settle(self) -> None:
        """Waits until everything is there."""
        if self._writes:
            self._thread.submit(self._copy).result()

    def close(self) -> None:
        self.settle()
        self._thread.shutdown()


class Mirror(Copying):
    """Where the files of a folder that are appended to lie: there, or for a bucket in a folder of
    this machine, whose files are copied there in the background.

    Where another process begins, it `names` those that it goes on with. Only what a checkpoint
    would be ahead of has to be waited for, by `settle`.
    """

    def __init__(self, target: epath.PathLike, names: Iterable[str] = (), writes: bool = True):
        super().__init__(writes and is_remote(target))
        self._target = epath.Path(target)
        self.folder, self._copied = self._target, {}
        if is_remote(target):
            self._own = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            self.folder = epath.Path(self._own.name)
            for name in names:
                if (self._target / name).exists():
                    (self._target / name).copy(self.folder / name)

    def _copy(self) -> None:
        for file in sorted(pathlib.Path(self.folder).rglob("[!.]*")):  # hidden ones are not whole
            changed = file.stat().st_mtime_ns
            if file.is_file() and self._copied.get(file) != changed:
                (self._target / file.relative_to(self.folder)).write_bytes(file.read_bytes())
                self._copied[file] = changed


def explained(error: BaseException) -> UserError | None:
    """What a bucket's answer means to a user; None for any other error."""
    text = reason(error)
    asked = re.search(r"(?:^|[/ ])b/([^/?\s]+)", text)
    own = "gcsfs" in sys.modules and type(error).__module__.startswith(PACKAGES)
    if not own and not (asked and isinstance(error, OSError) and error.errno is None):
        return None
    bucket = f"gs://{asked[1]}" if asked else "object storage (gs://)"
    if REFUSED.search(text):
        what = "these credentials may not do that: give them the role Storage Object Admin there"
    elif isinstance(error, FileNotFoundError):
        what = "there is no such bucket: check its name"
    elif UNKNOWN.search(text):
        what = "it takes credentials: gcloud auth application-default login"
    else:
        what = "it does not answer: the same command goes on when it does"
    return UserError(f"{bucket}: {what} ({text})")
