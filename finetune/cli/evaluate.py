"""`brushwork evaluate compare|export|import|measures`: numbers with intervals, and official benchmarks in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_tools.errors import BadInput
from finetune.cli.generate_arguments import parse_seeds, parse_size
from finetune.cli.output import Json, Quiet, command_group, emit, progress_for

if TYPE_CHECKING:
    from finetune.recipe import Recipe

Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="`mini`, a folder in diffusers layout, or a Hub id; left out: what the first adapter was trained on.")]
Adapters = Annotated[list[str] | None, typer.Option("--adapters", "--adapter", "-a", metavar="FILE[:WEIGHT]", help="Adapter file or folder, and its strength; can be given several times, or several names after one another.")]
More = Annotated[list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Further adapters, as after --adapters.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Seeds such as 0-3 or 1,5: every prompt is drawn with each.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Sampler steps; left out: of the adapter's run, of a recipe for this base, else 20.")]
Guidance = Annotated[float | None, typer.Option("--guidance", min=0, max=100, help="Classifier-free guidance; left out: as --steps, else 5.")]
Size = Annotated[str | None, typer.Option("--size", metavar="WIDTHxHEIGHT", help="Pixels; left out: the model's own.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = command_group("Compare adapters with their base, and speak the forms of official benchmarks.")
    group.command()(compare)
    group.command("export")(export_pictures)
    group.command("import")(import_results)
    group.command("measures")(list_measures)
    app.add_typer(group, name="evaluate")


def _recipe_of(adapters: Sequence[str]) -> Recipe | None:
    """The recipe of the run that the first adapter lies in, if it lies in one."""
    from finetune.evaluation.subjects import split_weight
    from finetune.recipe import load_recipe

    for text in adapters[:1]:
        path = split_weight(text)[0].resolve()
        for folder in (path, *list(path.parents)[:4]):
            if (folder / "recipe.toml").is_file():
                return load_recipe(folder / "recipe.toml", of_run=True)
    return None


def _base_of(base: str | None, adapters: Sequence[str]) -> str:
    from finetune.evaluation.subjects import subjects_of

    if base is not None:
        return base
    stated = {str(subject.load().provenance.get("base_model") or "") for subject in subjects_of(adapters)[1:]} - {""}
    if len(stated) != 1:
        raise BadInput("the base model is not named", where="--base", fix="add --base mini, --base FOLDER or --base OWNER/NAME")
    return stated.pop()


def _settings(recipe: Recipe | None, base: str, steps: int | None, guidance: float | None, negative: str | None) -> tuple[int, float, str]:
    """Steps, guidance and negative prompt: as given, else of the adapter's run, of a shipped recipe for this base, the defaults."""
    from finetune.recipe import load_recipe
    from finetune.recipe_settings import SampleSettings
    from finetune.recipe_shelf import recipes_for_base

    shipped = recipes_for_base(base)
    usual = recipe.samples if recipe is not None else load_recipe(shipped[0].path).samples if shipped else SampleSettings()
    return (usual.steps if steps is None else steps, usual.guidance if guidance is None else guidance, usual.negative if negative is None else negative)


def compare(
    prompts: Annotated[Path, typer.Option("--prompts", metavar="FILE", help='Text with one prompt a line, or JSON lines {"prompt", "prompt_id", "split"}; split is style, unrelated or holdout.')],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where pictures, numbers and the page go; the same command goes on after a stop.")] = Path("evaluation"),
    base: Base = None, adapters: Adapters = None, more: More = None, seeds: Seeds = "0,1", steps: Steps = None, guidance: Guidance = None, size: Size = None,
    negative: Annotated[str | None, typer.Option("--negative", help="Negative prompt.")] = None,
    references: Annotated[Path | None, typer.Option("--references", metavar="FOLDER", help="Pictures that have the style, best ones that were not trained on; left out: the training pictures.")] = None,
    training: Annotated[Path | None, typer.Option("--training", metavar="FOLDER", help="What was trained on, to look for copies; left out: the folder of the adapter's run.")] = None,
    measures: Annotated[str | None, typer.Option("--measures", metavar="A,B,...", help="Only these; `brushwork evaluate measures` lists them.")] = None,
    weights: Annotated[list[str] | None, typer.Option("--weights", metavar="NAME=FOLDER", help="Where a downloaded model lies that a measure needs; can be given several times.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first prompts of each split, for a short look.")] = None,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Draw the same prompts and seeds with the base and each adapter, measure, and show intervals beside every number."""
    from finetune.evaluation.downloaded import at_hand, parse_weights
    from finetune.evaluation.measure import choose_measures
    from finetune.evaluation.pictures import require_pictures_at
    from finetune.evaluation.prompts import read_prompts, shortened
    from finetune.evaluation.subjects import subjects_of
    from finetune.families.base_models import locate_base, refuse_unusable

    named = [*(adapters or []), *(more or [])]
    chosen, given = shortened(read_prompts(prompts), limit), parse_weights(weights or [])
    seed_numbers, recipe = parse_seeds([seeds]), _recipe_of(named)
    trained = training or (Path(recipe.data.folder) if recipe and recipe.data.folder and Path(recipe.data.folder).is_dir() else None)
    height, width = parse_size(size) or (None, None)
    refuse_unusable(_base_of(base, named))
    for pictures in filter(None, (references, training)):
        require_pictures_at(pictures)
    asked, weights_at_hand = measures.split(",") if measures else None, at_hand(given)
    met = {"judge": True, "references": references or trained, "training": trained, **{f"weights:{name}": True for name in weights_at_hand}}
    choose_measures(asked, {need for need, is_met in met.items() if is_met})
    subjects = subjects_of(named)

    from finetune.evaluation.compare import Comparison
    from finetune.evaluation.compare import compare as compare_all

    found = locate_base(_base_of(base, named))
    comparison = Comparison(
        chosen, subjects, seed_numbers, *_settings(recipe, found.identifier, steps, guidance, negative), height, width, references or trained, trained, asked, weights_at_hand)
    result = compare_all(found, comparison, out, progress_for(quiet))
    data = {"rows": result["rows"], "evaluation": out / "evaluation.json", "report": out / "report.html", "drawn": result["drawn"], "near_copies": result["near_copies"],
            "left_out": result["left_out"], "imported": result["imported"], "caution": result["caution"]}
    emit(data, [*_table(result["rows"]), *_notes(result), f"page  {out / 'report.html'}"], json=json)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The numbers for a terminal: the base's value, and each adapter's difference with its interval."""
    lines = [f"{'measure':18} {'adapter':24} {'value':>9} {'to base':>9}  interval"]
    for row in rows:
        interval = row["no_interval"] if row["low"] is None else f"{row['low']:.3g} .. {row['high']:.3g}"
        delta = "" if row["delta"] is None else f"{row['delta']:+.3g}"
        value = "" if row["value"] is None else f"{row['value']:.3g}"
        lines.append(f"{row['measure']:18} {row['adapter'][:24]:24} {value:>9} {delta:>9}  {interval}{'' if row['verdict'] == 'unclear' else '  ' + row['verdict']}")
    return lines


def _notes(result: Mapping[str, Any]) -> list[str]:
    """What to keep in mind about the table: how many of its verdicts chance may have made, and copies."""
    copies = "near-copies: not looked for (--training)" if result["training"] is None else f"near-copies of training pictures: {len(result['near_copies'])}"
    return [*([f"note: {result['caution']}"] if result["caution"] else []), copies]


def export_pictures(
    form: Annotated[str, typer.Option("--form", help="geneval, dpg-bench or hpsv2.")],
    prompts: Annotated[Path, typer.Option("--prompts", metavar="PATH", help="The benchmark's own prompts: evaluation_metadata.jsonl, ELLA's prompts folder, or HPSv2's folder of JSON files.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder for each subject in the official layout; the same command goes on after a stop.")],
    base: Base = None, adapters: Adapters = None, more: More = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="As many as the benchmark wants pictures a prompt; left out: from 0.")] = None,
    steps: Steps = None, guidance: Guidance = None, size: Size = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first prompts, for a trial.")] = None,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Draw an official benchmark's prompts so that its grader runs on the pictures."""
    from finetune.evaluation.compare import Comparison
    from finetune.evaluation.official.export import export, read_form
    from finetune.evaluation.subjects import subjects_of
    from finetune.families.base_models import locate_base

    named = [*(adapters or []), *(more or [])]
    recipe = _recipe_of(named)
    chosen, wanted = read_form(form, prompts)
    height, width = parse_size(size) or (None, None)
    found = locate_base(_base_of(base, named))
    comparison = Comparison(chosen[:limit], subjects_of(named), parse_seeds([seeds]) if seeds else range(wanted),
                            *_settings(recipe, found.identifier, steps, guidance, None), height, width)
    result = export(found, comparison, form, prompts, out, progress_for(quiet))
    emit(result, [f"{name}  {folder}  {result['files'][name]} pictures" for name, folder in result["folders"].items()], json=json)


def import_results(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What the official grader wrote, or JSON results of other models.")],
    form: Annotated[str, typer.Option("--form", help="geneval (JSONL), dpg-bench (text), hpsv2 (CSV with `score`) or table (JSON list of results).")],
    into: Annotated[Path, typer.Option("--into", metavar="DIR", help="The folder of a comparison, whose table takes the result.")],
    model: Annotated[str, typer.Option("--model", help="Whose pictures were graded.")] = "unnamed model",
    grader: Annotated[str | None, typer.Option("--grader", help="Who graded, if not the usual one of this form.")] = None,
    version: Annotated[str | None, typer.Option("--version", help="Of the grader.")] = None,
    seed: Annotated[str | None, typer.Option("--seed", help="Seeds of the pictures.")] = None,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Bring a grader's results into a comparison's table, marked as imported."""
    from finetune.evaluation.official.export import READERS
    from finetune.evaluation.official.imported import add_to_evaluation, read_table, stated

    if form == "table":
        results = read_table(file)
    elif form in READERS:
        results = [stated(READERS[form](file, model), grader=grader, version=version, prompts=None, n=None, seed=seed, model=None)]
    else:
        raise BadInput(f"there is no form called {form!r}", where="--form", fix=f"one of {', '.join([*READERS, 'table'])}")
    evaluation = add_to_evaluation(into, results)
    lines = [f"{row['model']}  {row['benchmark']}  {'not given' if row['value'] is None else format(row['value'], '.4g')}" for row in evaluation["imported"]]
    emit({"imported": evaluation["imported"], "evaluation": into / "evaluation.json"}, [*lines, "run the comparison again to see them on its page"], json=json)


def list_measures(json: Json = False, quiet: Quiet = False) -> None:
    """What can be measured, what each needs, and where its formula comes from."""
    from finetune.evaluation.measure import BUILT_IN, WITH_WEIGHTS, load_measure

    found = [load_measure(name) for name in BUILT_IN + WITH_WEIGHTS]
    data = {"measures": [{"name": each.name, "meaning": each.meaning, "source": each.source, "better": each.better, "needs": list(each.needs)} for each in found]}
    emit(data, [f"{each.name:18} {each.better:7} {each.meaning}{' (needs ' + ', '.join(each.needs) + ')' if each.needs else ''}" for each in found], json=json)
