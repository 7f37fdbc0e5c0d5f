"""`mage-tune publish`: a finished run in, a repository on the Hub out, in one commit, with the proof in its card.

1. Early checks: repository id, base model's id, token. 2. The files, from an allow-list (contents.py). 3. The card
(card.py). 4. A last look for paths and tokens. 5. One commit (hub.py). A dry run stops before 5 and writes the folder.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token

from mage_tune.publish import contents, hub
from mage_tune.publish.card import make_card
from mage_tune.publish.contents import Content

__all__ = ["Options", "Publication", "prepare", "publish", "write_dry_run"]

DRY_RUN, MERGED = "publish", "publish-merged"
"""Folders inside the run: what a dry run writes, and the merged checkpoint that was or will be published."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to publish; the options of the command."""

    repo_id: str
    base_id: str | None = None
    license: str | None = None
    private: bool = False
    revision: str | None = None
    merged: bool = False
    collection: str | None = None
    without_eval: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Publication:
    """What would be in the repository."""

    files: dict[str, Content]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {name: contents.size_of(content) for name, content in sorted(self.files.items())}

    @property
    def card(self) -> str:
        """README.md."""
        return contents.to_bytes(self.files["README.md"]).decode()


def prepare(folder: Path, options: Options) -> Publication:
    """Check everything that can be checked, and put together what goes up; nothing is written to the Hub.

    Raises:
        ValueError: the run is unfinished or unevaluated, an id is wrong, the base or its licence is unknown, a file
            would give away a path or a token; `HubError` when it is about the Hub.
    """
    contents.checked_repo_id(options.repo_id, "--repo")
    run = contents.read_run(folder)
    base_id = contents.base_of(run, options.base_id)
    if run.results is None and not options.without_eval:
        raise ValueError(f"{folder}: not evaluated; run mage-tune eval {folder} first, or pass --without-eval")
    api = hub.connect()
    if not options.dry_run:
        hub.check_account(api, options.repo_id)
    trained_on = Path(run.recipe.model.path or base_id)
    base = hub.find_base(api, base_id, trained_on, options.license, offline=options.dry_run)
    merged = merged_checkpoint(folder, str(trained_on) if trained_on.is_dir() else base_id) if options.merged else None
    files = contents.collect(run, base_id, merged)
    recipe = contents.to_bytes(files["recipe.yaml"]).decode()
    report = contents.read_json(merged / "merge.json") if merged else None
    files["README.md"] = make_card(run, base, options.repo_id, recipe, report).encode()
    contents.refuse_leaks(files, folder, get_token())
    return Publication(files)


def publish(publication: Publication, options: Options) -> str | None:
    """Upload what `prepare` made.

    Returns:
        The new commit's id, or None when the repository held all of it already.

    Raises:
        HubError: one line with what to do; running again is always safe.
    """
    api = hub.connect()
    commit = hub.upload(
        api,
        options.repo_id,
        publication.files,
        message=f"Publish {'merged weights' if options.merged else 'adapter'} with mage_tune",
        private=options.private,
        revision=options.revision,
    )
    if options.collection is not None:
        hub.add_to_collection(api, options.collection, options.repo_id)
    return commit


def write_dry_run(publication: Publication, folder: Path) -> Path:
    """Write the repository as it would be into a folder inside the run, in place of an earlier one."""
    out = folder / DRY_RUN
    shutil.rmtree(out, ignore_errors=True)
    contents.write_folder(publication.files, out)
    return out


def merged_checkpoint(folder: Path, base: str) -> Path:
    """The run's merged checkpoint, made now unless the one that is there is of this very adapter."""
    from mage_tune.publish.merge import merge

    out = folder / MERGED
    if out.is_dir():
        report = out / "merge.json"
        if report.is_file() and contents.read_json(report)["adapter_sha256"] == hub.sha256(folder / contents.WEIGHTS):
            return out
        shutil.rmtree(out)
    return merge(folder, out, base)
