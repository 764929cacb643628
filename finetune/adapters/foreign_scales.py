"""The strength of each module of a stranger's file: from `.alpha` tensors, a diffusers header or a PEFT configuration.

Only a few fields of foreign settings are looked at, and never handed to peft: an unknown field would make it fail, a
known one could make it import a module, and patterns would be run as regular expressions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.adapters.adapter_file import PEFT_KEY
from finetune.errors import AdapterError

MOST_SCALE = 1000.0
SETTINGS_BYTES = 1 << 20
# Settings of peft's LoHa, LoKr and OFT that change what their tensors mean, and the values of the usual build.
USUAL_BUILD = {
    "decompose_both": False, "decompose_factor": -1, "use_effective_conv2d": False,
    "coft": False, "block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5,
}
IGNORED_WITH_A_WORD = (
    "modules_to_save", "trainable_token_indices", "layer_replication", "megatron_config", "loftq_config",
    "eva_config", "corda_config", "alora_invocation_tokens",
)


@dataclass(frozen=True)
class ForeignSettings:
    """What a file says about strength besides its tensors. Patterns are literal ends of module names, or whole names after a
    "^", never expressions.
    has_rank_expressions: whether ranks are also set by expressions, which are not run.
    variant: the setting by which a LoHa, LoKr or OFT is not of the usual build, if there is one."""

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    has_rank_expressions: bool = False
    variant: str | None = None
    notes: tuple[str, ...] = ()

    def said_rank(self, module: str) -> int | None:
        """The rank that the settings name for a module."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale(self, module: str, rank: int, where: str) -> float:
        """alpha / rank of one module (alpha / sqrt(rank) for rsLoRA), the tensors' rank deciding. Raises AdapterError."""
        if self.alpha is None and not self.alpha_pattern:
            return 1.0
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        said = self.said_rank(module)
        if alpha is None:
            return 1.0
        if said is not None and said != rank:
            if alpha != said or self.rslora or self.has_rank_expressions:
                raise AdapterError(f"{module}: the header says rank {said}, alpha {alpha:g}, but the tensor has rank {rank}, so its strength is unknown", where=where)
            return 1.0
        return checked_scale(alpha, math.sqrt(rank) if self.rslora else rank, module, where)


def checked_scale(alpha: float, divisor: float, module: str, where: str) -> float:
    """alpha / divisor, refused where another reader would hang or blow up (diffusers loops for ever on a negative one)."""
    if not math.isfinite(alpha) or alpha <= 0 or alpha / divisor > MOST_SCALE:
        raise AdapterError(f"{module}: an alpha of {alpha:g} at rank {divisor:g}", where=where, fix="alpha must be above 0 and near the rank")
    return alpha / divisor


def _by_pattern(pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    for name, value in pattern.items():
        if module == name.removeprefix("^") or module.endswith("." + name):
            return value
    return otherwise


def diffusers_settings(metadata: Mapping[str, str], where: str, part: str = "transformer") -> ForeignSettings:
    """From the `lora_adapter_metadata` of a header; keys with or without the part's prefix."""
    text = metadata.get(PEFT_KEY)
    if text is None:
        return ForeignSettings()
    try:
        raw = _strict_json(text)
    except ValueError as problem:
        return ForeignSettings(notes=(f"the header's {PEFT_KEY} was ignored: {problem}",))
    prefixed = {key.removeprefix(part + "."): value for key, value in raw.items() if key.startswith(part + ".")}
    if not prefixed and part != "transformer":
        return ForeignSettings()
    return settings_from(prefixed or raw, where)


def peft_folder_settings(config: Path, where: str) -> ForeignSettings:
    """From the `adapter_config.json` beside a PEFT folder's weights. Raises AdapterError when it is not a LoRA's."""
    if config.is_symlink() and config.resolve().parent.name != "blobs":
        raise AdapterError("adapter_config.json is a symbolic link", where=where)
    if config.stat().st_size > SETTINGS_BYTES:
        raise AdapterError(f"adapter_config.json has more than {SETTINGS_BYTES} bytes", where=where)
    try:
        raw = _strict_json(config.read_bytes().decode())
    except ValueError as problem:
        raise AdapterError(f"adapter_config.json: {problem}", where=where) from None
    kind = raw.get("peft_type", "LORA")
    if kind not in ("LORA", "LOKR", "LOHA", "OFT"):
        raise AdapterError(f"a PEFT adapter of the kind {ascii(kind)[:40]}, not a LoRA", where=where)
    return settings_from(raw, where)


def _strict_json(text: str) -> dict[str, Any]:
    def not_json(name: str) -> None:
        raise ValueError(f"{name} is not a number")

    try:
        raw = json.loads(text, parse_constant=not_json)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as problem:
        raise ValueError(f"not JSON ({problem.msg})") from None
    if not isinstance(raw, dict):
        raise ValueError("not a table")
    return raw


def settings_from(raw: Mapping[str, Any], where: str) -> ForeignSettings:
    """Pick the fields that decide the strength out of LoraConfig-like settings; the rest is ignored, some with a note."""
    notes = [f"{key} in the settings was ignored" for key in IGNORED_WITH_A_WORD if raw.get(key)]
    if isinstance(raw.get("init_lora_weights"), str):
        notes.append("init_lora_weights in the settings was ignored")
    for key in ("fan_in_fan_out", "lora_bias"):
        if raw.get(key):
            notes.append(f"{key} in the settings was ignored; the tensors' shapes decide")
    ranks, alphas = (_pattern(raw.get(name), name, where) for name in ("rank_pattern", "alpha_pattern"))
    if None in alphas.values():
        raise AdapterError("alpha_pattern in the adapter's settings has expressions, which are never run, so its strengths are unknown", where=where,
                           fix="ask its author for a file that names the modules")
    rank = None if raw.get("peft_type") == "OFT" else _number(raw.get("r"), "r", where)  # OFT counts blocks, not ranks
    return ForeignSettings(
        rank=None if rank is None else int(rank),
        alpha=_number(raw.get("lora_alpha", raw.get("alpha")), "lora_alpha", where),
        rank_pattern={key: int(value) for key, value in ranks.items() if value is not None},
        alpha_pattern=alphas,
        rslora=raw.get("use_rslora") is True,
        has_rank_expressions=None in ranks.values(),
        variant=next((key for key, usual in USUAL_BUILD.items() if raw.get(key, usual) != usual), None),
        notes=tuple(notes),
    )


def _number(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
        raise AdapterError(f"{name} in the adapter's settings is {ascii(value)[:40]}", where=where, fix="it must be a number above 0")
    return float(value)


def _pattern(value: Any, name: str, where: str) -> dict[str, float | None]:
    """Name -> number; None for an expression."""
    if not value:
        return {}
    if not isinstance(value, dict):
        raise AdapterError(f"{name} in the adapter's settings is not a table", where=where)
    found: dict[str, float | None] = {}
    for key, item in value.items():
        literal = key.removesuffix("$").replace("\\.", ".").replace("\\-", "-")
        if (number := _number(item, name, where)) is not None:
            found[literal] = number if re.fullmatch(r"\^?[\w.\-]{1,512}", literal) else None
    return found


def alpha_value(shape: tuple[int, ...], read: Callable[[], Any], module: str, where: str) -> float:
    """The number in an `.alpha` tensor: a scalar, or one element, of whatever real dtype."""
    if math.prod(shape) != 1:
        raise AdapterError(f"{module}: alpha has the shape {list(shape)}; it is one number", where=where)
    return float(read().double().reshape(()).item())
