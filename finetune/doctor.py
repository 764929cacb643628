"""What this machine and this installation can do: versions, devices, memory, disk, and what each optional package adds."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.processor import multiplies_bf16

GIB = 2**30
CPU_BF16 = {True: "fast (fp32 is taken unless training.precision is bf16)", False: "slow (fp32 is taken)", None: "not known"}

# Optional packages and what a user gets from each. Nothing of these is needed for training.
OPTIONAL = {
    "deepspeed": "the base divided over cards by ZeRO-3 (extra `deepspeed`)",
    "hypothesis": "property tests (extra `test`)",
    "import-linter": "the test of the layers (extra `test`)",
    "pytest": "running the tests (extra `test`)",
    "resvg_py": "building the embedded model again (extra `mini-build`)",
    "tensorboard": "the experiment tracker of that name (extra `tensorboard`)",
    "trackio": "the experiment tracker of that name (extra `trackio`)",
    "wandb": "the experiment tracker of that name (extra `wandb`)",
    "scipy": "building the embedded model again (extra `mini-build`)",
}
# Packages that break others when they are there.
HARMFUL = {"torchvision": "a torchvision wheel that does not match torch makes diffusers fail at import; this program does not need it"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `ok` is False for what stands in the way; `fix` says what to do then."""

    group: str
    name: str
    value: str
    ok: bool = True
    fix: str = ""


def examine() -> list[Finding]:
    """Everything there is to say; imports torch, loads no model."""
    return [*_places(), *_versions(), *_devices(), *_memory_and_disk(), *_embedded_model(), *_optional()]


def _places() -> Iterator[Finding]:
    """Both packages have ordinary names: say from where they come, in case another project has the same."""
    yield Finding("program", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", sys.version_info >= (3, 11), "use Python 3.11 or newer")
    root = Path(__file__).parent.parent
    for name in ("finetune", "data_tools"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).parent if spec and spec.origin else None
        yield Finding("program", name, str(origin), origin == root / name, f"another project provides `{name}`; install this one into an environment of its own")


def _requirements() -> Iterator[tuple[str, str]]:
    """(package, wanted) of the installed distribution, without extras."""
    for text in metadata.requires("brushwork") or []:
        if "extra ==" not in text:
            found = re.match(r"([A-Za-z0-9_.-]+)\s*(.*)", text)
            if found:
                yield found[1], found[2]


def _versions() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    try:
        requirements = list(_requirements())
    except metadata.PackageNotFoundError:
        yield Finding("packages", "brushwork", "not installed", False, "pip install -c constraints.txt .")
        return
    for package, wanted in requirements:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding("packages", package, "missing", False, "pip install -c constraints.txt .")
            continue
        fits = SpecifierSet(wanted).contains(version.partition("+")[0], prereleases=True)
        yield Finding("packages", package, version, fits, f"tested with {wanted}: pip install -c constraints.txt .")
    for package, harm in HARMFUL.items():
        if importlib.util.find_spec(package):
            yield Finding("packages", package, metadata.version(package), _imports(package), f"pip uninstall {package}: {harm}")


def _imports(package: str) -> bool:
    try:
        importlib.import_module(package)
    except Exception:
        # Whatever a broken wheel raises (RuntimeError, AttributeError, OSError) means the same here.
        return False
    return True


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("devices", "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, bf16 {CPU_BF16[multiplies_bf16()]}")
    if not torch.cuda.is_available():
        yield Finding("devices", "gpu", "none that torch can use: the embedded model trains in minutes on a CPU, larger ones need a GPU")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16 only"
        yield Finding("devices", f"gpu {index}", f"{facts.name}, {total / GIB:.1f} GiB ({free / GIB:.1f} free), compute {facts.major}.{facts.minor}, {bf16}")


def _memory_and_disk() -> Iterator[Finding]:
    import psutil

    from finetune.training.encoding_cache import default_cache_folder

    memory = psutil.virtual_memory()
    yield Finding("memory", "memory", f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} free", memory.available > 1.5 * GIB, "close other programs; the embedded model needs about 1.5 GiB")
    for name, folder in (("here", Path.cwd()), ("temporary files", Path(tempfile.gettempdir())), ("downloaded models", _models_folder()), ("encodings", default_cache_folder())):
        present = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(present).free
        writable = os.access(present, os.W_OK)
        value = f"{free / GIB:.1f} GiB free in {folder}" + ("" if writable else ", not writable")
        yield Finding("disk", name, value, writable and free > GIB, "free some space, or choose another place")


def _models_folder() -> Path:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))


def _embedded_model() -> Iterator[Finding]:
    from finetune.mini_base import style_folder, weights_folder

    folder = weights_folder()
    present = (folder / "model_index.json").is_file()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if present else 0
    yield Finding("embedded model", "mini", f"{size / 2**20:.1f} MiB in {folder}" if present else "missing", present, "install the program again")
    pictures = len(list(style_folder().glob("*.png")))
    yield Finding("embedded model", "style folder", f"{pictures} pictures", pictures > 0, "install the program again")


def _optional() -> Iterator[Finding]:
    for package, use in OPTIONAL.items():
        try:
            value = metadata.version(package)
        except metadata.PackageNotFoundError:
            value = "not installed"
        yield Finding("optional", package, f"{value}: {use}")


def summary(findings: list[Finding]) -> dict[str, Any]:
    """The findings by group, for machines."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for finding in findings:
        entry: dict[str, Any] = {"value": finding.value, "ok": finding.ok}
        if not finding.ok:
            entry["fix"] = finding.fix
        groups.setdefault(finding.group, {})[finding.name] = entry
    return {"ok": all(finding.ok for finding in findings), **groups}
