"""Upload an adapter's folder to the Hub: checked before the first request, one commit, private unless told otherwise.

A second attempt sends only what is missing, since the Hub knows large files by their hash. Nothing remote is deleted.
The token comes from the environment or the saved login and appears nowhere: not in messages, not in arguments.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from data_tools.progress import Progress
from finetune.errors import BadInput, BrushworkError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Answer = TypeVar("Answer")

ALLOWED = re.compile(r"README\.md|LICENSE\.txt|Notice\.txt|training_config\.json|pytorch_lora_weights\.safetensors|adapter_model\.safetensors|adapter_config\.json|thinking_tokens\.safetensors"
                     r"|images/[A-Za-z0-9][\w.\-]*\.(png|webp|jpg)")
REPO = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}")
# "sk-" begins a word, be it after a line's end as JSON writes it: "desk-with-a-lamp-and-a-cup" is no token.
SECRETS = re.compile(rb"hf_[A-Za-z0-9]{20,}|(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))sk-[A-Za-z0-9_\-]{20,}|ghp_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}")
MACHINE_PATHS = re.compile(rb"(?:/home/|/root/|/Users/|/mnt/|/tmp/|/workspace/)[\w.\-]+|\b[A-Z]:\\\\?[\w.\-]+")
TEXT_ENDINGS = (".md", ".txt", ".json")
RETRIED = (408, 429, 500, 502, 503, 504)
PAUSES = (1.0, 4.0, 15.0)
LONGEST_PAUSE = 60.0


class PublishError(BrushworkError):
    """The Hub refused, could not be reached, or holds something else than expected."""


@dataclass(frozen=True)
class PublishedFile:
    """name: path in the repository.  content: its bytes."""

    name: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Hash of the content, hex."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Published:
    """url: of the page.  commit: its hash.  sent: names of the files in the commit; empty when all were there already."""

    url: str
    commit: str
    sent: tuple[str, ...]
    private: bool


def check_files(files: Sequence[PublishedFile], repo: str) -> None:
    """Everything is something a page needs and nothing tells secrets or where the author's files lie. Raises BadInput."""
    if not REPO.fullmatch(repo) or ".." in repo:
        raise BadInput(f"{repo!r} is not the name of a repository", where="REPO", fix="OWNER/NAME with letters, digits, - _ and .")
    names = [file.name for file in files]
    weights = "adapter_model.safetensors" if "adapter_config.json" in names else "pytorch_lora_weights.safetensors"
    for needed in ("README.md", weights):
        if needed not in names:
            raise BadInput(f"{needed} is missing from what would be published")
    for file in files:
        if not ALLOWED.fullmatch(file.name) or ".." in PurePosixPath(file.name).parts:
            raise BadInput(f"{file.name} does not belong on an adapter's page")
        text = file.content if file.name.endswith(TEXT_ENDINGS) else _header_of(file)
        for pattern, what in ((SECRETS, "what looks like an access token"), (MACHINE_PATHS, "a path of this machine")):
            found = pattern.search(text)
            if found and not (pattern is MACHINE_PATHS and file.name in ("LICENSE.txt", "Notice.txt")):
                shown = "" if pattern is SECRETS else f" ({found.group()[:60].decode(errors='replace')})"
                raise BadInput(f"{file.name} contains {what}{shown}", where=file.name, fix="remove it from the recipe, the prompts or the adapter's metadata")


def _header_of(file: PublishedFile) -> bytes:
    if not file.name.endswith(".safetensors"):
        return b""
    length = int.from_bytes(file.content[:8], "little")
    return file.content[8:8 + length]


def publish(files: Sequence[PublishedFile], repo: str, *, private: bool, message: str, progress: Progress | None = None,
            pause: Callable[[float], None] = time.sleep) -> Published:
    """Create the repository if it is not there and bring `files` into it with one commit.

    Raises BadInput from `check_files`; PublishError when there is no token, the Hub refuses, the repository is public
    although private was asked for, or the connection fails four times.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    check_files(files, repo)
    progress = progress or Progress()
    token = get_token()
    if not token:
        raise PublishError("there is no Hub token", where=repo, fix="run `hf auth login`, or set HF_TOKEN to a token with write permission")
    hub = Patient(HfApi(token=token), token, repo, progress, pause)
    hub.ask(lambda api: api.create_repo(repo, private=private, exist_ok=True))
    remote = hub.ask(lambda api: api.repo_info(repo, files_metadata=True))
    if private and not remote.private:
        raise PublishError("the repository exists and is public", where=repo, fix="add --public if that is meant, or choose another name")
    missing = [file for file in files if not _is_there(file, remote)]
    if not missing:
        return Published(f"{hub.api.endpoint}/{repo}", remote.sha or "", (), bool(remote.private))
    with progress.phase("uploading", len(missing)) as advance:
        # One object a file for all attempts: huggingface_hub marks on it what has arrived.
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content) for file in missing]
        commit = hub.ask(lambda api: api.create_commit(repo, operations, commit_message=message, parent_commit=remote.sha, num_threads=2))
        advance(len(missing))
    return Published(f"{hub.api.endpoint}/{repo}", commit.oid, tuple(file.name for file in missing), bool(remote.private))


def _is_there(file: PublishedFile, remote: Any) -> bool:
    """Whether the repository already holds exactly this content under this name."""
    blob = hashlib.sha1(b"blob %d\0" % len(file.content) + file.content).hexdigest()
    for sibling in remote.siblings or ():
        if sibling.rfilename == file.name:
            known = sibling.lfs["sha256"] if sibling.lfs else None
            return known == file.sha256 if known else sibling.blob_id == blob
    return False


class Patient:
    """Asks the Hub, waits and asks again where that can help, and turns every failure into one clear line."""

    def __init__(self, api: HfApi, token: str, repo: str, progress: Progress, pause: Callable[[float], None]):
        self.api, self.token, self.repo, self.progress, self.pause = api, token, repo, progress, pause

    def ask(self, request: Callable[[HfApi], Answer]) -> Answer:
        """The answer to `request`; at most four attempts. Raises PublishError."""
        from huggingface_hub.errors import HfHubHTTPError

        for wait in (*PAUSES, None):
            try:
                return request(self.api)
            except HfHubHTTPError as problem:
                status = problem.response.status_code if problem.response is not None else None
                if wait is None or status not in RETRIED:
                    raise self._refusal(status, problem) from None
                self._wait(wait, f"the Hub answered {status}", problem.response.headers)
            except ValueError as problem:
                raise PublishError(f"the card was refused: {self._clean(problem)}", where=self.repo) from None
            except Exception as problem:
                if not _is_connection(problem):
                    raise
                if wait is None:
                    raise PublishError(f"the connection to the Hub failed: {self._clean(problem)}", where=self.repo,
                                       fix="run the same command again: what has arrived is not sent twice") from None
                self._wait(wait, "the connection was lost", {})
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, seconds: float, reason: str, headers: Mapping[str, str]) -> None:
        asked = headers.get("retry-after", "")
        seconds = min(float(asked), LONGEST_PAUSE) if asked.isdigit() else seconds
        self.progress.say(f"{reason}; trying again in {seconds:.0f} s")
        self.pause(seconds)

    def _refusal(self, status: int | None, problem: Exception) -> PublishError:
        what, fix = {
            401: ("the Hub does not know the token (401)", "run `hf auth login` again, or set HF_TOKEN to a valid token"),
            403: ("the token may not write there (403)", "make a token with write permission for this owner"),
            404: ("no such owner, or the token may not see it (404)", "check the name before the slash"),
            409: ("the repository is being changed by someone else (409)", "run the same command again in a minute"),
            412: ("the repository has changed meanwhile (412)", "run the same command again"),
            413: ("a file is too large for the Hub (413)", "publish a smaller rank with `brushwork adapter resize`"),
        }.get(status or 0, (f"the Hub refused ({status}): {self._clean(problem)}", "run the same command again: what has arrived is not sent twice"))
        return PublishError(what, where=self.repo, fix=fix)

    def _clean(self, problem: object) -> str:
        """The first line of a message, without the token."""
        text = str(problem).replace(self.token, "***")
        return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", " ".join(text.split()))[:200]


def _is_connection(problem: Exception) -> bool:
    """Whether this is a failure of the wire: an OSError, or one of the HTTP client's own transport errors."""
    names = {base.__name__ for base in type(problem).__mro__}
    return isinstance(problem, OSError) or bool(names & {"TransportError", "RequestError", "ConnectError", "TimeoutException"})
