"""Find the base model: the embedded one, a local folder, or a Hub repository of which only the needed files come."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.model_places import ask_once
from data_tools.near_names import meant_path, nearest, nearest_path
from finetune.errors import BaseModelError
from finetune.families import hunyuan_image_3, registry
from finetune.families.licences import APACHE
from finetune.families.model_index import component_slots, part_of, read_model_index
from finetune.families.protocol import LicenceTerms

if TYPE_CHECKING:
    from finetune.families.protocol import ModelFamily

EMBEDDED = "mini"


@dataclass(frozen=True)
class BaseModel:
    """A base that lies on this disk.

    identifier: what the user called it.  revision: commit on the Hub, None for local folders.
    licence: the terms of these weights, which need not be its family's.
    """

    identifier: str
    revision: str | None
    folder: Path
    family: ModelFamily
    licence: LicenceTerms


def locate_base(base: str, revision: str | None = None, parts: Iterable[str] = ("text", "vae", "transformer")) -> BaseModel:
    """The base called `base`: "mini", a folder with `model_index.json`, or a Hub id "owner/name" at `revision`.

    parts: which of text, vae, transformer must be complete; an empty set asks for configurations only.
    Raises BaseModelError: unknown base, base of another kind, incomplete folder, no network.
    """
    wanted = frozenset(parts)
    folder = _local_folder(base)
    if folder is None:
        return _from_hub(base, revision, wanted)
    found = registry.family(_checked(folder, wanted))
    return BaseModel(base, None, folder, found, APACHE if base == EMBEDDED else found.facts.licence)


def refuse_unusable(base: str, parts: Iterable[str] = ("text", "vae", "transformer")) -> None:
    """Raise what `locate_base` raises, as far as names and small files on this disk tell: it asks no Hub and imports no family."""
    folder = _local_folder(base)
    if folder is not None:
        _checked(folder, frozenset(parts))


def _local_folder(base: str) -> Path | None:
    """Where the base lies; None for a Hub id. Raises BaseModelError for a name that is neither."""
    if base == EMBEDDED:
        from finetune.mini_base import weights_folder

        return Path(weights_folder())
    try:
        here = Path(base).expanduser()
        if here.is_dir():
            return here
    except (OSError, RuntimeError, ValueError):
        pass  # longer than a name can be, or in the home of nobody: no folder, and what else it could be is looked at below
    if hunyuan_image_3.is_hunyuan_image_3(base):
        raise hunyuan_image_3.refusal(base)
    if base.count("/") == 1 and not base.startswith((".", "/", "~")) and " " not in base:
        return None
    near = nearest(base, [EMBEDDED]) or nearest_path(base)
    raise BaseModelError(f"there is no base called {base}", fix=f"did you mean {near}?" if near else "give mini, a folder that holds model_index.json, or a Hub id such as owner/name")


def _checked(folder: Path, parts: frozenset[str]) -> str:
    """The name of the family of a folder that has these parts."""
    if not (folder / "model_index.json").exists():
        refuse_hunyuan_image_3(folder / "config.json", str(folder))
    index = read_model_index(folder)
    name = registry.family_name(index["_class_name"], folder)
    check_complete(folder, index, parts)
    return name


def refuse_hunyuan_image_3(config: Path, where: str) -> None:
    """Raise BaseModelError with the numbers when this `config.json` is HunyuanImage-3.0's; else nothing."""
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(settings, dict) and hunyuan_image_3.is_hunyuan_image_3(settings):
        raise hunyuan_image_3.refusal(where)


def check_complete(folder: Path, index: dict[str, Any], parts: frozenset[str]) -> None:
    """Raise BaseModelError naming every component that `parts` need and the folder lacks."""
    missing = []
    for slot in component_slots(index):
        part = part_of(slot)
        if part != "light" and part not in parts:
            continue
        has_weights = part == "light" or slot.startswith("tokenizer") or any((folder / slot).glob("*.safetensors*"))
        if not (folder / slot).is_dir() or not any((folder / slot).glob("*.json")) or not has_weights:
            missing.append(slot)
    if missing:
        raise BaseModelError(f"the base is incomplete: {', '.join(missing)} missing", where=str(folder), fix="download the base again")


def needed_files(index: dict[str, Any], parts: frozenset[str], listing: Iterable[str]) -> list[str]:
    """Which files of a repository to download for `parts`, sorted. Weights only as safetensors, and no variants of them.

    Configurations of every component come along, since they are small and the plan reads them.
    """
    listing = sorted(listing)
    needed = {"model_index.json"}
    for slot in component_slots(index):
        files = [name for name in listing if name.startswith(f"{slot}/") and name.count("/") == 1]
        part = part_of(slot)
        if part == "light" or part is not None and slot.startswith("tokenizer"):
            needed.update(files if part == "light" or part in parts else ())
        elif part is not None:
            needed.update(name for name in files if name.endswith("config.json"))
            needed.update(_weights(files) if part in parts else ())
    return sorted(needed)


def _weights(files: list[str]) -> list[str]:
    """The plain safetensors of one component: the shards of an index without a variant, or the single file."""
    tensors = [name for name in files if name.endswith(".safetensors")]
    plain = [name for name in tensors if ".fp16" not in name and ".bf16" not in name and ".non_ema" not in name and ".ema" not in name]
    indexes = [name for name in files if name.endswith(".safetensors.index.json") and ".fp16." not in name and ".bf16." not in name]
    if indexes:
        return indexes + [name for name in plain if "-of-" in name]
    return plain or tensors


def _from_hub(base: str, revision: str | None, parts: frozenset[str]) -> BaseModel:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError, GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled,
        RepositoryNotFoundError, RevisionNotFoundError,
    )

    where = f"{base}@{revision}" if revision else base
    try:
        ask_once(base, "model_index.json", revision)
        folder = Path(hf_hub_download(base, "model_index.json", revision=revision)).parent
        index = read_model_index(folder)
        registry.serving(index["_class_name"], where)
        try:
            listing = HfApi().list_repo_files(base, revision=revision)
        except (OfflineModeIsEnabled, OSError):
            listing = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=needed_files(index, parts, listing)))
    except HFValidationError:
        raise BaseModelError(f"there is no {base} here, and no base on the Hub can be called so", fix=meant_path(base, "a Hub id is owner/name alone, without a revision or an address")) from None
    except GatedRepoError:
        raise BaseModelError("the base asks for its licence to be accepted first", where=where,
                             fix=f"accept it at https://huggingface.co/{base} and log in with `hf auth login`") from None
    except RevisionNotFoundError:
        raise BaseModelError("the base has no such revision", where=where) from None
    except RepositoryNotFoundError:
        raise BaseModelError(f"there is no base called {base}, neither here nor on the Hub", where=where,
                             fix="check the spelling; private bases need `hf auth login`") from None
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise _unreachable(where, error) from None
        raise BaseModelError("this repository holds no model_index.json, so it is not a diffusers pipeline", where=where,
                             fix="look for a diffusers conversion of the model, often the same name with -Diffusers") from None
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise _unreachable(where, error) from None
    check_complete(folder, index, parts)
    found = registry.family_of(folder)
    return BaseModel(base, folder.name, folder, found, found.facts.licence)


def _unreachable(where: str, error: Exception) -> BaseModelError:
    return BaseModelError(f"the base cannot be downloaded: {str(error).strip().splitlines()[0]}", where=where,
                          fix="check the network and the free disk space, or give a local folder")
