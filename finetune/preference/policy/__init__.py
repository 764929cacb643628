"""Optimising a LoRA for what people prefer while it stays near its base: DPO, GRPO, direct reward gradients."""
