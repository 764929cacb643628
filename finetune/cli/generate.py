"""`brushwork generate`: pictures from a base and adapters, one by one and as a labelled sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_tools.errors import BadInput
from finetune.cli.generate_arguments import MOST_PICTURES, NamedAdapter, parse_adapters, parse_seeds, parse_size, weight_sets
from finetune.cli.output import Json, Quiet, emit, progress_for

if TYPE_CHECKING:
    from finetune.adapters.adapter_file import AdapterFile
    from finetune.families.base_models import BaseModel
    from finetune.generation import DrawnPicture
    from finetune.recipe_settings import SampleSettings


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("generate")(generate)


def generate(
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; can be given several times.")],
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="`mini`, a folder in diffusers layout, or a Hub id; left out: what the adapter was trained on.")] = None,
    adapter: Annotated[list[str] | None, typer.Option("--adapter", "-a", metavar="FILE[:WEIGHT[,WEIGHT]]", help="Adapter and strength; several adapters add up, several strengths give a row each.")] = None,
    negative: Annotated[str | None, typer.Option("--negative", help="What not to draw.")] = None,
    seed: Annotated[list[str] | None, typer.Option("--seed", help="Seeds such as 7, 1,2,3 or 0-7: a column each.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Sampler steps.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", min=0, max=100, help="Classifier-free guidance; 1 is off.")] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WIDTHxHEIGHT", help="Pixels; left out: the model's own.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the pictures go; nothing there is overwritten.")] = Path("pictures"),
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Draw pictures from prompts, with any number of adapters."""
    named, seeds = parse_adapters(adapter or []), parse_seeds(seed or ["0"])
    sets = weight_sets(named)
    if len(prompt) * len(seeds) * len(sets) > MOST_PICTURES:
        raise BadInput(f"these are {len(prompt) * len(seeds) * len(sets):,} pictures", fix=f"at most {MOST_PICTURES:,} are drawn at once")
    out.mkdir(parents=True, exist_ok=True)
    progress = progress_for(quiet)

    from finetune.adapters.adapter_file import read_adapter
    from finetune.families.base_models import locate_base
    from finetune.families.key_layouts import KEY_MAPS
    from finetune.generation import draw_from_files, usual_size
    from finetune.sampling import PictureRequest

    files = {each.name: read_adapter(each.path, KEY_MAPS) for each in named}
    found = locate_base(base or _trained_on(files))
    settings = _usual_settings(found, named)
    height, width = parse_size(size, usual_size(found))
    for name, file in files.items():
        trigger = file.provenance.get("trigger")
        if isinstance(trigger, str) and not all(trigger.lower() in text.lower() for text in prompt):
            progress.say(f"note: {name} was trained with the trigger \"{trigger[:80]}\", which is not in every prompt")
    requests = [
        PictureRequest(text, number, height, width, steps or settings.steps, settings.guidance if guidance is None else guidance,
                       settings.negative if negative is None else negative)
        for text in prompt for number in seeds
    ]
    drawn, paths = [], []
    for picture in draw_from_files(found, files, sets, requests, progress=progress):
        drawn.append(picture)
        paths.append(_save(picture, found, named, out))
    sheet = _save_sheet(drawn, prompt, seeds, named, out) if len(drawn) > 1 else None
    data = {"pictures": [_as_data(picture, path, named) for picture, path in zip(drawn, paths, strict=True)], "sheet": sheet}
    emit(data, [*map(str, paths), *([f"sheet  {sheet}"] if sheet else [])], json=json)


def _trained_on(files: Mapping[str, AdapterFile]) -> str:
    bases = {str(file.provenance["base_model"]) for file in files.values() if file.provenance.get("base_model")}
    if len(bases) != 1:
        raise BadInput("the base model is not named", where="--base", fix="add --base mini, --base FOLDER or --base OWNER/NAME")
    return bases.pop()


def _usual_settings(base: BaseModel, adapters: Sequence[NamedAdapter]) -> SampleSettings:
    """Steps, guidance and negative prompt of the run that an adapter lies in, else of a recipe for this base, else the defaults."""
    from finetune.recipe import load_recipe
    from finetune.recipe_settings import SampleSettings
    from finetune.recipe_shelf import recipes_for_base

    runs = [folder / "recipe.toml" for adapter in adapters for folder in adapter.path.resolve().parents if (folder / "recipe.toml").is_file()]
    shipped = [recipe.path for recipe in recipes_for_base(base.identifier)]
    for path in runs[:1] + shipped[:1]:
        return load_recipe(path).samples
    return SampleSettings(steps=30)


def _adapter_data(weights: Mapping[str, float], adapters: Sequence[NamedAdapter]) -> list[dict[str, Any]]:
    return [{"path": str(adapter.path), "weight": weights[adapter.name]} for adapter in adapters]


def _as_data(picture: DrawnPicture, path: Path, adapters: Sequence[NamedAdapter]) -> dict[str, Any]:
    return {"path": path, "prompt": picture.request.prompt, "seed": picture.request.seed, "adapters": _adapter_data(picture.weights, adapters), "score": None}


def _save(picture: DrawnPicture, base: BaseModel, adapters: Sequence[NamedAdapter], out: Path) -> Path:
    """A PNG with the settings in its text chunk, under a name that is free."""
    from finetune import __version__
    from finetune.sampling import save_picture

    request = picture.request
    strengths = "".join(f"-{_words(adapter.label)}-{picture.weights[adapter.name]:g}" for adapter in adapters if len(adapter.weights) > 1)
    path = _free(out, f"{_words(request.prompt)}-seed-{request.seed}{strengths}")
    settings = {"base": base.identifier, "revision": base.revision, "family": base.family.facts.name, "adapters": _adapter_data(picture.weights, adapters), "brushwork": __version__}
    save_picture(picture.image, path, vars(request) | settings)
    return path


def _words(prompt: str) -> str:
    """The beginning of a prompt as a file name."""
    words = "".join(character if character.isalnum() else "-" for character in prompt[:40])
    return "-".join(part for part in words.split("-") if part) or "picture"


def _free(folder: Path, stem: str) -> Path:
    names = (f"{stem}.png" if number == 1 else f"{stem}-{number}.png" for number in range(1, 1_000_000))
    return next(folder / name for name in names if not (folder / name).exists())


def _save_sheet(drawn: Sequence[DrawnPicture], prompts: Sequence[str], seeds: Sequence[int], adapters: Sequence[NamedAdapter], out: Path) -> Path:
    """A block for each prompt, a row for each set of strengths, a column for each seed."""
    from data_tools.atomic_files import whole_file
    from finetune.sampling_sheets import contact_sheet, stack_sheets

    per_set = len(prompts) * len(seeds)
    sets = weight_sets(adapters)
    row_names = [", ".join(f"{adapter.label} × {weights[adapter.name]:g}" for adapter in adapters) or "base" for weights in sets]
    blocks = []
    for number, text in enumerate(prompts):
        starts = [row * per_set + number * len(seeds) for row in range(len(sets))]
        rows = [[picture.image for picture in drawn[start : start + len(seeds)]] for start in starts]
        blocks.append(contact_sheet(rows, row_names=row_names, column_names=[f"seed {each}" for each in seeds], title=text))
    path = _free(out, "sheet")
    with whole_file(path) as temporary:
        stack_sheets(blocks).save(temporary, format="PNG")
    return path
