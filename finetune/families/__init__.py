"""Model families: how each one loads, encodes, predicts, and which modules take LoRA."""
