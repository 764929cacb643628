"""How the embedded model came to be: `python -m finetune.mini_base.build --out DIR` makes it again from scratch."""
