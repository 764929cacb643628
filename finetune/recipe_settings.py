"""Every setting of a run: its type, unit, default, range and meaning. This file is the only place that states them.

`brushwork recipe explain KEY`, error messages and the documentation are all read from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

# NUL is the one character that no file name, prompt or Hub id can carry and that breaks system calls.
Text = Annotated[str, StringConstraints(max_length=8192, pattern=r"^[^\x00]*$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[^\x00\r\n]+$")]
Colour = Annotated[str, StringConstraints(pattern=r"^#[0-9a-fA-F]{6}$")]
Size = Annotated[int, Field(ge=16, le=8192)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]


def _usable_path(path: Path) -> Path:
    text = str(path)
    if len(text) > 4096 or "\x00" in text or not text.isprintable():
        raise ValueError("not a usable path")
    return path


Folder = Annotated[Path, Field(strict=False), AfterValidator(_usable_path)]


def setting(default: Any, meaning: str, unit: str = "", **limits: Any) -> Any:
    """A field with its meaning, unit ("" for none) and limits (ge, gt, le, lt)."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, **limits)


class Section(BaseModel):
    """Settings that are checked strictly: "16" is not 16, true is not 1, an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class BaseSettings(Section):
    """The model that the adapter is for."""

    model: Name = setting(..., "The base model: `mini` for the embedded one, a folder in diffusers layout, or a Hub id such as `owner/name`.")
    revision: Name | None = setting(None, "Hub branch, tag or commit; left out: the newest at the first run, and its commit is recorded.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "Number format of the weights in memory; auto takes what the device is fast in and says why.")
    hold: Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4", "streamed"] = setting(
        "auto", "How the frozen base weights are held while training: full, 8-bit, 4-bit (nf4), or streamed block by block from the file.")


class FurtherFolder(Section):
    """One entry of `data.also`: pictures that are trained beside those of `data.folder`."""

    folder: Folder = setting(..., "Folder of pictures; a relative path counts as that of `data.folder` does.")
    repeats: int = setting(1, "Times that each of its pictures is seen while a picture of `data.folder` is seen once; repeats that the folder names itself multiply it.", "times", ge=1, le=10_000)
    weight: float = setting(1.0, "Factor on the loss of its pictures.", "", gt=0, le=100)


class DataSettings(Section):
    """The pictures and their captions."""

    folder: Folder | None = setting(
        None, "Folder of pictures; a relative path in a recipe file counts from that file, on the command line from where you are.")
    also: Annotated[tuple[Annotated[FurtherFolder, Field(strict=False)], ...], Field(strict=False, max_length=64)] = setting(
        (), "Further folders of pictures, each with its folder, repeats (1) and weight of the loss (1.0): {folder = \"details\", repeats = 3, weight = 0.5}.")
    regularisation_folder: Folder | None = setting(
        None, "Pictures of the same kind of thing as the base knows it (kohya's reg folder): trained without the trigger and as often as your own, so that the trigger alone carries what is new. Pictures in a folder called reg inside a picture folder count as such too.")
    regularisation_prompt: Name | None = setting(None, "In place of a folder of regularisation pictures: what the untouched base draws for them before training, into the run folder.")
    regularisation_count: int = setting(100, "How many pictures are drawn from the regularisation prompt.", "pictures", ge=1, le=100_000)
    regularisation_weight: float = setting(1.0, "Factor on the loss of regularisation pictures, elsewhere called prior loss weight.", "", ge=0, le=100)
    masked_loss: bool = setting(False, "Whether the masks beside pictures (a_mask.png, a-masklabel.png, masks/a.png) say where a picture is learned: white fully, black not. A latent stands for a square of pixels (8x8 for most bases) and counts by the darkest of them. Pictures without a mask count everywhere.")
    unmasked_weight: float = setting(0.0, "With masked_loss: the least weight of a place that its mask leaves out; 1 makes the masks count for nothing.", "share", ge=0, le=1)
    trigger: Name | None = setting(None, "Word or phrase put in front of every caption; it is never shuffled or dropped with single parts.")
    missing_caption: Literal["error", "empty", "trigger", "file_name"] = setting(
        "error", "What to do with a picture without caption: stop, use an empty caption, the trigger alone, or its file name.")
    resolution: Size | Annotated[tuple[Size, ...], Field(strict=False, min_length=1, max_length=8)] | None = setting(
        None, "Edge of a square training picture; buckets of other shapes have about the same area. A list such as [512, 768, 1024] trains each picture at every size that it can fill. Left out: the family's own.", "pixels")
    buckets: int = setting(8, "Most training sizes to sort pictures into, at each resolution; 1 crops everything to one shape.", "sizes", ge=1, le=64)
    upscale: bool = setting(False, "Whether pictures smaller than their bucket are enlarged; otherwise they get a smaller bucket.")
    fit: Literal["crop", "pad"] = setting("crop", "How a picture meets its bucket: cut the longer side, or fill with the background colour.")
    background: Colour = setting("#ffffff", "Colour behind transparent pictures and in padding, as #rrggbb.")
    caption_dropout: float = setting(0.1, "Share of steps in which a picture is trained with the empty caption; guidance needs some.", "share", ge=0, le=1)
    caption_shuffle: bool = setting(False, "Whether comma-separated parts of a caption change places from step to step.")
    keep_tokens: int = setting(1, "How many first comma-separated parts stay in place when the others are shuffled.", "parts", ge=0, le=100)
    thinking: Literal["plain", "trace", "mixed"] = setting(
        "plain", "Which captions are trained: the plain ones, those with their thinking trace, or both in turn.")


class AdapterSettings(Section):
    """What is trained."""

    kind: Literal["lora", "rslora", "dora", "pissa", "loha", "lokr", "oft"] = setting(
        "lora", "Kind of adapter: lora; rslora (scale alpha / sqrt(rank)); dora (a magnitude for every output beside it, slower); pissa (starts from the "
        "weight's main directions, saved at twice the rank); loha and lokr (Hadamard and Kronecker products, saved in PEFT's layout); oft (turns blocks of inputs, saved so too).")
    rank: int = setting(16, "Rank of the two LoRA matrices; more holds more and needs more memory. Of loha: of both its parts; of lokr: of its larger factor; of oft: the edge of its blocks.", "dimensions", ge=1, le=1024)
    alpha: float | None = setting(None, "LoRA scale is alpha / rank. Left out: alpha = rank, a scale of 1 (rslora: sqrt(rank)).", "", gt=0, le=4096)
    rank_pattern: Annotated[dict[Name, Annotated[int, Field(ge=1, le=1024)]], Field(max_length=64)] | None = setting(
        None, 'Other ranks for some modules: a table of regular expression over whole module names = rank, such as {".*attn2.*" = 4}; the first that fits decides.', "dimensions")
    alpha_pattern: Annotated[dict[Name, Annotated[float, Field(gt=0, le=4096)]], Field(max_length=64)] | None = setting(
        None, "Other alphas for some modules, like `adapter.rank_pattern`. A module named there alone keeps alpha, or takes its own rank where alpha is left out.")
    targets: Name = setting("attention", "Which modules get LoRA: a preset of the family, the same for a range of blocks such as attention[20-39], or a regular expression over whole module names.")
    dropout: float = setting(0.0, "Share of the LoRA input dropped while training.", "share", ge=0, lt=1)
    text_encoders: bool = setting(
        False, "Whether text encoders get LoRA too, where the base's pipeline loads one for them; they then stay in memory, and captions are encoded anew at every step.")
    thinking_tokens: int = setting(0, "Learned vectors among the text states, trained with the LoRA; their effect is small, and they must travel with it.", "tokens", ge=0, le=64)


class TrainingSettings(Section):
    """How it is trained."""

    steps: int = setting(1000, "Optimizer steps in total.", "optimizer steps", ge=1, le=10_000_000)
    batch_size: int = setting(1, "Pictures in one forward pass.", "pictures", ge=1, le=4096)
    accumulation: int = setting(1, "Forward passes whose gradients are added up for one optimizer step.", "passes", ge=1, le=4096)
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["find"] = setting(
        1e-4, "Highest learning rate; find takes one from a range test (Smith 2015) on this very job, which costs some dozen steps first.", "per optimizer step")
    lora_plus_ratio: float = setting(
        1.0, "Learning rate of the B matrices over that of A (LoRA+, Hayou et al. 2024, who advise about 16 with a lower learning rate); 1 is plain LoRA.", "", ge=1, le=1024)
    ema_decay: float = setting(0.0, "Decay of an exponential moving average of the adapter, which is then what is drawn with and exported; 0 is off, 0.99 to 0.9999 are usual.",
                               "per optimizer step", ge=0, lt=1)
    optimizer: Literal["auto", "adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "lion8bit"] = setting(
        "auto", "auto takes adamw8bit on a GPU and fused adamw on a CPU, where 8-bit is slower.")
    weight_decay: float = setting(0.0, "Decoupled weight decay.", "", ge=0, le=1)
    schedule: Literal["constant", "cosine", "linear"] = setting("constant", "How the learning rate goes on after the warm-up.")
    warmup: Count = setting(0, "Steps in which the learning rate rises from zero.", "optimizer steps")
    gradient_clip: float = setting(1.0, "Largest norm of all gradients together; 0 is off.", "norm", ge=0, le=1_000_000)
    gradient_noise: bool = setting(False, "Whether the gradient noise scale is measured (McCandlish et al. 2018): below which number of pictures a step larger batches pay. "
                                          "Needs accumulation or several processes, and memory for one more gradient.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "Number format of the forward and backward pass; auto says what it took and why.")
    checkpointed_blocks: Literal["auto"] | Count = setting(
        "auto", "Transformer blocks whose activations are computed twice to save memory; auto takes as few as fit.", "blocks")
    seed: int = setting(0, "Everything random in the run follows from it.", "", ge=0, le=2**63 - 1)
    checkpoint_every: int = setting(250, "A checkpoint is written after this many steps; 0 writes only the last one.", "optimizer steps", ge=0, le=10_000_000)
    keep_checkpoints: int = setting(2, "Newest checkpoints that are kept.", "checkpoints", ge=1, le=10_000)
    non_finite: Literal["stop", "skip"] = setting("stop", "What to do when a loss or gradient is NaN or infinite: stop, or skip the step and count it.")
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = setting(
        "auto", "Processes that read and resize pictures before training; 0 works in the main process.", "processes")


class ObjectiveSettings(Section):
    """Which noise levels are trained, and how much each counts."""

    timesteps: Literal["auto", "uniform", "logit_normal", "shifted", "logit_normal_shifted"] = setting(
        "auto", "Density of the noise levels; auto is what the family's makers use.")
    shift: float = setting(1.0, "More high noise above 1, more low noise below; for the shifted densities (with auto, the shift is the base's own).", "", gt=0, le=100)
    mean: float = setting(0.0, "Mean of the logit-normal densities.", "", ge=-10, le=10)
    std: float = setting(1.0, "Standard deviation of the logit-normal densities.", "", gt=0, le=10)
    stratified: bool = setting(True, "Whether the noise levels of one step are spread evenly over the density, which makes gradients less noisy.")
    weighting: Literal["none", "min_snr"] = setting("none", "Weight of a sample's loss by its noise level.")
    noise_offset: float = setting(
        0.0, "Strength of a constant that is added to the noise of each latent channel, so that very dark and very bright pictures can be learned; 0.05 is usual. Only for bases that are not flow matching, which learn from pure noise anyway.", "", ge=0, le=1)
    guidance: float = setting(
        1.0, "Guidance scale that a guidance-distilled base is told in training; at 1 it keeps its behaviour at higher scales more intact, the scripts of diffusers tell it 3.5.", "", ge=0, le=100)
    gamma: float = setting(5.0, "Cap of min_snr, the signal-to-noise ratio above which samples count less.", "", gt=0, le=1000)


class SampleSettings(Section):
    """Pictures drawn before, during and after training, always with the same prompts and seeds."""

    prompts: Annotated[tuple[Text, ...], Field(strict=False, max_length=64)] = setting((), "What to draw. Left out: captions of the data.")
    unrelated: Annotated[tuple[Text, ...], Field(strict=False, max_length=64)] = setting(
        (), "Further prompts, drawn without the trigger: how far they drift from the base's pictures is watched during training.")
    stop_on_copies: bool = setting(False, "Whether training ends early when more than a quarter of the sample pictures are near-copies of training pictures.")
    most_drift: float = setting(
        0.0, "Training ends early when the pictures of `unrelated` are on average further than this from the base's; 0.1 is clearly seen, 0 never ends it.", "OKLab", ge=0, le=1.2)
    negative: Text = setting("", "Negative prompt.")
    every: Count = setting(0, "Draw after this many steps; 0 draws only before and after.", "optimizer steps")
    steps: int = setting(20, "Sampler steps of a picture.", "sampler steps", ge=1, le=1000)
    guidance: float = setting(5.0, "Classifier-free guidance; 1 is off.", "", ge=0, le=100)
    seed: int = setting(0, "Seed of the first picture; the others count up.", "", ge=0, le=2**63 - 1)
    height: Size | None = setting(None, "Height of the pictures. Left out: the training resolution.", "pixels")
    width: Size | None = setting(None, "Width of the pictures. Left out: the training resolution.", "pixels")


class ValidationSettings(Section):
    """Pictures that are never trained: the loss on them says when there is nothing more to learn. Each counts as it would if it
    were trained, with the weight and the repeats of its folder."""

    folder: Folder | None = setting(None, "Folder of held-out pictures with captions; a picture that is also in data.folder or data.also is not trained, and counts with that folder's weight and repeats.")
    share: float = setting(0.0, "Share of the pictures of data.folder and data.also that is held out, at least one; drawn by training.seed. Pictures whose layout says so are held out anyway.",
                           "share", ge=0, lt=1)
    every: int = setting(100, "The loss on held-out pictures is measured after this many steps, and after the last one.", "optimizer steps", ge=1, le=10_000_000)
    levels: int = setting(4, "Noise levels at which each held-out picture is measured; all pictures together cover the density evenly.", "levels", ge=1, le=1000)
    patience: int = setting(0, "Training ends when the held-out loss has not fallen for this many measurements in a row; 0 never ends it.", "measurements", ge=0, le=1_000_000)
    keep_best: bool = setting(True, "Whether the adapter of the step with the lowest held-out loss is exported instead of the last one; "
                                    "where sample pictures end a run, that of the last drawing that was in order.")


class TrackingSettings(Section):
    """Where the numbers of the log go besides the run folder; nothing leaves this machine unless a tracker is named that sends it."""

    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(strict=False, max_length=3)] = setting(
        (), "Experiment trackers that get every step's numbers and the recipe without its folders; each is an extra of the same name.")
    project: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] = setting("brushwork", "Project under which trackers file the run.")
    run_name: Name | None = setting(None, "Name of the run there. Left out: that of the run folder.")


class PublishSettings(Section):
    """Where the adapter goes, if anywhere; nothing is uploaded by training."""

    repo: Name | None = setting(None, "Hub repository such as `owner/name` that `brushwork publish` proposes.")
    licence: Name | None = setting(None, "Licence of your adapter where the base's licence leaves a choice.")
    private: bool = setting(True, "Whether a published repository starts private.")


SECTIONS: dict[str, type[Section]] = {
    "base": BaseSettings,
    "data": DataSettings,
    "adapter": AdapterSettings,
    "training": TrainingSettings,
    "objective": ObjectiveSettings,
    "samples": SampleSettings,
    "validation": ValidationSettings,
    "tracking": TrackingSettings,
    "publish": PublishSettings,
}
