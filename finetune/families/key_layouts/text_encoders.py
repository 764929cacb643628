"""Layers of the text encoders that adapters of several families train."""

from __future__ import annotations

CLIP = tuple(
    f"text_model.encoder.layers.{{}}.{layer}"
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
) + ("text_projection",)

BERT = tuple(
    f"encoder.layer.{{}}.{layer}"
    for layer in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense")
)

T5 = tuple(
    f"encoder.block.{{}}.layer.{layer}"
    for layer in ("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o",
                  "1.DenseReluDense.wi", "1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1", "1.DenseReluDense.wo")
)
