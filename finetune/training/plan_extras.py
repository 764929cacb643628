"""What a run needs beside its steps: copies of the adapter, measurements on held-out pictures, the search for a learning rate."""

from __future__ import annotations

from finetune.recipe import Recipe
from finetune.training.loop_state import copies_of_weights
from finetune.training.rate_finder import STEPS, samples_of_a_look
from finetune.training.sharding import Sharding

# A forward pass beside forward and backward; the frozen weights take no gradient.
FORWARD_SHARE = 0.5


def weight_copies(recipe: Recipe, adapter_bytes: int, held_out: int) -> dict[str, int]:
    """Bytes of the average, of the best step's weights, and of one more gradient where its noise is measured."""
    copies = copies_of_weights(recipe, held_out > 0) + 2 * int(recipe.training.gradient_noise)
    return {"weight_copies": copies * adapter_bytes} if copies else {}


def divided_note(sharding: Sharding, whole_bytes: float) -> str:
    """What a reader must know of a base that is divided."""
    return (f"memory of each of {sharding.processes} processes, between which the base is divided ({sharding.by}); before it is divided each has all of it in "
            f"host memory, {whole_bytes / 2**30:.1f} GiB, and the main one proves the adapter on a base that is streamed")


def time_notes(recipe: Recipe, seconds_per_step: float, held_out: int) -> list[str]:
    """How long measurements and the search take, in words."""
    settings = recipe.training
    forward = FORWARD_SHARE * seconds_per_step / (settings.batch_size * settings.accumulation)
    notes = []
    if held_out:
        looks = recipe.validation.levels * held_out
        counted = " (each counted at every size that it fills)" if isinstance(recipe.data.resolution, tuple) else ""
        notes.append(f"the loss on {held_out} held-out pictures{counted} takes about {looks * forward:.1f} s every {recipe.validation.every} steps")
    if settings.learning_rate == "find":
        notes.append(f"the search for a learning rate takes about {STEPS * (seconds_per_step + samples_of_a_look(recipe) * forward):.0f} s before the first step")
    return notes
