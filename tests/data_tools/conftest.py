"""Small real pictures for the tests of the data tools, and a result cache of their own."""

from __future__ import annotations

import pytest

from tests.data_tools.pictures import save


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BRUSHWORK_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    """Five pictures with captions beside them."""
    root = tmp_path / "set"
    for i in range(5):
        save(root / f"{i:03d}.png", 40 + 8 * i, 48, seed=i)
        (root / f"{i:03d}.txt").write_text(f"brndx, a shape number {i}, on paper\n")
    return root


@pytest.fixture
def scan(tmp_path):
    """Scan with one worker and a cache of its own."""
    from data_tools.scan import scan_folder

    return lambda source, **options: scan_folder(source, **{"workers": 1} | options)
