"""The public packages that the pictures and words come from, at exact versions."""
from __future__ import annotations

import json
import subprocess
from pathlib import Path

PINNED = {"@iconify-json/noto": "1.2.9", "emojibase-data": "17.0.0"}


def check_packages(folder: Path) -> Path:
    """The folder, if it holds every package at its pinned version."""
    for name, version in PINNED.items():
        manifest = folder / name / "package.json"
        if not manifest.is_file():
            raise SystemExit(f"{name} is missing in {folder}: leave --packages out to have npm install it")
        found = json.loads(manifest.read_text("utf-8"))["version"]
        if found != version:
            raise SystemExit(f"{name} in {folder} is {found}, the build needs {version}")
    return folder


def install_packages(folder: Path) -> Path:
    """Installs the pinned packages below `folder` with npm; none of their scripts is run."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}@{version}" for name, version in PINNED.items()]
    subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), *wanted], check=True)
    return check_packages(folder / "node_modules")
