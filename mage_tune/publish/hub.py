"""Speaking to the Hub: what is checked before an upload, the upload as one commit, and its errors in one line.

The order makes every step safe to repeat: the repository is created if it is missing, the state of the branch is read,
files that are there already are left out, and everything else goes up in one commit on top of exactly that state. The
Hub stores weights by their hash, so what an interrupted upload has sent is not sent again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    RepoFile,
    constants,
    get_token,
    set_client_factory,
)

# HTTPError is the base of every error of the HTTP library that this version of the client uses, whichever that is.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory

from mage_tune.publish.card import Base
from mage_tune.publish.contents import CONFIG, Content, to_bytes

PATIENCE = 120.0
"""Seconds without a sign of life from the Hub after which a request counts as failed; the client alone never gives up.
A large commit may take it a minute."""


class HubError(ValueError):
    """What went wrong on the way to the Hub, in one line for the person who publishes."""


def connect() -> HfApi:
    """The client, made to notice a connection that hangs."""

    def impatient() -> Any:
        client = default_client_factory()
        client.timeout = PATIENCE
        return client

    set_client_factory(impatient)
    return HfApi()


FIXES = {
    401: "the token is not accepted: log in again (hf auth login) or set HF_TOKEN to a valid one",
    402: "the account's plan does not allow this",
    403: "the token may not write there: use one with write access to this namespace",
    404: "not found, or the token may not see it",
    409: "it conflicts with another change; publish again",
    412: "somebody else changed the repository in the meantime; publish again",
    413: "a file is larger than the Hub takes",
    429: "too many requests; wait some minutes and publish again",
}
"""HTTP status -> what it means for the person who publishes."""


@contextmanager
def speaking(doing: str) -> Iterator[None]:
    """Turn whatever the client raises into a `HubError` that begins with `doing`.

    Raises:
        HubError: see above.
    """
    try:
        yield
    except LocalTokenNotFoundError:
        raise HubError(f"{doing}: no token; log in (hf auth login) or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise HubError(f"{doing}: offline mode is on; unset HF_HUB_OFFLINE") from None
    except (HTTPError, OSError) as error:
        raise HubError(f"{doing}: {explain(error)}") from error
    except json.JSONDecodeError:
        raise HubError(f"{doing}: the answer is not the Hub's, a proxy's perhaps; run the same command again") from None
    except RuntimeError as error:  # what the client wraps failed uploads of weights in
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise HubError(f"{doing}: {explain(cause)}") from error


def explain(error: Exception) -> str:
    """One error of the client in words."""
    if not isinstance(error, HfHubHTTPError):
        what = " ".join(str(error).split()) or type(error).__name__
        return f"the connection broke ({what}); run the same command again, which is safe"
    status = error.response.status_code
    if status >= 500:
        return f"the Hub has a problem (HTTP {status}); run the same command again later, which is safe"
    said = " ".join((error.server_message or "").split())
    return f"{FIXES.get(status, 'refused')} (HTTP {status}{', ' * bool(said)}{said})"


def check_account(api: HfApi, repo_id: str) -> None:
    """Whether the token may write to the namespace, before anything is prepared.

    Raises:
        HubError: there is no token, it is not accepted, it can only read, or it belongs to somebody else.
    """
    if get_token() is None:
        raise HubError("no Hub token: log in (hf auth login) or set HF_TOKEN")
    with speaking("checking the token"):
        account = api.whoami()
    namespace = repo_id.partition("/")[0]
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise HubError("the token can only read: make one with write access")
    if token.get("role") == "fineGrained":
        scopes = token.get("fineGrained", {}).get("scoped", [])
        if not any(scope["entity"].get("name") in (namespace, repo_id) for scope in scopes if may_write(scope)):
            raise HubError(f"the token is fine-grained and has no write access to {namespace} or {repo_id}: add it")
        return
    mine = {account["name"], *(organisation["name"] for organisation in account.get("orgs", []))}
    if namespace not in mine:
        raise HubError(f"--repo {repo_id}: the token belongs to {account['name']}, who is no member of {namespace}")


def may_write(scope: dict[str, Any]) -> bool:
    """Whether one scope of a fine-grained token lets it write to repositories."""
    return "repo.write" in scope.get("permissions", [])


def find_base(api: HfApi, base_id: str, trained_on: Path, license: str | None, *, offline: bool) -> Base:
    """What the card needs of the base model: from its card on the Hub, or beside its local copy.

    Args:
        api: client.
        base_id: Hub id.
        trained_on: where the run found it; a folder may hold its card.
        license: licence given by the user, which then wins.
        offline: do not ask the Hub when the rest is known.

    Raises:
        HubError: the base is not on the Hub, or its licence is unknown.
    """
    local = trained_on / "README.md"
    data: Any = ModelCard.load(local, ignore_metadata_errors=True).data if local.is_file() else None
    if not offline or (data is None and license is None):
        data = card_on_hub(api, base_id) or data
    found = license or (data.license if data is not None else None)
    if not isinstance(found, str):
        raise HubError(f"{base_id}: its licence is unknown; look it up and give it (--license apache-2.0, for example)")
    language = data.language if data is not None else None
    return Base(
        base_id,
        found,
        license_name=data.license_name if data is not None and license is None else None,
        license_link=data.license_link if data is not None and license is None else None,
        language=[language] if isinstance(language, str) else language,
    )


def card_on_hub(api: HfApi, base_id: str) -> ModelCardData | None:
    """The base's metadata as the Hub knows it; None when it may not be read or there is none.

    Raises:
        HubError: there is no such model, or the Hub cannot be asked.
    """
    with speaking(f"looking up the base model {base_id}"):
        try:
            return api.model_info(base_id).card_data
        except GatedRepoError:
            return None  # it exists, which is all that is needed of it
        except RepositoryNotFoundError:
            raise HubError(f"{base_id}: no such base model on the Hub; give the right id (--base-id)") from None


def upload(
    api: HfApi,
    repo_id: str,
    files: dict[str, Content],
    *,
    message: str,
    private: bool = False,
    revision: str | None = None,
) -> str | None:
    """Bring a branch of a repository to hold `files`, in one commit.

    Args:
        api: client.
        repo_id: repository; created when it is missing.
        files: path in the repository -> content.
        message: first line of the commit.
        private: create it private.
        revision: branch; created when it is missing. None is the main one.

    Returns:
        The commit's id, or None when everything was there already.

    Raises:
        HubError: one line with what to do; running again is always safe.
    """
    branch = revision or constants.DEFAULT_REVISION
    with speaking(f"creating {repo_id}"):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    with speaking(f"reading {repo_id}"):
        info = api.model_info(repo_id, revision=branch)
        tree = api.list_repo_tree(repo_id, recursive=True, revision=branch)
        there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    if private and not info.private:
        raise HubError(f"{repo_id}: exists and is public; make it private in its settings, or leave out --private")
    refuse_other_kind(repo_id, set(there), set(files))
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content)
        for name, content in files.items()
        if name not in there or not is_same(content, there[name])
    ]
    operations += [CommitOperationDelete(name) for name in sorted(there.keys() - files.keys()) if is_ours(name)]
    if not operations:
        return None
    with speaking(f"uploading to {repo_id}"):
        try:
            commit = api.create_commit(
                repo_id, operations, commit_message=message, revision=branch, parent_commit=info.sha
            )
        except RevisionNotFoundError:
            raise HubError(f"{repo_id}: branch {branch} disappeared meanwhile; run the same command again") from None
    return str(commit.oid)


def refuse_other_kind(repo_id: str, there: set[str], files: set[str]) -> None:
    """An adapter and merged weights in one repository would be loaded on top of each other.

    Raises:
        HubError: the repository holds the other kind.
    """
    if CONFIG in there and CONFIG not in files:
        raise HubError(f"{repo_id}: holds an adapter; publish the merged weights to a repository of their own")
    if CONFIG in files and "config.json" in there:
        raise HubError(f"{repo_id}: holds a whole model; publish the adapter to a repository of its own")


def is_ours(name: str) -> bool:
    """Files of an earlier publication that a new one without them should remove: measurements and old shards."""
    return re.fullmatch(r"eval/[^/]+\.(json|png)|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name) is not None


def is_same(content: Content, remote: RepoFile) -> bool:
    """Whether a file is on the Hub already, by the hash that the Hub knows it under."""
    if remote.lfs is not None:
        return sha256(content) == remote.lfs.sha256
    data = to_bytes(content)
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == remote.blob_id


def sha256(content: Content) -> str:
    """Of bytes or of a file, read piece by piece."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_to_collection(api: HfApi, collection: str, repo_id: str) -> None:
    """List the repository in a collection.

    Raises:
        HubError: the collection is not there, or the token may not write to it.
    """
    with speaking(f"{repo_id} is published, but adding it to collection {collection}"):
        api.add_collection_item(collection, item_id=repo_id, item_type="model", exists_ok=True)
