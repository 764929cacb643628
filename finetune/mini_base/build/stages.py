"""The stages of the build, each a pure function of the files that the one before left in the work folder."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from .rasters import EDGES, rasterise_all
from .subjects import load_subjects

SEED = 20


def prepare(packages: Path, work: Path) -> None:
    """Rasters, the patch map of the encoder, and both text encoders."""
    from .autoencoder import fit_patch_map
    from .text_encoders import build_text_encoders

    subjects = load_subjects(packages)
    rasters = rasterise_all(packages, [subject.icon for subject in subjects])
    np.savez_compressed(work / "rasters.npz", **{f"edge{edge}": pictures for edge, pictures in rasters.items()})
    patch_map, kept = fit_patch_map(rasters, SEED + 1)
    save_file(patch_map.as_tensors(), work / "patch_map.safetensors")
    build_text_encoders(packages, subjects, SEED + 10, work / "encoders")
    print(f"{len(subjects)} subjects; the patch map keeps {kept:.1%} of the variance", flush=True)


def load_rasters(work: Path) -> dict[int, np.ndarray]:
    with np.load(work / "rasters.npz", allow_pickle=False) as stored:
        return {edge: stored[f"edge{edge}"] for edge in EDGES}


def load_patch_map(work: Path):
    from .autoencoder import PatchMap

    return PatchMap.from_tensors(load_file(work / "patch_map.safetensors"))


def transformer(packages: Path, work: Path, plan) -> None:
    from .transformer import save_snapshot, train_transformer

    model = train_transformer(load_subjects(packages), load_rasters(work), load_patch_map(work), work / "encoders", plan,
                              work / "snapshots", snapshot_every=200, report=lambda line: print(line, flush=True))
    save_snapshot(model.state_dict(), work / "transformer.safetensors")


def decoder(work: Path, plan) -> None:
    from .decoder import train_decoder

    autoencoder = train_decoder(load_rasters(work), load_patch_map(work), plan, work / "autoencoder_snapshot",
                                report=lambda line: print(line, flush=True))
    autoencoder.save_pretrained(work / "autoencoder")


def assemble(packages: Path, work: Path, out: Path) -> None:
    """The finished folders below `out`: weights, style_folder and held_out."""
    from .pipeline_folder import folder_size, write_pipeline
    from .style_folder import write_style

    write_pipeline(work / "transformer.safetensors", work / "autoencoder", work / "encoders", out / "weights")
    write_style(load_subjects(packages), load_rasters(work), SEED + 30, out / "style_folder", out / "held_out")
    print(f"{out}: {folder_size(out / 'weights') / 2 ** 20:.2f} MiB of weights", flush=True)
