"""Archives, shards and descriptions that are hostile or broken: listed member by member, or one clear error."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from data_tools.errors import DataError
from tests.data_tools.pictures import draw, encoded, half


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../out.png", "/abs.png", "C:/x.png", "a/../../b.png", "x" * 300 + ".png"], ids=["climbs", "absolute", "drive", "climbs inside", "long"])
def test_a_zip_member_with_a_bad_name_is_listed_and_never_written(tmp_path, scan, name):
    source = write_zip(tmp_path / "set.zip", {"good.png": encoded("PNG"), name: encoded("PNG")})
    report = scan(source)
    assert len(report.records) == 1 and len(report.left_out) == 1
    assert not (tmp_path / "out.png").exists() and not Path("/abs.png").exists()


def test_an_encrypted_zip_member_and_a_link_are_listed(tmp_path, scan):
    source = write_zip(tmp_path / "set.zip", {"good.png": encoded("PNG"), "secret.png": encoded("PNG")})
    content = bytearray(source.read_bytes())
    entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    content[entry + 8] |= 1
    source.write_bytes(bytes(content))
    with zipfile.ZipFile(source, "a") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    report = scan(source)
    assert len(report.records) == 1
    assert sorted(item.reason for item in report.left_out) == ["a link inside an archive", "encrypted"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_tar_member_that_is_no_file_is_listed(tmp_path, scan, kind):
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        for name, content in {"0.png": encoded("PNG"), "0.txt": b"a fox"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
        odd = tarfile.TarInfo("1.png")
        odd.type, odd.linkname = kind, "/etc/passwd"
        shard.addfile(odd)
    report = scan(tmp_path / "s.tar")
    assert [record.caption for record in report.records] == ["a fox"] and len(report.left_out) == 1


def test_a_tar_cut_short_keeps_what_was_whole_and_says_so(tmp_path, scan):
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        for i in range(4):
            content = encoded("BMP", draw(seed=i))
            member = tarfile.TarInfo(f"{i}.bmp")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[: 2 * (len(encoded("BMP", draw())) + 1024) + 700])
    report = scan(tmp_path / "s.tar")
    assert report.records and any("cut short" in item.reason for item in report.left_out)


UNUSABLE = {
    "no such folder": lambda root: root / "nowhere",
    "a text file": lambda root: _written(root / "notes.txt", b"hello"),
    "an empty zip": lambda root: _written(root / "a.zip", b""),
    "half a zip": lambda root: _written(root / "a.zip", half(write_zip(root / "b.zip", {"a.png": encoded("PNG")}).read_bytes())),
    "not a tar": lambda root: _written(root / "a.tar", b"x" * 2000),
    "not Parquet": lambda root: _written(root / "a.parquet", b"PAR1nonsense"),
    "not Arrow": lambda root: _written(root / "a.arrow", b"ARROW1nonsense"),
    "broken TOML": lambda root: _written(root / "a.toml", b"[[datasets]\n"),
    "TOML without datasets": lambda root: _written(root / "a.toml", b"x = 1\n"),
    "TOML with a missing folder": lambda root: _written(root / "a.toml", b"[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'gone'\n"),
    "TOML with bad repeats": lambda root: _written(root / "a.toml", b"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '.'\nnum_repeats = 0\n"),
    "broken JSON": lambda root: _written(root / "a.json", b"{"),
    "JSON of nothing known": lambda root: _written(root / "a.json", b'{"a": 1}'),
    "deep JSON": lambda root: _written(root / "a.json", b"[" * 200_000),
    "index without its Arrow file": lambda root: _written(root / "a.json", b'{"arrow_files": ["gone.arrow"], "indices": [0]}'),
    "concepts without a folder": lambda root: _written(root / "a.json", b'[{"path": "gone"}]'),
    "concepts with bad balancing": lambda root: _written(root / "a.json", json.dumps([{"path": ".", "balancing": -3}]).encode()),
    "CSV with zero bytes": lambda root: _written(root / "a.csv", b"file_name,text\n\x00"),
    "latin-1 CSV": lambda root: _written(root / "a.csv", "file_name,text\na.png,café".encode("latin-1")),
}


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_source_that_cannot_be_read_at_all_is_one_clear_error(tmp_path, scan, case):
    with pytest.raises(DataError) as caught:
        scan(UNUSABLE[case](tmp_path))
    assert caught.value.what and caught.value.exit_code == 2 and "\n" not in caught.value.what


def test_a_csv_row_whose_caption_is_not_in_quotes_is_listed(tmp_path, scan):
    """Cut at its first comma it would be trained as another caption. A comma too many at the end, as spreadsheets write it, harms nothing."""
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(encoded("PNG"))
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,a red cat, on a mat\nb.png,"a cat, asleep"\nc.png,a dog,\n')
    report = scan(tmp_path)
    assert {record.path.name: record.caption for record in report.records} == {"a.png": None, "b.png": "a cat, asleep", "c.png": "a dog"}
    assert ["quotes" in left.reason for left in report.left_out] == [True]


def test_half_a_character_in_a_row_is_no_part_of_the_caption(tmp_path, scan):
    r"""JSON can hold "\ud83d" alone; a text encoder that gets it raises an error."""
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a \\ud83d cat \\ud83d\\udc08"}\n')
    assert [record.caption for record in scan(tmp_path).records] == ["a cat 🐈"]
