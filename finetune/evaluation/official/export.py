"""Draw a benchmark's prompts and lay the pictures out as its official grader expects them; resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.atomic_files import whole_file
from data_tools.progress import Progress
from finetune.errors import BadInput
from finetune.evaluation.drawing import PictureFolder, Studio
from finetune.evaluation.official import dpg_bench, geneval, hpsv2
from finetune.evaluation.prompts import EvaluationPrompt
from finetune.evaluation.results import EvaluationFolder

if TYPE_CHECKING:
    from finetune.evaluation.compare import Comparison
    from finetune.families.base_models import BaseModel

FORMS = ("geneval", "dpg-bench", "hpsv2")


def read_form(form: str, prompts: Path) -> tuple[list[EvaluationPrompt], int]:
    """(prompts, pictures a prompt) of an official benchmark from its own files."""
    if form == "geneval":
        return geneval.prompts_of(geneval.read_metadata(prompts)), geneval.PICTURES_PER_PROMPT
    if form == "dpg-bench":
        return dpg_bench.read_prompts_folder(prompts), dpg_bench.PICTURES_PER_PROMPT
    if form == "hpsv2":
        return hpsv2.read_prompts_folder(prompts), hpsv2.PICTURES_PER_PROMPT
    raise BadInput(f"there is no form called {form!r}", where="--form", fix=f"one of {', '.join(FORMS)}")


def export(base: BaseModel, comparison: Comparison, form: str, prompts: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Draw every prompt of the benchmark with each subject of `comparison` into out/<subject>/ in the official form.

    The pictures are drawn into out/drawn first, where an interrupted export goes on. Seeds are `comparison.seeds`.
    """
    from finetune.evaluation.compare import drawing_settings

    wanted_seeds = read_form(form, prompts)[1]
    if len(comparison.seeds) != wanted_seeds:
        raise BadInput(f"{form} wants {wanted_seeds} pictures a prompt, {len(comparison.seeds)} seeds were given", where="--seeds")
    drawn, settings = EvaluationFolder(out / "drawn"), drawing_settings(base, comparison)
    drawn.claim(settings)
    studio = Studio(base, settings, [prompt.prompt for prompt in comparison.prompts], comparison.subjects, progress)
    wanted = [(prompt, seed) for prompt in comparison.prompts for seed in comparison.seeds]
    written = {}
    for subject in comparison.subjects:
        folder = PictureFolder(drawn.pictures / subject.folder, settings)
        studio.draw(subject, folder, wanted, comparison.batch_size)
        place = out / subject.folder
        with progress.phase(f"laying out {subject.name}", len(comparison.prompts)) as advance:
            written[subject.name] = _lay_out(form, comparison, folder, place, prompts, advance)
    return {"form": form, "folders": {subject.name: str(out / subject.folder) for subject in comparison.subjects}, "files": written, "prompts": len(comparison.prompts)}


def _lay_out(form: str, comparison: Comparison, folder: PictureFolder, place: Path, prompts: Path, advance: Callable[..., None]) -> int:
    from PIL import Image

    metadata = geneval.read_metadata(prompts) if form == "geneval" else []
    count = 0
    for prompt in comparison.prompts:
        pictures = [Image.fromarray(folder.read(prompt, seed)) for seed in comparison.seeds]
        if form == "geneval":
            place_index = int(prompt.prompt_id)
            geneval.write_metadata(place, place_index, metadata[place_index])
            count += _save(pictures, [geneval.place_of(place, place_index, number) for number in range(len(pictures))])
        elif form == "dpg-bench":
            count += _save([dpg_bench.grid(pictures)], [dpg_bench.place_of(place, prompt.prompt_id)])
        else:
            count += _save(pictures, [hpsv2.place_of(place, prompt)])
        advance()
    return count


def _save(pictures: Sequence[Any], paths: Sequence[Path]) -> int:
    for picture, path in zip(pictures, paths, strict=True):
        kind = {"format": "JPEG", "quality": 95} if path.suffix == ".jpg" else {"format": "PNG"}
        with whole_file(path) as temporary:
            picture.save(temporary, **kind)
    return len(paths)


READERS: dict[str, Callable[[Path, str], Any]] = {"geneval": geneval.read_results, "dpg-bench": dpg_bench.read_results, "hpsv2": hpsv2.read_results}
