"""`brushwork generate`: pictures from a base and adapters, one by one and as a labelled sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_tools.errors import BadInput
from finetune.cli.generate_arguments import MOST_PICTURES, NamedAdapter, parse_adapters, parse_seeds, parse_size, weight_sets
from finetune.cli.generate_output import Kept, as_data, grid_sheet, output_folder, save_kept, save_sheet, trace_blocks
from finetune.cli.output import Json, Quiet, emit, progress_for

if TYPE_CHECKING:
    from data_tools.progress import Progress
    from data_tools.thinking import ThinkingRecord
    from finetune.families.base_models import BaseModel
    from finetune.generation import DrawnPicture, LoadedAdapter, TokenCounts
    from finetune.recipe_settings import SampleSettings
    from finetune.sampling import PictureRequest
    from finetune.thinking.enhancers import Enhancer


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
    think: Annotated[bool, typer.Option("--think", help="Think about the prompt first, and show the thoughts beside the picture.")] = False,
    enhancer: Annotated[str, typer.Option("--enhancer", metavar="rules|MODEL|URL", help="Who thinks: rules, a chat model (folder or Hub id), or an endpoint.")] = "rules",
    enhancer_model: Annotated[str | None, typer.Option("--enhancer-model", metavar="NAME", help="The endpoint's name of the model.")] = None,
    best_of: Annotated[int | None, typer.Option("--best-of", min=2, max=256, metavar="N", help="Draw N pictures a prompt and keep the one that --reward likes best.")] = None,
    reward: Annotated[str | None, typer.Option("--reward", metavar="FILE", help="The reward of --best-of: a reward file, measure:NAME, or a published one as in `prefer train`.")] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep only what works right now on the GPU (encoders, then transformer, then VAE), the rest in memory: slower, same pictures.")] = False,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Draw pictures, with any number of adapters."""
    from finetune.families.base_models import locate_base, refuse_unusable

    named, seeds, asked = parse_adapters(adapter or []), _seeds(seed, best_of, reward), parse_size(size)
    sets, progress, thinks_with = weight_sets(named), progress_for(quiet), _enhancer(enhancer, enhancer_model)
    if len(prompt) * len(seeds) * len(sets) > MOST_PICTURES:
        raise BadInput(f"these are {len(prompt) * len(seeds) * len(sets):,} pictures", fix=f"at most {MOST_PICTURES:,} are drawn at once")
    if base is not None:
        refuse_unusable(base)

    from finetune.generation import draw_from_files, usual_size
    from finetune.sampling import PictureRequest

    files = _read_adapters(named)
    found = locate_base(base or _trained_on(files))
    usual = _usual_settings(found, named)
    height, width = asked or (usual_size(found),) * 2
    requests = [
        PictureRequest(text, number, height, width, steps or usual.steps, usual.guidance if guidance is None else guidance, usual.negative if negative is None else negative)
        for text in prompt for number in seeds
    ]
    trigger = _trigger_note(files, requests, progress)
    if negative and requests[0].guidance <= 1:
        progress.say("note: the negative prompt has no effect at guidance 1, which is none; give --guidance a larger number")
    records: dict[str, ThinkingRecord] = {}
    saved: dict[int, Kept] = {}

    def keep(picture: DrawnPicture, score: float | None = None) -> None:
        saved[id(picture)] = save_kept(Kept(picture, score, records.get(picture.asked)), found, named, out)

    with output_folder(out):
        thinker = _rewrite(think, thinks_with, trigger, seeds[0], records)
        # Without a choice among them, pictures are written as they come: what is there when somebody interrupts stays.
        drawn = draw_from_files(found, files, sets, requests, rewrite=thinker, progress=progress, offload=offload, on_drawn=None if best_of else keep)
        labels, extra = _keep_best(drawn, reward, best_of, keep) if best_of else (None, {})
        kept = [saved[id(picture)] for picture in drawn if id(picture) in saved]
        blocks = [*trace_blocks(kept), *(grid_sheet(drawn, named, labels) if len(drawn) > 1 else [])]
        sheet = save_sheet(blocks, out) if blocks else None
    lines = [str(each.path) + ("" if each.score is None else f"  score {each.score:.4g}") for each in kept]
    lines += [f"sheet  {sheet}"] if sheet else []
    lines += [_gain_line(extra["gain"])] if best_of else []
    emit({"pictures": [as_data(each, named) for each in kept], "sheet": sheet, **extra}, lines, json=json)


def _gain_line(gain: Mapping[str, Any]) -> str:
    """What choosing was worth; the interval is over prompts, so few of them have none."""
    interval = "" if gain["low"] is None else f" ({gain['low']:+.4g} to {gain['high']:+.4g}, 95 %)"
    return f"best of {gain['n']}: {gain['mean']:+.4g} over one picture on average{interval}"


def _seeds(given: list[str] | None, best_of: int | None, reward: str | None) -> list[int]:
    if (best_of is None) != (reward is None):
        raise BadInput("--best-of and --reward go together", fix="add --best-of 8 --reward FILE, or neither")
    seeds = parse_seeds(given or ["0"])
    if best_of is None:
        return seeds
    if len(seeds) > 1:
        raise BadInput("--best-of counts its own seeds", where="--seed", fix="give the first seed only")
    from finetune.preference.rewards.references import check_reward

    check_reward(reward)
    return list(range(seeds[0], seeds[0] + best_of))


def _read_adapters(named: Sequence[NamedAdapter]) -> dict[str, LoadedAdapter]:
    from finetune.adapters.adapter_file import read_adapter
    from finetune.families.key_layouts import KEY_MAPS
    from finetune.generation import LoadedAdapter

    return {each.name: LoadedAdapter(read_adapter(each.path, KEY_MAPS), each.path) for each in named}


def _trained_on(files: Mapping[str, LoadedAdapter]) -> str:
    bases = {str(each.file.provenance["base_model"]) for each in files.values() if each.file.provenance.get("base_model")}
    if len(bases) != 1:
        raise BadInput("the base model is not named", where="--base", fix="add --base mini, --base FOLDER or --base OWNER/NAME")
    return bases.pop()


def _usual_settings(base: BaseModel, adapters: Sequence[NamedAdapter]) -> SampleSettings:
    """Steps, guidance and negative prompt of the run that an adapter lies in, else of a recipe for this base, else the defaults."""
    from finetune.recipe import load_recipe
    from finetune.recipe_settings import SampleSettings
    from finetune.recipe_shelf import recipes_for_base

    runs = [folder / "recipe.toml" for adapter in adapters for folder in list(adapter.path.resolve().parents)[:4] if (folder / "recipe.toml").is_file()]
    shipped = [recipe.path for recipe in recipes_for_base(base.identifier)]
    for path in runs[:1] + shipped[:1]:
        return load_recipe(path).samples
    return SampleSettings(steps=30)


def _trigger_note(files: Mapping[str, LoadedAdapter], requests: Sequence[PictureRequest], progress: Progress) -> str | None:
    """Say where a prompt lacks an adapter's trigger; returns the first trigger."""
    triggers = [trigger for each in files.values() if isinstance(trigger := each.file.provenance.get("trigger"), str)]
    for trigger in triggers:
        if not all(trigger.lower() in request.prompt.lower() for request in requests):
            progress.say(f"note: the adapter was trained with the trigger \"{trigger[:80]}\", which is not in every prompt")
    return triggers[0] if triggers else None


def _enhancer(given: str, model: str | None) -> Enhancer:
    from finetune.thinking.enhancers import RULES

    if given == "rules":
        return RULES
    if given.startswith(("http://", "https://")):
        from finetune.thinking.endpoint import EndpointEnhancer

        if model is None:
            raise BadInput("the endpoint's model is not named", where="--enhancer-model", fix="add --enhancer-model NAME")
        return EndpointEnhancer(given, model)
    from finetune.thinking.local_model import LocalChatEnhancer

    return LocalChatEnhancer(given)


def _rewrite(always: bool, enhancer: Enhancer, trigger: str | None, seed: int, records: dict[str, ThinkingRecord]) -> Callable[[str, TokenCounts], str]:
    """Think about a prompt that asks for it, keep the record, and give the text to draw with."""
    from finetune.thinking.enhancers import think, wants_thinking

    def rewrite(prompt: str, counts: TokenCounts) -> str:
        if not always and not wants_thinking(prompt, trigger=trigger):
            return prompt
        records[prompt] = think(prompt, enhancer=enhancer, token_counts=counts, trigger=trigger, seed=seed)
        return records[prompt].enhanced

    return rewrite


def _keep_best(drawn: Sequence[DrawnPicture], reward: str, per_group: int, keep: Callable[[DrawnPicture, float], None]) -> tuple[dict[int, str], dict[str, Any]]:
    """Keep the best of each group of seeds; labels for the sheet and the gain."""
    from dataclasses import asdict

    from finetune.preference.best_of import gain_over_one, rank_pictures

    groups = [drawn[start : start + per_group] for start in range(0, len(drawn), per_group)]
    ranked = rank_pictures(reward, [(group[0].asked, [picture.image for picture in group]) for group in groups])
    labels = {}
    for number, (group, rank) in enumerate(zip(groups, ranked, strict=True)):
        for place, picture in enumerate(group):
            labels[number * per_group + place] = f"seed {picture.request.seed}: {rank.scores[place]:.3g}" + (" kept" if place == rank.best else "")
        keep(group[rank.best], rank.scores[rank.best])
    return labels, {"gain": asdict(gain_over_one(ranked))}
