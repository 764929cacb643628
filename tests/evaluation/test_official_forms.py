"""Official benchmark forms: pictures where the graders look for them, results as the graders write them."""

import json

import pytest
from PIL import Image

from data_tools.progress import Progress
from finetune.errors import BadInput
from finetune.evaluation.compare import Comparison
from finetune.evaluation.official import dpg_bench, geneval, hpsv2
from finetune.evaluation.official.export import export, read_form
from finetune.evaluation.official.imported import HEADLINE, add_to_evaluation, read_table
from finetune.evaluation.subjects import subjects_of

METADATA = [{"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}, {"tag": "colors", "include": [{"class": "car"}], "prompt": "a red car"}]


@pytest.fixture
def geneval_file(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in METADATA))
    return path


def comparison(form, prompts, **settings):
    chosen, wanted = read_form(form, prompts)
    return Comparison(chosen, subjects_of([]), range(wanted), steps=1, guidance=1.0, **settings)


def test_geneval_folders_hold_the_prompts_own_line_and_four_numbered_pictures(base, geneval_file, tmp_path):
    told = export(base, comparison("geneval", geneval_file), "geneval", geneval_file, tmp_path / "out", Progress())
    for index, entry in enumerate(METADATA):
        folder = tmp_path / "out" / "base" / f"{index:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == entry
        assert sorted(path.name for path in (folder / "samples").iterdir()) == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert told["files"] == {"base": 8}
    pixels = [Image.open(tmp_path / "out" / "base" / "00000" / "samples" / f"000{n}.png").tobytes() for n in (0, 1)]
    assert pixels[0] != pixels[1]


def test_dpg_bench_gets_one_grid_a_prompt_in_reading_order(base, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "whoops_1.txt").write_text("a dog on the moon\n")
    export(base, comparison("dpg-bench", tmp_path / "prompts"), "dpg-bench", tmp_path / "prompts", tmp_path / "out", Progress())
    with Image.open(tmp_path / "out" / "base" / "whoops_1.png") as page:
        assert page.size == (128, 128)
    colours = [Image.new("RGB", (2, 2), colour) for colour in ("red", "lime", "blue", "white")]
    page = dpg_bench.grid(colours)
    assert [page.getpixel(place) for place in ((0, 0), (3, 0), (0, 3), (3, 3))] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    with pytest.raises(BadInput):
        dpg_bench.grid(colours[:3])


def test_hpsv2_gets_jpegs_by_style(base, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "anime.json").write_text('["a girl"]')
    (tmp_path / "prompts" / "concept-art.json").write_text('["a castle"]')
    export(base, comparison("hpsv2", tmp_path / "prompts"), "hpsv2", tmp_path / "prompts", tmp_path / "out", Progress())
    for style in ("anime", "concept-art"):
        with Image.open(tmp_path / "out" / "base" / style / "00000.jpg") as picture:
            assert picture.format == "JPEG"


def test_geneval_results_are_the_mean_of_the_tags_not_of_the_pictures(tmp_path):
    rows = [{"tag": "counting", "prompt": f"c{n // 4}", "correct": n % 4 == 0} for n in range(40)]
    rows += [{"tag": "colors", "prompt": f"k{n}", "correct": True} for n in range(8)]
    (tmp_path / "results.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = geneval.read_results(tmp_path / "results.jsonl", "mine")
    assert found.value == pytest.approx((25 + 100) / 2) and found.detail == {"counting": 25, "colors": 100}
    assert found.n == 48 and "18 prompts, a part without single_object" in found.prompts
    assert found.low < found.value < found.high  # all prompts of a tag alike: a width of nothing until unseen ones were counted in


def test_a_geneval_interval_ends_at_100(tmp_path):
    (tmp_path / "results.jsonl").write_text("\n".join(json.dumps({"tag": "colors", "prompt": f"k{n}", "correct": n > 0}) for n in range(5)))
    found = geneval.read_results(tmp_path / "results.jsonl", "mine")
    assert 0 <= found.low < 80 < found.high == 100


def test_dpg_results_count_their_prompts_and_pass_over_the_summary(tmp_path):
    lines = [f"/pictures/item_{n}.png, 1.0, 0.5, 0.5, 1.0, 0.75" for n in range(6)] + ["", "DPG-Bench score: 75.0", "L1 entity: 0.8, 0.7"]
    (tmp_path / "dpg.txt").write_text("\n".join(lines))
    found = dpg_bench.read_results(tmp_path / "dpg.txt", "mine")
    assert found.value == pytest.approx(75) and found.prompts == "6 prompts" and found.n == 24


@pytest.mark.parametrize("factor", [1, 100])
def test_hps_results_are_the_mean_over_styles_in_hundreds(tmp_path, factor):
    rows = ["file,style,score"] + [f"a{n}.jpg,anime,{0.3 * factor}" for n in range(6)] + [f"p{n}.jpg,photo,{0.26 * factor}" for n in range(2)]
    (tmp_path / "hps.csv").write_text("\n".join(rows))
    found = hpsv2.read_results(tmp_path / "hps.csv", "mine")
    assert found.value == pytest.approx(28) and found.detail == pytest.approx({"anime": 30, "photo": 26})
    assert found.low <= 28 <= found.high


BROKEN = [(geneval.read_results, "{}"), (geneval.read_results, ""), (geneval.read_results, "[" * 10_000), (dpg_bench.read_results, "score 3\n"), (hpsv2.read_results, "a,b\n1,2\n"),
          (hpsv2.read_results, "score\nnan\n"), (hpsv2.read_results, "score\n"), (read_table, "{}"), (read_table, "[1]"), (read_table, '[{"model": "m", "benchmark": "b", "value": 1}]'),
          (read_table, '[{"model": "m", "benchmark": "b", "value": true, "source": "s"}]'), (read_table, '[{"model": "m", "benchmark": "b", "value": 1, "source": "s", "x": 1}]'),
          *((read_table, '[{"model": "m", "benchmark": "b", "value": %s, "source": "s"%s}]' % told) for told in (("1" + "0" * 400, ""), ("1", ', "low": NaN'), ("1", ', "high": "2"')))]


@pytest.mark.parametrize("reader, content", BROKEN)
def test_files_that_are_no_results_are_named(tmp_path, reader, content):
    path = tmp_path / "results"
    path.write_text(content)
    with pytest.raises(BadInput) as caught:
        reader(path, *(["mine"] if reader is not read_table else []))
    assert "results" in str(caught.value)


def test_the_headline_row_is_marked_as_not_measured_here():
    assert {row.benchmark: row.value for row in HEADLINE} == {"GenEval": 94.7, "HPSv2.1": 34.7, "DPG-Bench": 72.1, "Alignment": 9.37, "all four": None}
    assert all(row.grader is None and row.seed is None and "not stated" in row.source for row in HEADLINE)


def test_imported_results_join_an_evaluation_and_replace_their_like(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"imported": []}')
    (tmp_path / "table.json").write_text('[{"model": "rival", "benchmark": "GenEval", "value": 66.0, "source": "its paper"}]')
    add_to_evaluation(tmp_path, read_table(tmp_path / "table.json"))
    (tmp_path / "table.json").write_text('[{"model": "rival", "benchmark": "GenEval", "value": 67.0, "source": "its paper"}]')
    told = add_to_evaluation(tmp_path, read_table(tmp_path / "table.json"))
    assert [row["value"] for row in json.loads((tmp_path / "evaluation.json").read_text())["imported"]] == [67.0] == [row["value"] for row in told["imported"]]
    with pytest.raises(BadInput, match="holds no evaluation"):
        add_to_evaluation(tmp_path / "nowhere", [])
