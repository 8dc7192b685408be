"""Model repositories of the Hugging Face hub, read and written by whole commits.

What one commit holds is there altogether or not at all; nothing else says that it is complete.
"""

import contextlib
import pathlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping

from twinflow_jax.errors import UserError, reason

NAME = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
LONGEST = 96  # characters of a name
MEANS = {  # what an answer's status means to a user
    401: "it does not take the token: set HF_TOKEN to one that it knows",
    403: "this token may not do that: give it permission to write there",
    404: "there is no such repository for this token: check its name",
    412: "somebody else writes there: let one run at a time have it",
}


class Refused(UserError):
    """What the hub did not do: because of a token, a permission or the network."""


def check_name(flag: str, name: str) -> None:
    """Refuses what names no repository.

    Raises:
      UserError: names the flag, and not the value, which may be a token by mistake.
    """
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        raise UserError(
            f"{flag} is no name of a repository: give USER/NAME of letters, digits, - _ and . "
            "(a token belongs into HF_TOKEN)"
        )


def show_progress(shown: bool) -> None:
    """Whether what goes on has bars; HF_HUB_DISABLE_PROGRESS_BARS is stronger."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    with warnings.catch_warnings(action="ignore"):
        enable_progress_bars() if shown else disable_progress_bars()


class Repository:
    """name: USER/NAME. The token is the hub's own affair: HF_TOKEN, or what `hf auth login` left.

    Every method raises Refused with one line where the hub does not do it.
    """

    def __init__(self, name: str):
        self.name = name

    def open(self) -> None:
        """Makes the repository, private, unless it is there."""
        with self._told() as api:
            api.create_repo(self.name, private=True, exist_ok=True)

    def look(self) -> tuple[str, list[str]]:
        """`(commit, names)`: its newest commit, and the files in that."""
        with self._told() as api:
            found = api.model_info(self.name)
            return found.sha, sorted(file.rfilename for file in found.siblings or ())

    def fetch(self, commit: str, patterns: list[str], folder: pathlib.Path) -> None:
        """Copies files of a commit to a folder; those that are there already stay."""
        with self._told() as api:
            api.snapshot_download(
                self.name, revision=commit, allow_patterns=patterns, local_dir=folder
            )

    def commit(
        self, parent: str, added: Mapping[str, bytes | pathlib.Path], message: str,
        removed: Collection[str] = (),
    ) -> str:
        """Adds files and removes folders in one commit on top of `parent`; returns the commit.

        What it removes is removed from history too, so that nothing of it is stored any more.
        """
        with self._told() as api:
            import huggingface_hub as library

            adds = [library.CommitOperationAdd(name, data) for name, data in added.items()]
            removes = [library.CommitOperationDelete(name, is_folder=True) for name in removed]
            made = api.create_commit(
                self.name, adds + removes, commit_message=message, parent_commit=parent
            ).oid
            if removed:
                api.super_squash_history(self.name)
                made = api.model_info(self.name).sha
            return made

    @contextlib.contextmanager
    def _told(self) -> Iterator:
        """The hub's interface; what fails inside, as Refused."""
        import huggingface_hub as library  # slow to import, and needed by few
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # it raises what it gave up
        token = library.get_token()
        if not token:
            raise Refused(f"hub {self.name}: it takes a token: set HF_TOKEN, or hf auth login")
        try:
            yield library.HfApi(token=token)
        except Exception as error:  # it raises many kinds
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status is None and getattr(error, "errno", None) is not None:
                raise  # of this machine's files
            means = MEANS.get(status, "it does not answer as it should")
            says = re.sub(r"\?\S+", "", reason(error)).replace(token, "TOKEN")  # no signed address
            raise Refused(f"hub {self.name}: {means} ({says})") from error
