"""Where pictures come from, how much each counts, and how many sizes it is trained at."""

import shutil

import pytest
from PIL import Image, ImageDraw

from data_tools.progress import Progress
from finetune.errors import BadInput, DataError
from finetune.families import registry
from finetune.families.hunyuan_dit import HunyuanDiT
from finetune.families.picture_limits import NO_LIMITS
from finetune.families.protocol import PictureLimits
from finetune.training.preparation import _say_what_was_found
from finetune.training.training_set import build_training_set
from tests.listening import Listening
from tests.training.small_job import small_recipe, write_pictures


def set_of(folder, **changes):
    return build_training_set(small_recipe("base", folder, **changes), HunyuanDiT.facts, Progress())


def counted(training_set):
    return {picture.record.path.parent.name + "/" + picture.record.path.name: (picture.repeats, picture.weight, picture.regularisation) for picture in training_set.pictures}


def test_further_folders_bring_their_repeats_and_weight(tmp_path):
    main, more = write_pictures(tmp_path / "main", 1), write_pictures(tmp_path / "more", 1)
    found = set_of(main, data__also=[{"folder": str(more), "repeats": 3, "weight": 0.5}])
    assert counted(found) == {"main/picture0.png": (1, 1.0, False), "more/picture0.png": (3, 0.5, False)}
    assert [(row["pictures"], row["seen"], row["weight"]) for row in found.folders] == [(1, 1, 1.0), (1, 3, 0.5)]


def test_repeats_of_kohya_folders_are_honoured_and_multiplied(tmp_path):
    write_pictures(tmp_path / "main" / "10_cat", 1)
    write_pictures(tmp_path / "more" / "4_dog", 1)
    found = set_of(tmp_path / "main", data__also=[{"folder": str(tmp_path / "more"), "repeats": 2}])
    assert [picture.repeats for picture in found.pictures] == [10, 8]


def test_a_folder_inside_another_has_the_weight_that_is_named_for_it_and_is_not_trained_twice(tmp_path):
    main, inner = write_pictures(tmp_path / "main", 2), write_pictures(tmp_path / "main" / "details", 1)
    found = set_of(main, data__also=[{"folder": str(inner), "weight": 2.0}])
    assert counted(found) == {"main/picture0.png": (1, 1.0, False), "main/picture1.png": (1, 1.0, False), "details/picture0.png": (1, 2.0, False)}


def test_a_kohya_folder_inside_another_keeps_its_repeats_when_it_is_given_a_weight(tmp_path):
    write_pictures(tmp_path / "main" / "1_dog", 1)
    inner = write_pictures(tmp_path / "main" / "10_cat", 1)
    found = set_of(tmp_path / "main", data__also=[{"folder": str(inner), "weight": 0.5, "repeats": 2}])
    assert counted(found) == {"1_dog/picture0.png": (1, 1.0, False), "10_cat/picture0.png": (20, 0.5, False)}


def test_no_picture_is_given_a_size_that_the_base_has_no_positions_for(tmp_path):
    """AuraFlow would take the positions of other places, and say nothing; HiDream has no room for them."""
    Image.new("RGB", (512, 128)).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("a wide thing")
    recipe, facts = small_recipe("base", tmp_path, data__resolution=128), registry.family("auraflow").facts
    limits = facts.limits({"pos_embed_max_size": 256, "patch_size": 2})
    assert limits == PictureLimits(side=256)

    def sizes(limits):
        return {(bucket.height, bucket.width) for picture in build_training_set(recipe, facts, Progress(), limits=limits).pictures for bucket in [picture.placement.bucket]}

    assert sizes(NO_LIMITS) == {(64, 256)} and sizes(PictureLimits(side=160)) == {(80, 160)}
    with pytest.raises(BadInput, match="64 pixels a side") as refusal:
        sizes(PictureLimits(side=64))
    assert refusal.value.where == "data.resolution"
    limits = registry.family("hidream").facts.limits({"max_resolution": [8, 8]})
    with pytest.raises(BadInput, match="as many pixels as 64x64"):
        sizes(limits)
    Image.new("RGB", (128, 128)).save(tmp_path / "wide.png")
    assert sizes(limits) == {(128, 128)}


def test_regularisation_pictures_come_last_without_the_trigger_and_with_their_weight(tmp_path):
    main, others = write_pictures(tmp_path / "main", 1), write_pictures(tmp_path / "others", 2)
    found = set_of(main, data__regularisation_folder=str(others), data__regularisation_weight=0.25)
    assert counted(found) == {"main/picture0.png": (1, 1.0, False), "others/picture0.png": (1, 0.25, True), "others/picture1.png": (1, 0.25, True)}
    assert found.captions.variants == (("sks, a round thing number 0",), ("a round thing number 0",), ("a round thing number 1",))
    assert [picture.record.path.parent.name for picture in found.own()] == ["main"]


def test_a_reg_folder_among_the_pictures_is_not_taken_for_what_is_to_be_learned(tmp_path):
    write_pictures(tmp_path / "main", 1)
    write_pictures(tmp_path / "main" / "reg", 1)
    found = set_of(tmp_path / "main")
    assert counted(found) == {"main/picture0.png": (1, 1.0, False), "reg/picture0.png": (1, 1.0, True)}


def test_a_folder_without_pictures_is_named(tmp_path):
    main = write_pictures(tmp_path / "main", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no usable picture") as refusal:
        set_of(main, data__regularisation_folder=str(tmp_path / "empty"))
    assert refusal.value.where == str(tmp_path / "empty")
    with pytest.raises(DataError) as refusal:
        set_of(main, data__also=[{"folder": str(tmp_path / "nowhere")}])
    assert str(tmp_path / "nowhere") in refusal.value.where


def test_a_folder_of_regularisation_pictures_alone_is_refused(tmp_path):
    write_pictures(tmp_path / "main" / "reg", 1)
    with pytest.raises(DataError, match="only regularisation pictures"):
        set_of(tmp_path / "main")


def test_several_resolutions_give_a_picture_one_place_each_with_the_same_captions(tmp_path):
    main = write_pictures(tmp_path / "main", 3)
    found = set_of(main, data__resolution=[32, 64], data__caption_shuffle=True)
    squares = [picture for picture in found.pictures if picture.record.width == 64]
    assert [str(picture.placement.bucket) for picture in squares] == ["64x64", "32x32", "64x64", "32x32"]
    assert found.captions.variants[0] == found.captions.variants[1]
    assert len(found.own()) == 3 and sum(own for own, _ in found.sizes().values()) == len(found.pictures)


def test_a_resolution_that_the_base_cannot_have_is_refused(tmp_path):
    folder = write_pictures(tmp_path / "main", 1)
    facts = HunyuanDiT.facts.__class__(**{**vars(HunyuanDiT.facts), "size_multiple": 32})
    with pytest.raises(DataError, match="16 pixels are less"):
        build_training_set(small_recipe("base", folder, data__resolution=[16, 64]), facts, Progress())


def test_masks_count_only_when_they_are_asked_for_and_then_belong_to_the_data(tmp_path):
    main = write_pictures(tmp_path / "main", 2)
    Image.new("L", (64, 64), 255).save(main / "picture0_mask.png")
    plain, masked = set_of(main), set_of(main, data__masked_loss=True)
    assert plain.masked() == 0 and masked.masked() == 1 and plain.data_hash != masked.data_hash
    mask = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(mask).rectangle((0, 0, 9, 9), fill=0)
    mask.save(main / "picture0_mask.png")
    assert set_of(main).data_hash == plain.data_hash
    assert set_of(main, data__masked_loss=True).data_hash != masked.data_hash


def test_the_data_are_the_same_wherever_they_lie(tmp_path):
    main, others = write_pictures(tmp_path / "main", 2), write_pictures(tmp_path / "others", 1)
    shutil.copytree(tmp_path, tmp_path.with_name("elsewhere"))
    here = set_of(main, data__regularisation_folder=str(others))
    there = set_of(tmp_path.with_name("elsewhere") / "main", data__regularisation_folder=str(tmp_path.with_name("elsewhere") / "others"))
    assert here.data_hash == there.data_hash


@pytest.mark.parametrize("changes, said", [
    ({}, None), ({"data__unmasked_weight": 0.5}, "unmasked_weight"), ({"data__unmasked_weight": 0.5, "data__masked_loss": True}, None),
    ({"data__regularisation_weight": 0.5}, "regularisation_weight"), ({"data__regularisation_weight": 0.5, "data__regularisation_folder": "reg"}, None),
])
def test_a_weight_for_what_is_not_there_is_said_to_change_nothing(tmp_path, changes, said):
    progress = Listening()
    if "data__regularisation_folder" in changes:
        changes = changes | {"data__regularisation_folder": str(write_pictures(tmp_path / "reg", 1))}
    recipe = small_recipe("base", write_pictures(tmp_path / "main", 1), **changes)
    _say_what_was_found(build_training_set(recipe, HunyuanDiT.facts, progress), recipe, progress)
    heard = [word for word in ("unmasked_weight", "regularisation_weight") if f"{word} changes nothing: " in "".join(progress.said)]
    assert heard == ([said] if said else [])


def test_held_out_pictures_count_as_the_folder_that_they_lie_in(tmp_path):
    main, details, apart = write_pictures(tmp_path / "main", 2), write_pictures(tmp_path / "details", 3), write_pictures(tmp_path / "apart", 6)
    for number in range(5):
        (apart / f"picture{number}.png").unlink()
    (details / "unseen").mkdir()
    for end in ("png", "txt"):
        (details / f"picture0.{end}").rename(details / "unseen" / f"picture0.{end}")
    also = [{"folder": str(details), "repeats": 3, "weight": 0.25}]

    def held_out(**changes):
        found = set_of(main, data__also=also, **changes)
        return {(picture.record.path.parent.name, picture.repeats, picture.weight) for picture in found.held_out}, found.data_hash

    counted, data_hash = held_out(validation__folder=str(details / "unseen"))
    assert counted == {("unseen", 3, 0.25)}
    assert held_out(validation__folder=str(apart))[0] == {("apart", 1, 1.0)}
    assert {("details", 3, 0.25)} <= held_out(validation__share=0.9)[0]
    also[0]["weight"] = 0.5
    assert held_out(validation__folder=str(details / "unseen"))[1] != data_hash


def test_held_out_pictures_have_the_sizes_that_are_trained_and_are_named_once(tmp_path):
    main = write_pictures(tmp_path / "main", 2)
    held_out = write_pictures(tmp_path / "held out", 6)
    for number in range(3):
        (held_out / f"picture{number}.png").unlink()
    Image.new("RGB", (40, 40), (9, 9, 9)).save(held_out / "small.png")
    (held_out / "small.txt").write_text("small")
    found = set_of(main, data__resolution=[32, 64], validation__folder=str(held_out))
    sizes = {path.name: [str(picture.placement.bucket) for picture in found.held_out if picture.record.path == path] for path in found.held_out_paths()}
    assert sizes["picture3.png"] == ["64x64", "32x32"] and sizes["small.png"] == ["32x32"] and list(sizes) == sorted(sizes)
    assert len(found.held_out_captions) == len(found.held_out) and set(found.sizes()) >= {str(picture.placement.bucket) for picture in found.held_out}
    trained_at_one = set_of(main, data__resolution=64, validation__folder=str(held_out))
    assert len(trained_at_one.held_out) == len(trained_at_one.held_out_paths()) == 4


def test_what_is_odd_about_a_picture_is_said_once_and_kept_for_the_report(tmp_path):
    """A caption that cannot be read or a mask that is broken changes what is learned as much as a picture that is left out."""
    main = write_pictures(tmp_path / "main", 2)
    (main / "picture0.txt").write_bytes(b"caf\xe9")
    (main / "picture1_mask.png").write_bytes(b"no picture")
    inner = write_pictures(main / "inner", 1)
    (inner / "picture0.json").write_text("{broken")
    found = set_of(main, data__missing_caption="file_name", data__masked_loss=True, data__also=[{"folder": str(inner)}])
    assert sum("picture0.txt cannot be read: not UTF-8" in text for text in found.warnings) == 1
    assert sum("picture1.png: the mask cannot be used" in text for text in found.warnings) == 1
    assert sum("picture0.json is not valid JSON" in text for text in found.warnings) == 1
    with pytest.raises(DataError, match=r"picture0.png \(caption file picture0.txt cannot be read: not UTF-8 at byte 3\)"):
        set_of(main)
