"""`brushwork publish RUN|FILE REPO`: the Hub page that an adapter deserves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools.errors import BadInput
from finetune.cli.output import Json, Quiet, emit, progress_for

if TYPE_CHECKING:
    from finetune.adapters.publish import PublishedFile


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("publish")(publish)


def publish(
    source: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="A run folder, or an adapter file.")],
    repo: Annotated[str | None, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; left out: the one that the run's recipe names.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card; touch no network.")] = False,
    folder: Annotated[Path | None, typer.Option("--folder", metavar="FOLDER", help="Write the page into this folder instead of uploading it; must be empty or new.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Who sees it; private unless the recipe or this says otherwise.")] = None,
    base_model: Annotated[str | None, typer.Option("--base-model", metavar="OWNER/NAME", help="The base on the Hub, where the run used a local folder.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="Licence of the adapter, where the base's leaves a choice.")] = None,
    licence_name: Annotated[str | None, typer.Option("--licence-name", metavar="NAME", help="What the licence is called, with --licence other.")] = None,
    licence_file: Annotated[Path | None, typer.Option("--licence-file", exists=True, dir_okay=False, help="The base's agreement, where a copy must go along; with --licence other the text of that licence.")] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading of the page.")] = None,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Publish an adapter: weights, card, gallery, training details and the base's licence texts, in one commit."""
    from finetune.adapters.publish import check_files
    from finetune.adapters.publish import publish as upload
    from finetune.cli.publish_page import build_page, read_source

    found = read_source(source)
    repo = repo or (found.recipe.publish.repo if found.recipe else None)
    if repo is None:
        raise BadInput("the repository is not named", where="REPO", fix="add OWNER/NAME, or set publish.repo in the recipe")
    page = build_page(found, repo, base_model=base_model, licence=licence, licence_name=licence_name, licence_file=licence_file, title=title, fetch=not dry_run)
    stays_private = private if private is not None else found.recipe.publish.private if found.recipe else True
    check_files(page.files, repo)
    listing = [{"name": file.name, "bytes": len(file.content), "sha256": file.sha256} for file in page.files]
    data = {"repo": repo, "private": stays_private, "licence": page.licence.identifier, "files": listing, "fetched_on_upload": list(page.later)}
    if dry_run:
        card = next(file.content for file in page.files if file.name == "README.md").decode()
        lines = [f"{repo}  ({'private' if stays_private else 'public'}, nothing is uploaded)", *_tree(listing), *(f"  {name}" for name in page.later), "", card.rstrip()]
        emit({**data, "dry_run": True, "card": card}, lines, json=json)
        return
    if folder is not None:
        written = _write_folder(folder, page.files)
        emit({**data, "folder": folder}, [f"{folder}  ({written} files; nothing was uploaded)"], json=json)
        return
    progress = progress_for(quiet)
    if page.licence.territory:
        progress.say(f"note: the base's licence does not apply in: {page.licence.territory}; the card says so")
    done = upload(page.files, repo, private=stays_private, message="Publish the adapter with its card, gallery and licence", progress=progress)
    what = f"{len(done.sent)} files in commit {done.commit[:12]}" if done.sent else "everything was there already"
    emit({**data, "url": done.url, "commit": done.commit, "sent": list(done.sent), "private": done.private}, [f"{done.url}  ({'private' if done.private else 'public'}; {what})"], json=json)


def _write_folder(folder: Path, files: list[PublishedFile]) -> int:
    from data_tools.atomic_files import write_bytes

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput("is not empty", where=f"--folder {folder}", fix="choose another folder")
    for file in files:
        write_bytes(folder / file.name, file.content)
    return len(files)


def _tree(listing: list[dict[str, object]]) -> list[str]:
    width = max(len(str(file["name"])) for file in listing)
    return [f"  {file['name']:<{width}}  {file['bytes']:>10,} bytes  sha256 {str(file['sha256'])[:12]}" for file in listing]
