"""What must hold between settings, as data: each rule names the setting to change and looks at whole sections."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from finetune.recipe_settings import Section


@dataclass(frozen=True)
class Rule:
    """`broken(*sections)` is true when the rule is violated; `sections` are its arguments by name. is_idle: the value is not wrong, nothing
    reads it."""

    key: str
    sections: tuple[str, ...]
    broken: Callable[..., bool]
    what: str
    fix: str
    is_idle: bool = False


def _not_an_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return True
    return False


def _unread(section: Section, key: str, is_read: bool) -> bool:
    """Whether a setting has been given a value that nothing looks at."""
    return not is_read and getattr(section, key) != type(section).model_fields[key].default


def _idle_rule(key: str, is_read: Callable[..., bool], what: str, fix: str) -> Rule:
    """`is_read(section)` says whether anything looks at the setting; if not, it must be left out."""
    section, _, name = key.partition(".")
    return Rule(key, (section,), lambda settings: _unread(settings, name, is_read(settings)), what, f"{fix}, or leave {key} out", is_idle=True)


def _density_rule(key: str, word: str, fix: str) -> Rule:
    """`objective.<key>` belongs to the densities whose name has `word` in it."""
    return _idle_rule(f"objective.{key}", lambda objective: word in objective.timesteps, "is not read by the density that `objective.timesteps` names", fix)


RULES = (
    Rule("data.missing_caption", ("data",), lambda data: data.missing_caption == "trigger" and not data.trigger,
         'is "trigger", but there is no `data.trigger`', 'set data.trigger, or missing_caption = "empty"'),
    Rule("data.resolution", ("data",), lambda data: isinstance(data.resolution, tuple) and len(set(data.resolution)) < len(data.resolution),
         "names a size twice", "name each size once; repeats of a folder say how often its pictures are seen"),
    _idle_rule("data.keep_tokens", lambda data: data.caption_shuffle,
               "is not read while `data.caption_shuffle` is false: nothing changes places", "set data.caption_shuffle = true"),
    _idle_rule("data.regularisation_count", lambda data: data.regularisation_prompt is not None,
               "is not read without `data.regularisation_prompt`: nothing is drawn", "set data.regularisation_prompt"),
    Rule("data.regularisation_prompt", ("data",), lambda data: data.regularisation_prompt is not None and data.regularisation_folder is not None,
         "and `data.regularisation_folder` exclude each other", "keep one of them: pictures that are there, or pictures that the base draws"),
    Rule("adapter.targets", ("adapter",), lambda adapter: _not_an_expression(adapter.targets),
         "is not a regular expression", 'use a preset such as "attention", or an expression like "blocks.*attn1.to_q"'),
    Rule("adapter.rank_pattern", ("adapter",), lambda adapter: any(map(_not_an_expression, adapter.rank_pattern or ())),
         "holds something that is not a regular expression", 'write each as an expression over whole module names, like "blocks.0.*"'),
    Rule("adapter.alpha_pattern", ("adapter",), lambda adapter: any(map(_not_an_expression, adapter.alpha_pattern or ())),
         "holds something that is not a regular expression", 'write each as an expression over whole module names, like "blocks.0.*"'),
    Rule("adapter.kind", ("adapter",), lambda adapter: adapter.kind == "oft" and bool(adapter.alpha or adapter.dropout or adapter.rank_pattern or adapter.alpha_pattern),
         "is oft, which has one block size for all modules, no alpha and no dropout", "leave out adapter.alpha, dropout, rank_pattern and alpha_pattern, or take another kind"),
    Rule("adapter.kind", ("adapter", "base"), lambda adapter, base: adapter.kind in ("loha", "lokr") and base.hold == "nf4",
         "adds to whole weights, and `base.hold` keeps them in 4 bits", "hold the base in int8, bf16 or streamed, or take the kind lora, dora or oft"),
    Rule("adapter.text_encoders", ("adapter",), lambda adapter: adapter.text_encoders and (adapter.kind not in ("lora", "rslora") or adapter.thinking_tokens > 0),
         "goes with the kinds lora and rslora and without thinking tokens", "set it to false, or change adapter.kind and adapter.thinking_tokens"),
    Rule("training.lora_plus_ratio", ("training", "adapter"), lambda training, adapter: training.lora_plus_ratio != 1 and adapter.kind in ("loha", "lokr", "oft"),
         "is about B matrices, and `adapter.kind` has none", "set it to 1, or take the kind lora, rslora, dora or pissa"),
    _density_rule("shift", "shifted", 'set objective.timesteps to "logit_normal_shifted" or "shifted" ("auto" takes the base\'s own shift)'),
    _density_rule("mean", "logit_normal", 'set objective.timesteps to "logit_normal" or "logit_normal_shifted"'),
    _density_rule("std", "logit_normal", 'set objective.timesteps to "logit_normal" or "logit_normal_shifted"'),
    _idle_rule("objective.gamma", lambda objective: objective.weighting == "min_snr",
               'is not read while `objective.weighting` is "none"', 'set objective.weighting = "min_snr"'),
    Rule("training.warmup", ("training",), lambda training: training.warmup > training.steps,
         "is longer than the whole training", "lower it, or raise training.steps"),
    Rule("validation.folder", ("validation",), lambda validation: validation.folder is not None and validation.share > 0,
         "and `validation.share` exclude each other", "hold out a folder, or a share of data.folder"),
    _idle_rule("tracking.project", lambda tracking: bool(tracking.trackers),
               "is not read while no tracker is named", 'name one, such as tracking.trackers = ["tensorboard"]'),
    _idle_rule("tracking.run_name", lambda tracking: bool(tracking.trackers),
               "is not read while no tracker is named", 'name one, such as tracking.trackers = ["tensorboard"]'),
    Rule("samples.height", ("samples",), lambda samples: (samples.height is None) != (samples.width is None),
         "and `samples.width` go together", "set both, or neither"),
    Rule("samples.most_drift", ("samples",), lambda samples: samples.most_drift > 0 and not (samples.unrelated and samples.every),
         "is looked at on pictures that are not drawn", "set samples.unrelated and samples.every, or leave it at 0"),
    Rule("samples.stop_on_copies", ("samples",), lambda samples: samples.stop_on_copies and not samples.every,
         "is looked at on pictures that are not drawn", "set samples.every"),
)


def broken_rules(valid: Mapping[str, Section]) -> Iterator[Rule]:
    """The rules that do not hold, among those whose sections are all there."""
    for rule in RULES:
        if all(name in valid for name in rule.sections) and rule.broken(*(valid[name] for name in rule.sections)):
            yield rule
