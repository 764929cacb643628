"""Gather what the Hub page of an adapter needs: weights with clean metadata, card, pictures, settings, licence texts."""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.errors import BadInput
from finetune.cli.publish_facts import data_summary, evaluation_rows, gallery_call, known_limits, training_facts

if TYPE_CHECKING:
    from finetune.adapters.adapter_file import AdapterFile
    from finetune.adapters.licensing import LicencePlan
    from finetune.adapters.model_card import GalleryPicture
    from finetune.adapters.publish import PublishedFile
    from finetune.families.protocol import LicenceTerms
    from finetune.recipe import Recipe
    from finetune.training.run_folder import RunFolder

SHEET = "images/before_after.png"
MOST_GALLERY_PICTURES = 12
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
LICENCE_NAMES = ("LICENSE.txt", "LICENSE", "LICENSE.md", "LICENSE.pdf.txt")


@dataclass(frozen=True)
class Page:
    """files: all of the repository.  licence: the plan.  later: files that a real upload fetches first, for --dry-run."""

    files: list[PublishedFile]
    licence: LicencePlan
    later: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A run, or an adapter file alone. tokens: the file of its thinking tokens, without which it is a different adapter."""

    adapter: AdapterFile
    run: RunFolder | None
    recipe: Recipe | None
    tokens: bytes | None = None


def read_source(path: Path) -> Source:
    """A run folder whose adapter has been proven, or an adapter file. Raises BadInput, AdapterError."""
    from finetune.adapters.adapter_file import read_adapter
    from finetune.families.key_layouts import KEY_MAPS
    from finetune.training.run_folder import RunFolder

    run = RunFolder(path)
    if not path.is_dir() or not run.exists:
        adapter = read_adapter(path, KEY_MAPS)
        return Source(adapter, None, None, _tokens_beside(adapter, path))
    from finetune.recipe import load_recipe

    if not run.adapter_file.exists():
        raise BadInput("the run has no adapter yet", where=str(path), fix="finish it with `brushwork train --resume`")
    result = json.loads(run.result.read_text(encoding="utf-8")) if run.result.exists() else {}
    verified = result.get("verified") or {}
    if not (verified.get("changed") and verified.get("placed") == verified.get("keys")):
        raise BadInput("the run's adapter was not proven to load", where=str(path), fix="resume the run: it ends with the proof")
    adapter = read_adapter(run.adapter_file, KEY_MAPS)
    return Source(adapter, run, load_recipe(run.recipe, of_run=True), _tokens_beside(adapter, run.adapter))


def _tokens_beside(adapter: AdapterFile, path: Path) -> bytes | None:
    """The thinking tokens that belong to the adapter, checked. Raises AdapterError when they are missing or others."""
    from finetune.thinking.tokens import FILE_NAME, KEY, read_tokens, tokens_of

    if not adapter.provenance.get(KEY):
        return None
    folder = path if path.is_dir() else path.parent
    stream = read_tokens(folder).stream if (folder / FILE_NAME).exists() else None
    tokens_of(adapter, folder, stream)
    return (folder / FILE_NAME).read_bytes()


def build_page(source: Source, repo: str, *, base_model: str | None, licence: str | None, licence_name: str | None, licence_file: Path | None, title: str | None, fetch: bool) -> Page:
    """All files of the page. fetch: whether the base's licence text may be downloaded now. Raises BadInput."""
    from finetune.adapters.licensing import LICENCE_FILE, NOTICE_FILE, plan_licence
    from finetune.adapters.model_card import render_card
    from finetune.adapters.publish import PublishedFile

    if any("no effect" in note for note in source.adapter.notes):
        raise BadInput("the adapter has no effect: it still stands at its start", where="RUN")
    base, local = _base_of(source, base_model)
    family = str(source.adapter.provenance.get("family") or source.adapter.family or "")
    wanted = licence or (source.recipe.publish.licence if source.recipe else None)
    plan = plan_licence(terms_of(base, family), wanted, repo, licence_name)
    _check_licence_options(plan, licence_name, licence_file)
    adapter = _clean(source.adapter, base, family, plan)
    pictures, gallery = _pictures(source.run)
    card = render_card(_card_facts(source, adapter, repo, base, family, plan, title, gallery, any(name == SHEET for name, _ in pictures)))
    files = [PublishedFile("README.md", card.encode()), *_weight_files(adapter)]
    files += [PublishedFile(name, content) for name, content in pictures]
    if source.tokens is not None:
        files.append(PublishedFile("thinking_tokens.safetensors", source.tokens))
    if source.recipe:
        files.append(PublishedFile("training_config.json", json.dumps(_clean_settings(source.recipe, base), ensure_ascii=False, indent=1, sort_keys=True).encode()))
    later: tuple[str, ...] = ()
    if plan.own_text:
        files.append(PublishedFile(LICENCE_FILE, licence_file.read_bytes()))
    if plan.needs_copy:
        files.append(PublishedFile(NOTICE_FILE, (plan.notice + "\n").encode()))
        text = _licence_text(base, local, licence_file, fetch)
        if text is not None:
            files.append(PublishedFile(LICENCE_FILE, text))
        else:
            later = (f"{LICENCE_FILE} (from {base})",)
    return Page(files, plan, later)


def _check_licence_options(plan: LicencePlan, name: str | None, file: Path | None) -> None:
    """The text of an own licence is there, and no option is given in vain. Raises BadInput."""
    if plan.own_text and file is None:
        raise BadInput(f"the text of {plan.name} is not given, which the card must link", where="--licence-file", fix="give the file with the licence's text")
    if file is not None and not (plan.own_text or plan.needs_copy):
        raise BadInput(f"no text goes along with {plan.name}", where="--licence-file", fix="leave it out, or publish under --licence other --licence-name NAME")
    if name is not None and not plan.own_text:
        raise BadInput(f"the licence has its name already: {plan.name}", where="--licence-name", fix="leave it out, or publish under --licence other")


def _base_of(source: Source, named: str | None) -> tuple[str, Path | None]:
    """(Hub id or "mini", local folder if the run used one). A path is never published."""
    said = source.adapter.provenance.get("base_model") or (source.recipe.base.model if source.recipe else None)
    local = Path(str(said)).expanduser() if said and Path(str(said)).expanduser().is_dir() else None
    base = named or (str(said) if said and local is None else None)
    if base is None:
        raise BadInput("the base's name on the Hub is not known" + (" (the run used a local folder)" if local else ""), where="RUN", fix="name it with --base-model OWNER/NAME")
    if base != "mini" and not HUB_ID.fullmatch(base):
        raise BadInput(f"{base!r} is not a Hub id", where="--base-model", fix="OWNER/NAME, as in the base's address on the Hub")
    return base, local


def terms_of(base: str, family: str) -> LicenceTerms | None:
    """The base's licence by its family's table; None where nothing is known."""
    from finetune.families import registry
    from finetune.families.base_models import EMBEDDED
    from finetune.families.licences import APACHE

    if base == EMBEDDED:
        return APACHE
    return registry.family(family).facts.licence if family in registry.names() else None


def _clean(adapter: AdapterFile, base: str, family: str, plan: LicencePlan) -> AdapterFile:
    """The adapter with nothing in its header but our own provenance, which names no place of this machine."""
    from dataclasses import replace

    from finetune.adapters.adapter_file import PROVENANCE_KEY

    kept = {key: value for key, value in adapter.provenance.items()
            if (isinstance(value, str | int | float | list) or key == "thinking_tokens") and key not in ("base_model", "licence")}
    kept |= {"base_model": base, "family": family, "licence": plan.name if plan.identifier == "other" else plan.identifier}
    return replace(adapter, metadata={PROVENANCE_KEY: json.dumps(kept, sort_keys=True, ensure_ascii=False)})


def _weight_files(adapter: AdapterFile) -> list[PublishedFile]:
    """The adapter as other tools look for it: one file, or the two of a PEFT folder."""
    from finetune.adapters.adapter_file import usual_name, write_adapter
    from finetune.adapters.publish import PublishedFile

    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder) / usual_name(adapter), adapter)
        return [PublishedFile(path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir())]


def _pictures(run: RunFolder | None) -> tuple[list[tuple[str, bytes]], list[GalleryPicture]]:
    """The last samples of a run and its sheet, encoded anew so that no hidden data travels along."""
    from PIL import Image

    from finetune.adapters.model_card import GalleryPicture
    from finetune.sampling import read_settings

    files: list[tuple[str, bytes]] = []
    gallery: list[GalleryPicture] = []
    if run is None:
        return files, gallery
    drawn = sorted(run.samples.glob("step-*-*.png"))
    last = [path for path in drawn if path.name.rsplit("-", 1)[0] == drawn[-1].name.rsplit("-", 1)[0]]
    for number, path in enumerate(last[:MOST_GALLERY_PICTURES]):
        name = f"images/{number}.png"
        files.append((name, _encoded(Image.open(path))))
        gallery.append(GalleryPicture(name, str(read_settings(path).get("prompt", ""))))
    if run.sheet.exists():
        files.append((SHEET, _encoded(Image.open(run.sheet))))
    return files, gallery


def _encoded(image: Any) -> bytes:
    buffer = io.BytesIO()
    clean = image.convert("RGB")
    clean.info = {}
    clean.save(buffer, format="PNG")
    return buffer.getvalue()


def _clean_settings(recipe: Recipe, base: str) -> dict[str, Any]:
    """The recipe without places: whoever has the pictures can run it again."""
    settings = recipe.model_dump(mode="json")
    settings["data"].pop("folder", None)
    settings["base"]["model"] = base
    settings["publish"].pop("repo", None)
    return settings


def _card_facts(source: Source, adapter: AdapterFile, repo: str, base: str, family: str, plan: LicencePlan, title: str | None, gallery: list[GalleryPicture], has_sheet: bool) -> Any:
    from finetune.adapters.adapter_file import usual_name
    from finetune.adapters.kinds import KINDS
    from finetune.adapters.loading_snippets import SnippetFacts
    from finetune.adapters.model_card import CardFacts
    from finetune.families.base_models import EMBEDDED
    from finetune.families.key_layouts import key_map_of

    key_map = key_map_of(family)
    trigger = adapter.provenance.get("trigger")
    prompt = gallery[0].prompt if gallery else str(trigger or "a picture")
    embedded = base == EMBEDDED
    kind = str(adapter.provenance.get("kind") or "lora")
    kind = kind if kind in KINDS and KINDS[kind].form is adapter.form else "dora" if adapter.uses_dora else adapter.form.name
    snippet = SnippetFacts(repo, usual_name(adapter), "brushwork/finetune/mini_base/weights" if embedded else base, prompt, adapter.ranks,
                           key_map.loads_with if key_map else "peft", {**(key_map.call if key_map else {}), **gallery_call(source)},
                           dora=adapter.uses_dora, folder=adapter.form.name != "lora")
    rows, notes = evaluation_rows(source.run)
    data = data_summary(source.run)
    return CardFacts(
        title=title or repo.rpartition("/")[2].replace("-", " ").replace("_", " "), base=None if embedded else base,
        base_name="the small model that comes with Brushwork" if embedded else base, base_revision=adapter.provenance.get("base_revision"), family=family, licence=plan, proven=source.run is not None,
        trigger=str(trigger) if trigger else None, snippet=snippet, gallery=gallery, sheet=SHEET if has_sheet else None, training=training_facts(source, adapter, kind, data),
        left_out=Counter(str(item.get("reason", "")) for item in data.get("left_out", ())), evaluation=rows, evaluation_notes=notes, limits=known_limits(source, data, embedded), kind=kind,
    )


def _licence_text(base: str, local: Path | None, given: Path | None, fetch: bool) -> bytes | None:
    """The base's agreement: the file that was given, one in the local base, or from the base's page. None: to be fetched."""
    if given is not None:
        return given.read_bytes()
    for name in LICENCE_NAMES:
        if local is not None and (local / name).is_file():
            return (local / name).read_bytes()
    if not fetch:
        return None
    from huggingface_hub import hf_hub_download

    for name in LICENCE_NAMES:
        try:
            return Path(hf_hub_download(base, name)).read_bytes()
        except OSError:  # what the Hub or the network refuses; the next name may be there
            continue
    raise BadInput("the base's licence asks for a copy of its agreement, and it could not be fetched", where=base, fix="give the file with --licence-file")
