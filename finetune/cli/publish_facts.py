"""What the card of an adapter tells of its run: pictures, training, evaluation, limits, and how the gallery was drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.adapters.adapter_file import AdapterFile
    from finetune.cli.publish_page import Source
    from finetune.training.run_folder import RunFolder

MOST_EVALUATION_ROWS = 30


def gallery_call(source: Source) -> dict[str, Any]:
    """Arguments with which the gallery was drawn, so that the snippet draws alike."""
    from finetune.sampling import read_settings

    drawn = sorted(source.run.samples.glob("step-*-*.png")) if source.run else []
    settings = read_settings(drawn[-1]) if drawn else {}
    names = {"height": "height", "width": "width", "steps": "num_inference_steps", "guidance": "guidance_scale"}
    return {argument: settings[key] for key, argument in names.items() if isinstance(settings.get(key), int | float)}


def data_summary(run: RunFolder | None) -> Mapping[str, Any]:
    """What the run wrote down of its pictures; empty where there is none."""
    return json.loads(run.data_summary.read_text(encoding="utf-8")) if run and run.data_summary.exists() else {}


def training_facts(source: Source, adapter: AdapterFile, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the card's table of training; of an adapter file alone, what it says of itself."""
    from finetune.adapters.kinds import KINDS

    ranks, facts = sorted(set(adapter.ranks.values())), KINDS[kind]
    rows: dict[str, Any] = {"kind": f"{facts.title}, {facts.says}".removesuffix(", "), "modules": len(adapter.ranks), "rank": ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"}
    if source.recipe is None:
        return rows
    settings, said = source.recipe.training, adapter.provenance
    return {
        "pictures": data.get("pictures"), "data hash": said.get("data_hash"), "recipe hash": said.get("recipe_hash"), **rows,
        "layers": source.recipe.adapter.targets, "steps": _steps(source), "batch": f"{settings.batch_size} x {settings.accumulation}",
        "learning rate": _learning_rate(source), "schedule": settings.schedule, "optimizer": _optimizer(source), "seed": settings.seed,
    }


def _steps(source: Source) -> str:
    """How many the weights have seen: fewer than the recipe asked for where the run ended early or an earlier step was best."""
    asked = source.recipe.training.steps
    result = json.loads(source.run.result.read_text(encoding="utf-8")) if source.run and source.run.result.exists() else {}
    exported = result.get("exported_step", asked)
    return str(asked) if exported == asked else f"{exported} of {asked}"


def _optimizer(source: Source) -> str:
    """As the recipe says, or as the run chose."""
    name = source.recipe.training.optimizer
    if name == "auto" and source.run and source.run.plan.exists():
        return json.loads(source.run.plan.read_text(encoding="utf-8"))["estimate"]["settings"]["optimizer"]
    return name


def _learning_rate(source: Source) -> str:
    """As the recipe says, or as the run found it."""
    rate = source.recipe.training.learning_rate
    if rate == "find" and source.run and source.run.learning_rate.exists():
        return f"{json.loads(source.run.learning_rate.read_text(encoding='utf-8'))['chosen']:g}, found by a range test"
    return rate if rate == "find" else f"{rate:g}"


def evaluation_rows(run: RunFolder | None) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Rows and cautions of the evaluation in the run folder, if one was made."""
    found = next((path for path in (run.path / "evaluation.json", run.path / "evaluation" / "evaluation.json") if path.exists()), None) if run else None
    if found is None:
        return [], []
    content = json.loads(found.read_text(encoding="utf-8"))
    names = {str(item.get("name")) for item in content.get("adapters", ())}
    rows = [row for row in content.get("rows", ()) if row.get("adapter") in names]
    notes = [str(content.get("interval") or ""), str(content.get("caution") or "")]
    left = [f"{measure} was not measured: {reason}" for measure, reason in content.get("left_out", {}).items()]
    return rows[:MOST_EVALUATION_ROWS], [note for note in (*notes, *left) if note]


def known_limits(source: Source, data: Mapping[str, Any], embedded: bool) -> list[str]:
    """What the adapter is not good for, a sentence each."""
    limits = ["It changes style; what the base cannot draw it cannot draw either, and the base's biases stay."]
    if data.get("pictures"):
        limits.append(f"Trained on {data['pictures']} pictures: prompts far from them follow the style less.")
    if embedded:
        limits.append("The base is a very small model for learning and testing, not for pictures of any quality.")
    if source.adapter.provenance.get("thinking_tokens"):
        limits.append("It was trained with thinking tokens, which Brushwork adds to the prompt; the lines above load the LoRA without them, and the pictures differ.")
    if source.run is None:
        limits.append("Published as a file alone: nothing is known here of how it was trained.")
    return limits
