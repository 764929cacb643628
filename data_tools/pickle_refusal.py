"""Model weights that are there as a pickle only are refused, with the way to get safetensors from them."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import BadInput

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
HOW_TO_CONVERT = (
    "convert it once where nothing can be lost, such as a container without network: open it with torch's own loader and weights_only on, write its tensors with "
    "safetensors.torch.save_file(..., \"model.safetensors\"), and give a folder with config.json and the tensors under transformers' names"
)


def refuse_pickles(place: Path | str, *, fix: str = HOW_TO_CONVERT) -> None:
    """Raises BadInput where `place` is a pickle, or a folder whose only weights are pickles. Other places pass."""
    path = Path(place)
    if path.is_file() and path.suffix.lower() in PICKLES:
        found = path
    elif path.is_dir() and not any(path.glob("*.safetensors")):
        found = next((one for one in sorted(path.iterdir()) if one.suffix.lower() in PICKLES), None)
    else:
        return
    if found is not None:
        raise BadInput("a pickle can run code when it is opened and is never read", where=str(found), fix=fix)
