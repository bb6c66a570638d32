"""Which pictures `restore` finds, what their results are called, and how ranks share them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.restore_folders import cut, save
from training.restore.plan import make_plan, output_kind, result_names
from training.restore.saving import StaleParts, write_whole


@pytest.mark.parametrize(
    ("names", "results"),
    [
        (["a.jpg", "b.JPG", "no ending", "two.dots.jpeg"], ["a.png", "b.png", "no ending.png", "two.dots.png"]),
        (["a.jpg", "a.png", "b.jpg"], ["a.jpg.png", "a.png.png", "b.png"]),
        (["x/a.jpg", "y/a.jpg"], ["x/a.png", "y/a.png"]),
        (["A.jpg", "a.webp"], ["A.jpg.png", "a.webp.png"]),  # one name on Windows and macOS
        (["a.jpg", "a.jpg.jpg", "a.png"], ["a.jpg.png", "a.jpg.jpg.png", "a.png.png"]),
        (["x.y/a", "x.y/.hidden.jpg"], ["x.y/a.png", "x.y/.hidden.png"]),
    ],
)
def test_results_are_called_as_their_pictures_and_never_share_a_name(names: list[str], results: list[str]) -> None:
    assert result_names(names, ".png") == results
    assert result_names(names[::-1], ".png") == results[::-1]


def test_the_shares_of_ranks_are_all_pictures_once(tmp_path: Path) -> None:
    for number in range(7):
        save(tmp_path / "in" / f"{number}.jpg")
    plan = make_plan(tmp_path / "in", tmp_path / "out", ".png")
    for ranks in (1, 2, 3, 9):
        shares = [plan.share(rank, ranks) for rank in range(ranks)]
        assert sorted(picture.number for share in shares for picture in share) == [1, 2, 3, 4, 5, 6, 7]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_list_does_not_change_while_results_appear(tmp_path: Path) -> None:
    """Ranks that start later, or again, must divide the same list: results in IN's own sub-folder are none of it."""
    for name in ("b.jpg", "a/c.jpg", "d.png"):
        save(tmp_path / "in" / name)
    output = tmp_path / "in" / "out"
    before = make_plan(tmp_path / "in", output, ".png")
    for picture in before.pictures:
        save(picture.target, cut())
    assert make_plan(tmp_path / "in", output, ".png") == before
    assert [picture.name for picture in before.pictures] == ["a/c.jpg", "b.jpg", "d.png"] and before.left_out == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever; a link to a folder could lead in a circle."""
    save(tmp_path / "in" / "a.jpg")
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    plan = make_plan(tmp_path / "in", tmp_path / "out", ".png")
    assert [picture.name for picture in plan.pictures] == ["a.jpg"]


def test_one_file_goes_into_a_folder_or_becomes_a_file(tmp_path: Path) -> None:
    source = save(tmp_path / "a.jpg")
    (tmp_path / "folder.png").mkdir()

    def target(output: str, kind: str | None = None) -> str:
        suffix = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}[output_kind(source, tmp_path / output, kind)]
        (picture,) = make_plan(source, tmp_path / output, suffix).pictures
        return picture.target.relative_to(tmp_path).as_posix()

    assert target("b.png") == "b.png" and target("b.jpeg") == "b.jpeg" and target("new") == "new/a.png"
    assert target("folder.png") == "folder.png/a.png" and target("v1.2", "webp") == "v1.2/a.webp"
    with pytest.raises(ValueError, match=r"expected OUT to end in \.webp"):
        target("b.png", "webp")
    with pytest.raises(ValueError, match="would replace"):
        target("a.jpg")


@pytest.mark.parametrize("name", ["x.tif", "x.TIFF", "x.bmp", "x.gif", "x.heic", "x.avif", "x.jp2", "x.jfif"])
def test_formats_that_are_not_written_are_refused(name: str, tmp_path: Path) -> None:
    """Else x.tif would become a folder; one that is there is a folder, whatever it is called."""
    source = save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=rf"expected OUT to end in \.png.*, or to be a folder, got {name}: "):
        output_kind(source, tmp_path / name, "png")
    (tmp_path / name).mkdir()
    assert output_kind(source, tmp_path / name, None) == output_kind(tmp_path, tmp_path / "new.tif", None) == "png"


def test_places_where_results_would_mix_with_pictures_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.jpg")
    save(tmp_path / "in" / "in" / "b.jpg")
    (tmp_path / "file").write_text("")
    for output, sentence in (
        (tmp_path / "in", "expected OUT to be another folder"),
        (tmp_path / "in" / ".." / "in", "expected OUT to be another folder"),
        (tmp_path / "file", "expected a folder"),
        (tmp_path, "would lie inside of IN"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_plan(tmp_path / "in", output, ".png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no picture in"):
        make_plan(tmp_path / "empty", tmp_path / "out", ".png")


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / f"{'x' * 251}.png"
    write_whole(target, b"whole")
    assert target.read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.skipif(os.name != "posix", reason="there are no such permissions here")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_who_may_read_results_is_as_the_user_has_it_for_all_files(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "a.png", b"whole")
    finally:
        os.umask(before)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == mode


def test_a_failed_writing_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "a.png", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_only_the_parts_of_the_same_file_are_its_own(tmp_path: Path, monkeypatch) -> None:
    import training.restore.saving

    with monkeypatch.context() as patch:
        patch.setattr(training.restore.saving.os, "replace", lambda *_: None)
        write_whole(tmp_path / "a.png", b"1")
        write_whole(tmp_path / "b.png", b"2")
    (tmp_path / "user's own.part").write_text("kept")
    stale = StaleParts()
    (of_a,), (of_b,) = stale.of(tmp_path / "a.png"), stale.of(tmp_path / "b.png")
    assert (of_a.read_bytes(), of_b.read_bytes()) == (b"1", b"2") and not stale.of(tmp_path / "c.png")
    assert not stale.of(tmp_path / "absent" / "a.png")
    write_whole(tmp_path / "a.png", b"whole", [of_a])
    assert not of_a.exists() and of_b.exists() and (tmp_path / "user's own.part").exists()
