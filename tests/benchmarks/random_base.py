"""Bases of any size with random weights, saved as pipelines: what the benchmarks of memory and speed run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

FULL = {"num_attention_heads": 16, "attention_head_dim": 88, "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637, "cross_attention_dim": 1024,
        "cross_attention_dim_t5": 2048, "pooled_projection_dim": 1024, "sample_size": 128}
FULL_IMAGE_2 = {"in_channels": 64, "out_channels": 64, "num_attention_heads": 28, "attention_head_dim": 128, "num_layers": 20, "num_single_layers": 40,
                "num_refiner_layers": 2, "mlp_ratio": 4.0, "text_embed_dim": 3584, "text_embed_2_dim": 1472, "rope_axes_dim": (64, 64)}
# Drawing every number of 17 billion takes longer than quantising them; shapes and spread are what matters here.
POOL = 1 << 24


def hunyuan_dit(folder: Path, dtype: torch.dtype, **changes: Any) -> Path:
    """A HunyuanDiT pipeline with the tiny encoders of the tests and a transformer of the given configuration, written tensor by tensor.

    changes: of the full-size configuration v1.2. An existing folder is left as it is.
    """
    if (folder / "transformer" / "config.json").is_file():
        return folder
    from tests.tiny_models import hunyuan_dit as tiny

    pipeline = tiny.build()
    config = dict(pipeline.transformer.config) | FULL | changes
    pipeline.save_pretrained(folder)
    widths = (config["cross_attention_dim"], config["cross_attention_dim_t5"])
    _widen_encoders(folder, widths)
    write_random_transformer(folder / "transformer", "HunyuanDiT2DModel", config, dtype)
    return folder


def hunyuan_image_2(folder: Path, dtype: torch.dtype, **changes: Any) -> Path:
    """A HunyuanImage-2.1 pipeline with a transformer of the full configuration (17.4 billion), in shards.

    Encoders and autoencoder are the tiny ones of the tests and do not fit it: only the transformer can be run.
    changes: of the configuration. An existing folder is left as it is.
    """
    if (folder / "transformer" / "config.json").is_file():
        return folder
    from tests.tiny_models import hunyuan_image_2 as tiny

    pipeline = tiny.build()
    config = dict(pipeline.transformer.config) | FULL_IMAGE_2 | changes
    pipeline.save_pretrained(folder)
    write_random_transformer(folder / "transformer", "HunyuanImageTransformer2DModel", config, dtype)
    return folder


def _widen_encoders(folder: Path, widths: tuple[int, int]) -> None:
    """Text encoders of one layer whose states are as wide as the transformer wants them."""
    import transformers

    from tests.tiny_models import tokenizers

    bert = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizers.bert()), hidden_size=widths[0], num_hidden_layers=1, num_attention_heads=2,
                                                          intermediate_size=64, max_position_embeddings=77))
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(tokenizers.t5(256)), d_model=widths[1], d_kv=16, d_ff=64, num_layers=1, num_heads=2))
    bert.save_pretrained(folder / "text_encoder")
    t5.save_pretrained(folder / "text_encoder_2")


def _from_pool(pool: torch.Tensor, shape: torch.Size, offset: int) -> torch.Tensor:
    """Random numbers of this shape, repeated where the pool is smaller, begun elsewhere for every tensor."""
    size, begin = shape.numel(), offset % (len(pool) // 2)
    if begin + size <= len(pool):
        return pool[begin:begin + size].reshape(shape).clone()
    return pool.roll(begin).repeat(-(-size // len(pool)))[:size].reshape(shape).clone()


def write_random_transformer(folder: Path, class_name: str, config: dict[str, Any], dtype: torch.dtype, shard_bytes: int = 2 << 30) -> None:
    """Weights N(0, 0.02) (norms: ones) in safetensors shards with an index; never more than one shard in memory.

    The configuration is written last, so that a folder that has one is whole.
    """
    import diffusers
    from accelerate import init_empty_weights
    from safetensors.torch import save_file

    component = getattr(diffusers, class_name)
    with init_empty_weights():
        model = component.from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.safetensors*"), folder / "config.json"]:
        old.unlink(missing_ok=True)
    pool = torch.empty(POOL).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).to(dtype)
    shard: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    size = 0

    def flush() -> None:
        nonlocal shard, size
        save_file(shard, folder / f"part-{len(names):05d}.safetensors")
        names.append(list(shard))
        shard, size = {}, 0

    for name, value in model.state_dict().items():
        is_norm = value.ndim == 1 and name.endswith("weight")
        tensor = torch.ones(value.shape, dtype=dtype) if is_norm else _from_pool(pool, value.shape, len(names) * 7919 + len(shard) * 104729)
        shard[name] = tensor
        size += tensor.nbytes
        if size >= shard_bytes:
            flush()
    if shard:
        flush()
    mapping = {name: f"diffusion_pytorch_model-{number + 1:05d}-of-{len(names):05d}.safetensors" for number, some in enumerate(names) for name in some}
    for number in range(len(names)):
        (folder / f"part-{number:05d}.safetensors").rename(folder / f"diffusion_pytorch_model-{number + 1:05d}-of-{len(names):05d}.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if not key.startswith("_")} | {"_class_name": class_name}))
