"""Puts the parts together as one diffusers folder in fp16, small and the same bytes for the same weights."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, HunyuanDiTPipeline
from safetensors.torch import load_file
from transformers import BertModel, BertTokenizer, T5EncoderModel, T5Tokenizer

from .packed_text import unpack
from .transformer import NOISE, new_transformer

# What the libraries note about the machine and moment of saving; it says nothing about the model.
NOTED_IN_PASSING = ("_name_or_path", "is_local", "local_files_only")


def write_pipeline(transformer_file: Path, autoencoder_folder: Path, encoders: Path, out: Path) -> None:
    """Written beside `out` first and renamed at the end, so that a reader never sees half a model."""
    transformer = new_transformer(0)
    transformer.load_state_dict(load_file(transformer_file))
    unpack(transformer)
    pipeline = HunyuanDiTPipeline(
        vae=AutoencoderKL.from_pretrained(autoencoder_folder), transformer=transformer, scheduler=DDPMScheduler(**NOISE),
        tokenizer=BertTokenizer.from_pretrained(encoders / "tokenizer"),
        text_encoder=BertModel.from_pretrained(encoders / "text_encoder", dtype=torch.float32),
        tokenizer_2=T5Tokenizer.from_pretrained(encoders / "tokenizer_2"),
        text_encoder_2=T5EncoderModel.from_pretrained(encoders / "text_encoder_2", dtype=torch.float32),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(unfinished)
    for file in sorted(unfinished.rglob("*")):
        if file.suffix == ".json":
            _tidy(file)
        file.chmod(0o755 if file.is_dir() else 0o644)
    if out.exists():
        former = out.with_name(out.name + ".former")
        out.rename(former)
        unfinished.rename(out)
        shutil.rmtree(former)
    else:
        unfinished.rename(out)


def _tidy(file: Path) -> None:
    """Without remarks of the moment and, for the long vocabularies, without indentation."""
    content = json.loads(file.read_text("utf-8"))
    if isinstance(content, dict):
        for key in NOTED_IN_PASSING:
            content.pop(key, None)
    indent = None if file.name == "tokenizer.json" else 2
    file.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", "utf-8")


def folder_size(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
