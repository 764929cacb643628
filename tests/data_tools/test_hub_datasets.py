"""Data sets by the real `datasets` library: an identifier on the Hub (a server here), a downloaded folder, and what cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from data_tools.scan import scan_folder
from tests.data_tools.hub_stand_in import serving_datasets

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from data_tools.errors import DataError
from data_tools.scan import scan_folder
said = {}
for source in sys.argv[1:]:
    try:
        report = scan_folder(source, workers=1, use_cache=False)
        said[source] = [report.layout, sorted((record.caption or "", record.split, record.width) for record in report.records), len(report.left_out)]
    except DataError as error:
        said[source] = [error.what, error.fix]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A data set as `push_to_hub` leaves it: Parquet files with the pictures inside, a split each."""
    import datasets

    def picture(width: int) -> dict:
        content = BytesIO()
        Image.new("RGB", (width, 40), (width, 80, 20)).save(content, "PNG")
        return {"bytes": content.getvalue(), "path": f"{width}.png"}

    root = tmp_path_factory.mktemp("hub") / "pictures"
    (root / "data").mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"train": {"image": [picture(50), picture(60), {"bytes": b"broken", "path": "x.png"}], "text": ["a fox", "一只猫", "lost"]}, "test": {"image": [picture(70)], "text": ["held"]}}
    for split, columns in rows.items():
        datasets.Dataset.from_dict(columns, features=features).to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


FOUND = [["a fox", "train", 50], ["held", "held_out", 70], ["一只猫", "train", 60]]


def scan_in_a_process(tmp_path: Path, endpoint: str, *sources: str, **more: str) -> dict:
    """The libraries read their endpoint when they are imported."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "BRUSHWORK_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | more
    done = subprocess.run([sys.executable, "-c", PROGRAM, *sources], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_identifier_on_the_hub_is_read_with_captions_and_splits_and_what_cannot_be_had_is_one_line(repository, tmp_path):
    with serving_datasets({"someone/pictures": repository}, gated=frozenset({"someone/locked"})) as endpoint:
        said = scan_in_a_process(tmp_path, endpoint, "someone/pictures", "someone/nothing", "someone/locked")
    assert said["someone/pictures"] == ["datasets", FOUND, 1]
    assert said["someone/nothing"][0] == "there is no such data set, neither here nor on the Hub" and "spelling" in said["someone/nothing"][1]
    assert said["someone/locked"][0] == "its owner asks for consent first" and "hf auth login" in said["someone/locked"][1]


def test_without_a_network_one_line_says_so(tmp_path):
    said = scan_in_a_process(tmp_path, "http://127.0.0.1:9", "someone/pictures", HF_HUB_OFFLINE="1")
    assert said["someone/pictures"][0] == "it is not here, and the Hub cannot be reached" and "network" in said["someone/pictures"][1]


def test_a_downloaded_data_set_is_recognised_as_a_folder(repository, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    report = scan_folder(repository, workers=1, use_cache=False)
    assert report.layout == "datasets" and sorted([r.caption, r.split, r.width] for r in report.records) == FOUND
    assert report.found == 4 and [item.code for item in report.left_out] == ["unidentified"]
