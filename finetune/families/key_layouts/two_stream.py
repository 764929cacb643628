"""Names that the two-stream transformers share: Flux and those built after it, in diffusers and in the original code."""

from __future__ import annotations

from finetune.adapters.keys import INPUT, REST, Rule, fused, rename, within

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
JOINT_ATTENTION = (*QKV, "attn.to_out.0", *ADDED_QKV, "attn.to_add_out")
GELU_FEED_FORWARD = ("net.0.proj", "net.2")
LINEAR1_ROWS = (INPUT, INPUT, INPUT, REST)
REFINER = "context_embedder.token_refiner.refiner_blocks.{}"


def layers(block: str, *names: str) -> tuple[str, ...]:
    """Layer names of one kind of block."""
    return tuple(f"{block}.{{}}.{name}" for name in names)


DOUBLE_BLOCKS = layers("transformer_blocks", *JOINT_ATTENTION, *(f"{ff}.{layer}" for ff in ("ff", "ff_context") for layer in GELU_FEED_FORWARD))
DOUBLE_MODULATION = layers("transformer_blocks", "norm1.linear", "norm1_context.linear")
SINGLE_BLOCKS = layers("single_transformer_blocks", *QKV, "proj_mlp", "proj_out")
SINGLE_MODULATION = layers("single_transformer_blocks", "norm.linear")

# Both streams of a block with fused attention, as the original Flux code and ComfyUI name them.
DOTTED_ATTENTION = (
    fused("img_attn.qkv", *QKV), rename("img_attn.proj", "attn.to_out.0"),
    fused("txt_attn.qkv", *ADDED_QKV), rename("txt_attn.proj", "attn.to_add_out"),
)
NUMBERED_MLP = (
    rename("img_mlp.0", "ff.net.0.proj"), rename("img_mlp.2", "ff.net.2"),
    rename("txt_mlp.0", "ff_context.net.0.proj"), rename("txt_mlp.2", "ff_context.net.2"),
)
SHORT_MODULATION = (rename("img_mod.lin", "norm1.linear"), rename("txt_mod.lin", "norm1_context.linear"))
SINGLE_LINEARS = (fused("linear1", *QKV, "proj_mlp", rows=LINEAR1_ROWS), rename("linear2", "proj_out"))


def flux_blocks() -> tuple[Rule, ...]:
    """The double and single blocks in the spelling of the original Flux code."""
    double = within("double_blocks.{}", "transformer_blocks.{}", (*DOTTED_ATTENTION, *NUMBERED_MLP, *SHORT_MODULATION))
    single = within("single_blocks.{}", "single_transformer_blocks.{}", (*SINGLE_LINEARS, rename("modulation.lin", "norm.linear")))
    return double + single


def hunyuan_blocks() -> tuple[Rule, ...]:
    """The same blocks in the spelling of Tencent's video and image code: underscores, `fc1`, `linear`."""
    double = within("double_blocks.{}", "transformer_blocks.{}", (
        fused("img_attn_qkv", *QKV), rename("img_attn_proj", "attn.to_out.0"),
        fused("txt_attn_qkv", *ADDED_QKV), rename("txt_attn_proj", "attn.to_add_out"),
        rename("img_mlp.fc1", "ff.net.0.proj"), rename("img_mlp.fc2", "ff.net.2"),
        rename("txt_mlp.fc1", "ff_context.net.0.proj"), rename("txt_mlp.fc2", "ff_context.net.2"),
        rename("img_mod.linear", "norm1.linear"), rename("txt_mod.linear", "norm1_context.linear"),
    ))
    single = within("single_blocks.{}", "single_transformer_blocks.{}", (*SINGLE_LINEARS, rename("modulation.linear", "norm.linear")))
    return double + single


def refiner_rules(attention: str, projection: str, first: str, second: str) -> tuple[Rule, ...]:
    """The text refiner in front of Tencent's models; its four layers have one name in the code, another in ComfyUI."""
    return within("txt_in.individual_token_refiner.blocks.{}", REFINER, (
        fused(attention, *QKV), rename(projection, "attn.to_out.0"),
        rename(first, "ff.net.0.proj"), rename(second, "ff.net.2"), rename("adaLN_modulation.1", "norm_out.linear"),
    ))


REFINER_MODULES = tuple(f"{REFINER}.{name}" for name in (*QKV, "attn.to_out.0", "ff.net.0.proj", "ff.net.2", "norm_out.linear"))
