"""Adapter files: read, write, attach, bake, verify, convert. Knows neither families nor training."""
