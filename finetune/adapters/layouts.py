"""Recognise an adapter file from its keys and shapes alone: container dialect, family, algorithm. No torch.

Every key is taken apart into the part of the pipeline, the module's name, and the tensor's role. What is not understood
is an error that names the key; nothing is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.adapters.keys import KeyMap, Place
from finetune.adapters.tensor_files import Entry
from finetune.errors import AdapterError

TRANSFORMER = "transformer"
OFFICIAL_LAYOUTS = ("tencent",)
# (prefix, layout, flattened names, part); the first that fits wins, the empty one last.
PREFIXES = (
    ("base_model.model.", "peft", False, TRANSFORMER),
    ("lora_transformer_", "onetrainer", True, TRANSFORMER),
    ("lycoris_", "lycoris", True, TRANSFORMER),
    ("lora_unet_", "kohya", True, TRANSFORMER),
    ("lora_te1_", "kohya", True, "text_encoder"),
    ("lora_te2_", "kohya", True, "text_encoder_2"),
    ("lora_te3_", "kohya", True, "text_encoder_3"),
    ("lora_te_", "kohya", True, "text_encoder"),
    ("model.diffusion_model.", "comfy", False, TRANSFORMER),
    ("diffusion_model.", "comfy", False, TRANSFORMER),
    ("text_encoders.clip_l.transformer.", "comfy", False, "text_encoder"),
    ("text_encoders.clip_g.transformer.", "comfy", False, "text_encoder_2"),
    ("text_encoder_3.", "diffusers", False, "text_encoder_3"),
    ("text_encoder_2.", "diffusers", False, "text_encoder_2"),
    ("text_encoder.", "diffusers", False, "text_encoder"),
    ("transformer.", "diffusers", False, TRANSFORMER),
    ("", "bare", False, TRANSFORMER),
)
ROLES = (
    (r"\.lora_A(?:\.(?P<name>[a-z][A-Za-z0-9_-]*))?\.weight", "A"),
    (r"\.lora_B(?:\.(?P<name>[a-z][A-Za-z0-9_-]*))?\.weight", "B"),
    (r"\.lora_B(?:\.(?P<name>[a-z][A-Za-z0-9_-]*))?\.bias", "bias"),
    (r"(?:\.processor)?\.(?P<old>to_\w+?)_lora\.down\.weight", "A"),
    (r"(?:\.processor)?\.(?P<old>to_\w+?)_lora\.up\.weight", "B"),
    (r"\.(?:lora_down|lora\.down|lora_linear_layer\.down)\.weight", "A"),
    (r"\.(?:lora_up|lora\.up|lora_linear_layer\.up)\.weight", "B"),
    (r"(?<=lora[12])\.down\.weight|(?<=_lora)\.down\.weight", "A"),
    (r"(?<=lora[12])\.up\.weight|(?<=_lora)\.up\.weight", "B"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale", "magnitude"),
    (r"\.lora_magnitude_vector(?:\.(?P<name>[a-z][A-Za-z0-9_-]*?))?(?:\.weight)?", "magnitude"),
    (r"\.(?P<factor>lokr_(?:w1|w2|w1_a|w1_b|w2_a|w2_b|t2))(?:\.weight)?", "factor"),
    (r"\.(?P<factor>hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2))(?:\.weight)?", "factor"),
    (r"\.(?P<factor>oft_R)(?:\.weight)?", "factor"),
    (r"\.diff_b", "bias"),
    (r"\.b_norm", "bias"),
)
ROLE_PATTERNS = tuple((re.compile(f"(?P<stem>.+?)(?:{pattern})"), role) for pattern, role in ROLES)
OTHER_ALGORITHMS = (
    (re.compile(r".*\.(diff|set_weight|reshape_weight)"), "a full weight difference, not a LoRA"),
    (re.compile(r".*\.w_norm"), "a norm difference (LyCORIS Norm), not a LoRA"),
    (re.compile(r".*\.(oft_blocks|oft_diag|oft_r.*)"), "an OFT adapter, which needs the base weights; bake it with the tool that made it"),
    (re.compile(r".*\.([ab][12]|bm)\.weight"), "a GLoRA adapter, which needs the base weights; bake it with the tool that made it"),
    (re.compile(r".*\.(on_input)"), "an (IA)3 adapter, which is not a LoRA"),
    (re.compile(r".*\.base_layer\..*"), "a base weight: loading it would overwrite the model"),
    (re.compile(r".*lora_embedding_[AB].*"), "a LoRA on an embedding, which no diffusion transformer takes"),
)


@dataclass(frozen=True)
class ParsedKey:
    """One key taken apart. role: A, B, alpha, mid, magnitude, bias, or the name of a LyCORIS factor."""

    key: str
    layout: str
    flat: bool
    part: str
    stem: str
    role: str
    adapter: str | None = None


@dataclass(frozen=True)
class Detection:
    """What a file was recognised as.

    layout: of most keys, or "mixed".  family: None when no KeyMap knows all modules.  alternatives: other families that
    fit as well.  groups: (part, stem) -> role -> key.  places: (part, stem) -> where it goes (None: as it is).
    """

    layout: str
    family: str | None
    alternatives: tuple[str, ...]
    groups: Mapping[tuple[str, str], Mapping[str, str]]
    places: Mapping[tuple[str, str], Place | None]


def parse_key(key: str, where: str) -> ParsedKey:
    """Take one key apart. Raises AdapterError for a key that is no part of a LoRA."""
    if key.startswith("unet."):
        raise AdapterError(f"{key}: an adapter for a Stable Diffusion UNet, not for a diffusion transformer", where=where)
    if ".base_layer." in key:
        raise AdapterError(f"{key}: a base weight; loading it would overwrite the model", where=where,
                           fix="the file was saved from a model with an adapter attached; ask its author for the adapter alone")
    if key.startswith("__") or ".__" in key:
        raise AdapterError(f"{key}: names an attribute, not a layer", where=where)
    prefix, layout, flat, part = next(entry for entry in PREFIXES if key.startswith(entry[0]))
    rest = key[len(prefix):]
    for pattern, role in ROLE_PATTERNS:
        match = pattern.fullmatch(rest)
        if match:
            found = match.groupdict()
            stem = f"{match['stem']}.{found['old']}" if found.get("old") else match["stem"]
            return ParsedKey(key, layout, flat, part, stem.replace(".processor.to_", ".to_"), found.get("factor") or role, found.get("name"))
    for pattern, meaning in OTHER_ALGORITHMS:
        if pattern.fullmatch(key):
            raise AdapterError(f"{key}: {meaning}", where=where)
    raise AdapterError(f"{key}: not part of a LoRA; loading it could overwrite the base", where=where,
                       fix="is this a full checkpoint? `brushwork adapter extract` makes a LoRA of one")


def detect_layout(entries: Mapping[str, Entry], key_maps: Mapping[str, KeyMap], where: str,
                  family: str | None = None, hint: str | None = None) -> Detection:
    """Recognise a file. family: what the caller insists on.  hint: what the file says of itself, used only to break ties.

    Raises AdapterError for keys that are no LoRA, two tensors with one meaning, several adapters in one file, and modules
    that no known family has in a layout that needs renaming.
    """
    if not entries:
        raise AdapterError("there is no tensor in the file", where=where)
    parsed = [parse_key(key, where) for key in sorted(entries)]
    _one_adapter(parsed, where)
    groups: dict[tuple[str, str], dict[str, str]] = {}
    flat_of: dict[tuple[str, str], bool] = {}
    for item in parsed:
        group = groups.setdefault((item.part, item.stem), {})
        if item.role in group:
            raise AdapterError(f"{item.key} and {group[item.role]} mean the same tensor", where=where)
        if flat_of.setdefault((item.part, item.stem), item.flat) != item.flat:
            raise AdapterError(f"{item.key}: the same module comes in two layouts", where=where)
        group[item.role] = item.key
    layouts = sorted({item.layout for item in parsed})
    layout = layouts[0] if len(layouts) == 1 else "mixed"
    widths = {entries[group["A"]].shape[1] for group in groups.values() if "A" in group and len(entries[group["A"]].shape) > 1}
    chosen, alternatives, places = _family(groups, flat_of, widths, key_maps, family, hint, where)
    if chosen:
        groups, places = (_by_component(table, flat_of, key_maps[chosen], where) for table in (groups, places))
    if layout == "peft" and chosen:
        layout = _official_layout(key_maps[chosen], places.values()) or layout
    return Detection(layout, chosen, alternatives, groups, places)


def _by_component(table: Mapping[tuple[str, str], Any], flat_of: Mapping[tuple[str, str], bool], key_map: KeyMap, where: str) -> dict[tuple[str, str], Any]:
    """The same under the names of the pipeline's components."""
    found: dict[tuple[str, str], Any] = {}
    for (part, stem), value in table.items():
        own = (key_map.component(part, flat_of[part, stem]), stem)
        if own in found:
            raise AdapterError(f"{stem}: the same text encoder comes under two numbers", where=where)
        found[own] = value
    return found


def _official_layout(key_map: KeyMap, places: Iterable[Place | None]) -> str | None:
    """The layout of a family's makers: a PEFT folder with the names of their own code."""
    for layout, naming in key_map.layouts.items():
        if layout in OFFICIAL_LAYOUTS and any(place is not None and place.rule in key_map.namings[naming] for place in places):
            return layout
    return None


def _one_adapter(parsed: list[ParsedKey], where: str) -> None:
    names = sorted({item.adapter for item in parsed if item.adapter})
    if len(names) > 1:
        raise AdapterError(f"{len(names)} adapters in one file: {', '.join(names[:5])}", where=where, fix="ask its author for one file per adapter")


def _family(groups: Mapping[tuple[str, str], Mapping[str, str]], flat_of: Mapping[tuple[str, str], bool], widths: set[int],
            key_maps: Mapping[str, KeyMap], family: str | None, hint: str | None, where: str,
            ) -> tuple[str | None, tuple[str, ...], dict[tuple[str, str], Place | None]]:
    """The family whose KeyMap places every module; by width and block count where several do."""
    if family is not None and family not in key_maps:
        raise AdapterError(f"no key table for the family {family!r}", where=where, fix=f"known: {', '.join(key_maps)}")
    tried = {family: key_maps[family]} if family else key_maps
    placed: dict[str, dict[tuple[str, str], Place | None]] = {}
    for name, key_map in tried.items():
        placed[name] = {group: key_map.place(group[1], flat_of[group], group[0]) for group in groups}
    whole = [name for name, places in placed.items() if None not in places.values()]
    if whole:
        order = sorted(whole, key=lambda name: _doubt(tried[name], placed[name], widths, name == hint))
        best = _doubt(tried[order[0]], placed[order[0]], widths, order[0] == hint)
        equal = tuple(name for name in order[1:] if _doubt(tried[name], placed[name], widths, name == hint) == best)
        return order[0], equal, placed[order[0]]
    nearest = min(placed, key=lambda name: sum(place is None for place in placed[name].values()), default=None)
    if nearest is None or all(place is None or place.rule.foreign == place.rule.modules[0] for place in placed[nearest].values()):
        if not any(flat_of.values()):
            return None, (), dict.fromkeys(groups)
    unknown = [group[1] for group in groups if nearest is None or placed[nearest][group] is None]
    known = f"modules that {nearest} does not have" if nearest and len(unknown) < len(groups) else "modules of no known family"
    raise AdapterError(f"{len(unknown)} {known}: {', '.join(unknown[:5])}", where=where)


def _doubt(key_map: KeyMap, places: Mapping[tuple[str, str], Place | None], widths: set[int], hinted: bool) -> tuple[int, ...]:
    """Smaller is likelier: a published width first, then block numbers that exist, then what the file says of itself."""
    width = 0 if not key_map.widths or widths & set(key_map.widths) else 1
    numbers = [(module, int(place.numbers[0])) for place in places.values() if place and place.numbers and place.numbers[0].isdigit() for module in place.modules]
    beyond = sum(number >= most for module, number in numbers for start, most in key_map.blocks.items() if module.startswith(start + "."))
    return (width, min(beyond, 1), 0 if hinted else 1)
