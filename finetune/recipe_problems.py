"""What is wrong with a recipe value, in words: what was given, what is allowed, and the nearest right name."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from data_tools.near_names import nearest
from finetune.recipe_settings import SECTIONS, Colour, Name, Section

SHOWN_CHARACTERS = 60

# What other trainers call these settings; people type them from memory.
NAMES_ELSEWHERE = {
    "network_dim": "adapter.rank", "lora_rank": "adapter.rank", "lora_r": "adapter.rank", "r": "adapter.rank", "dim": "adapter.rank",
    "network_alpha": "adapter.alpha", "lora_alpha": "adapter.alpha", "target_modules": "adapter.targets",
    "train_text_encoder": "adapter.text_encoders", "algo": "adapter.kind", "peft_type": "adapter.kind", "adapter_type": "adapter.kind", "lora_dropout": "adapter.dropout", "lr": "training.learning_rate", "unet_lr": "training.learning_rate",
    "max_train_steps": "training.steps", "max_steps": "training.steps", "num_train_steps": "training.steps", "iterations": "training.steps",
    "train_batch_size": "training.batch_size", "gradient_accumulation_steps": "training.accumulation",
    "optimizer_type": "training.optimizer", "lr_scheduler": "training.schedule", "scheduler": "training.schedule",
    "lr_warmup_steps": "training.warmup", "max_grad_norm": "training.gradient_clip", "mixed_precision": "training.precision",
    "gradient_checkpointing": "training.checkpointed_blocks", "save_every": "training.checkpoint_every",
    "save_every_n_steps": "training.checkpoint_every", "max_data_loader_n_workers": "training.workers",
    "pretrained_model_name_or_path": "base.model", "model_name": "base.model", "train_data_dir": "data.folder",
    "instance_data_dir": "data.folder", "reg_data_dir": "data.regularisation_folder", "class_data_dir": "data.regularisation_folder",
    "class_prompt": "data.regularisation_prompt", "num_class_images": "data.regularisation_count", "prior_loss_weight": "data.regularisation_weight",
    "masked_training": "data.masked_loss", "mask_min_value": "data.unmasked_weight", "offset_noise_weight": "objective.noise_offset",
    "datasets": "data.also", "dataset": "data.folder", "trigger_word": "data.trigger", "instance_prompt": "data.trigger",
    "caption_dropout_rate": "data.caption_dropout", "shuffle_caption": "data.caption_shuffle", "quantize": "base.hold",
    "timestep_sampling": "objective.timesteps", "discrete_flow_shift": "objective.shift", "min_snr_gamma": "objective.gamma",
    "guidance_scale": "samples.guidance", "sample_every": "samples.every", "validation_prompt": "samples.prompts",
}


def all_keys() -> list[str]:
    """Every setting as `section.key`, in the order of the file."""
    return [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]


def hint_for_unknown(section: str, key: str) -> str:
    """What an unknown `section.key` was probably meant to be."""
    elsewhere = NAMES_ELSEWHERE.get(key)
    if section in SECTIONS:
        fields = SECTIONS[section].model_fields
        if near := nearest(key, fields):
            return f"did you mean `{section}.{near}`?"
        elsewhere = elsewhere or next((known for known in all_keys() if known.endswith(f".{key}")), None)
    meant = elsewhere or nearest(f"{section}.{key}", all_keys())
    if meant:
        return f"did you mean `{meant}`?"
    return f"[{section}] has {', '.join(SECTIONS[section].model_fields)}" if section in SECTIONS else sections_hint(section)


def sections_hint(name: str) -> str:
    """What an unknown section or top-level key was probably meant to be."""
    if name in NAMES_ELSEWHERE:
        return f"did you mean `{NAMES_ELSEWHERE[name]}`?"
    owner = next((known for known in all_keys() if known.endswith(f".{name}")), None)
    if owner:
        return f"`{name}` belongs into [{owner.partition('.')[0]}]"
    if near := nearest(name, SECTIONS):
        return f"did you mean [{near}]?"
    if near := nearest(name, [known.partition(".")[2] for known in all_keys()]):
        return f"did you mean `{next(known for known in all_keys() if known.endswith('.' + near))}`?"
    return f"the sections are {', '.join(SECTIONS)}"


def wrong_value(section: str, key: str, given: Any) -> tuple[str, str]:
    """(what, fix) for a value that its setting does not take."""
    field = SECTIONS[section].model_fields[key]
    return _wrong(field, f"{section}.{key}", key, given)


def entry_model(field: FieldInfo) -> type[Section] | None:
    """What the tables of a list of tables hold; None for every other setting."""
    return next((inner for kind, _ in _field_members(field) if get_origin(kind) is tuple for inner, _ in _members(get_args(kind)[0])
                 if isinstance(inner, type) and issubclass(inner, Section)), None)


def wrong_entry(section: str, key: str, place: tuple[int, str], kind: str, entry: Any) -> tuple[str, str]:
    """(what, fix) for a mistake in one table of a list of tables; place: its number, from 0, and the name in it."""
    model = entry_model(SECTIONS[section].model_fields[key])
    number, name = place
    whole = f"{section}.{key}[{number}].{name}"
    if model is None or name not in model.model_fields:
        near = nearest(name, model.model_fields) if model else None
        names = ", ".join(model.model_fields) if model else ""
        return f"there is no setting `{shown(whole)[1:-1]}`", f"did you mean `{near}`?" if near else f"an entry of {section}.{key} has {names}"
    if kind == "missing":
        return f"`{whole}` is missing", f"add it to that entry: {model.model_fields[name].description}"
    return _wrong(model.model_fields[name], whole, name, entry[name])


def _wrong(field: FieldInfo, whole: str, key: str, given: Any) -> tuple[str, str]:
    fix = f"{whole} takes {allowed_values(field)}"
    if isinstance(given, str) and (near := nearest(given, choices(field))):
        fix = f'did you mean "{near}"? {fix}'
    elif isinstance(given, str) and _is_number(given) and takes_numbers(field):
        fix = f"write the number without quotes; {fix}"
    return f"`{key}` cannot be {shown(given)}", fix


def shown(value: Any) -> str:
    """A value as a recipe would write it, shortened."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = f'"{value}"'.encode("ascii", "backslashreplace").decode() if not value.isprintable() else f'"{value}"'
    elif isinstance(value, dict):
        text = "a table"
    else:
        text = str(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of more than 40 digits"
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _members(annotation: Any) -> list[tuple[Any, list[Any]]]:
    """The alternatives of an annotation, each with its limits."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    if origin is Annotated:
        kind, *limits = get_args(annotation)
        flat = [part for limit in limits for part in (limit.metadata if isinstance(limit, FieldInfo) else [limit])]
        return [(inner, more + flat) for inner, more in _members(kind)]
    return [(annotation, [])]


def _field_members(field: FieldInfo) -> list[tuple[Any, list[Any]]]:
    return [(kind, limits + list(field.metadata)) for kind, limits in _members(field.annotation)]


def choices(field: FieldInfo) -> list[str]:
    """The words that a setting can be, if it is chosen from a list."""
    return [word for kind, _ in _field_members(field) if get_origin(kind) is Literal for word in get_args(kind)]


def takes_numbers(field: FieldInfo) -> bool:
    """Whether a number can be given."""
    return any(kind in (int, float) for kind, _ in _field_members(field))


def takes_only_text(field: FieldInfo) -> bool:
    """Whether a bare word on the command line is text, whatever it looks like."""
    return all(kind in (str, Path, NoneType) for kind, _ in _field_members(field))


def may_be_left_out(field: FieldInfo) -> bool:
    """Whether nothing is a value of this setting."""
    return any(kind is NoneType for kind, _ in _field_members(field))


KINDS_OF_TEXT = ((Colour, 'a colour such as "#ffffff"'), (Name, "one line of text, 1 to 1024 characters"))


def allowed_values(field: FieldInfo) -> str:
    """In words: "a whole number from 1 to 1024"."""
    kinds = {bool: "true or false", str: "text", Path: "a folder"}
    words = []
    for kind, limits in _field_members(field):
        if get_origin(kind) is Literal:
            words.append(_either([f'"{word}"' for word in get_args(kind)]))
        elif kind in (int, float):
            words.append(("a whole number" if kind is int else "a number") + _range(limits))
        elif get_origin(kind) is tuple:
            words.append(_list_in_words(kind, limits))
        elif get_origin(kind) is dict:
            (number, range_of), = _members(get_args(kind)[1])
            words.append(f"a table, at most 64, of expression = {'a whole number' if number is int else 'a number'}{_range(range_of)}")
        elif kind in kinds:
            special = next((said for known, said in KINDS_OF_TEXT if list(get_args(known)[1:]) == limits), None)
            words.append(special or kinds[kind])
    return _either(words)


def _list_in_words(kind: Any, limits: list[Any]) -> str:
    most = next((limit.max_length for limit in limits if isinstance(limit, annotated_types.MaxLen)), None)
    inner, inner_limits = _members(get_args(kind)[0])[0]
    if get_origin(inner) is Literal:
        words = [f'"{word}"' for word in get_args(inner)]
        return f"a list of {_either(words)}"
    names = {int: f"whole numbers{_range(inner_limits)}", str: "texts"}.get(inner) or f"tables with {', '.join(inner.model_fields)}"
    return f"a list of {names}" + (f", at most {most}" if most else "")


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _range(limits: list[Any]) -> str:
    low = high = ""
    for limit in limits:
        if isinstance(limit, annotated_types.Ge):
            low = f" from {_number(limit.ge)}"
        elif isinstance(limit, annotated_types.Gt):
            low = f" above {_number(limit.gt)} and"
        elif isinstance(limit, annotated_types.Le):
            high = f" up to {_number(limit.le)}"
        elif isinstance(limit, annotated_types.Lt):
            high = f" to below {_number(limit.lt)}"
    return low + high


def _number(value: Any) -> str:
    return "2^63 - 1" if value == 2**63 - 1 else str(value)


def explain_setting(key: str) -> dict[str, str]:
    """What `section.key` means, takes and defaults to, in words."""
    section, _, name = key.partition(".")
    field = SECTIONS[section].model_fields[name]
    default = "none, it must be given" if field.is_required() else "left out" if field.default in (None, ()) else shown(field.default)
    extra = field.json_schema_extra
    unit = str(extra["unit"]) if isinstance(extra, dict) else ""
    return {"key": key, "meaning": field.description or "", "takes": allowed_values(field), "unit": unit, "default": default}
