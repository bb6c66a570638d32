"""What `restore` carries over besides pixels, as Pillow reads it back from each format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from PIL.ExifTags import GPS, IFD, Base

from tests.conftest import write_regression
from tests.restore_folders import cut, files, levels, restore, save
from tests.shared import shared_path
from training.restore.carried import read_carried

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GRAY = SRGB[:16] + b"GRAY" + SRGB[20:]
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF tiff:Orientation="6" dc:title="Caf\xc3\xa9"/></x:xmpmeta>'
UPRIGHT_XMP = XMP.replace(b'"6"', b'"1"')
SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_regression(tmp_path_factory.mktemp("restorers") / "regression.safetensors")


def exif(orientation: int = 6) -> Image.Exif:
    """What a camera writes, in all its groups."""
    made = Image.Exif()
    made[Base.Orientation], made[Base.Make], made[Base.ImageWidth] = orientation, "Camera", 40
    made.get_ifd(IFD.Exif).update({
        Base.DateTimeOriginal: "2021:03:04 05:06:07", Base.ExposureTime: 0.004, Base.MakerNote: b"\1\2\3 private",
        Base.ExifImageWidth: 40, Base.ExifImageHeight: 24,
    })  # fmt: skip
    made.get_ifd(IFD.GPSInfo).update({GPS.GPSLatitudeRef: "N", GPS.GPSLatitude: (48.0, 51.0, 29.5)})
    return made


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("source", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_exif_profile_and_xmp_are_carried_over_and_say_upright(
    source: str, kind: str, regression: Path, tmp_path: Path
) -> None:
    """The picture is turned, so a reader that turns it once more by EXIF or XMP would turn it wrongly."""
    extras = {"exif": exif(), "icc_profile": SRGB, "xmp": XMP, "dpi": (300, 300)}
    if source == "a.png":
        extras["pnginfo"] = PngImagePlugin.PngInfo()
        extras["pnginfo"].add_itxt("XML:com.adobe.xmp", extras.pop("xmp").decode())
    if source == "a.tif":
        made = extras["exif"]
        made[700], made[IFD.Exif], made[IFD.GPSInfo] = extras.pop("xmp"), *map(made.get_ifd, (IFD.Exif, IFD.GPSInfo))
    save(tmp_path / "in" / source, **extras)
    assert restore(tmp_path / "in", tmp_path / "out", regression, "--format", kind) == 0
    with Image.open(tmp_path / "out" / f"a{SUFFIXES[kind]}") as picture:
        picture.load()
        found, details = picture.getexif(), picture.getexif().get_ifd(IFD.Exif)
        assert picture.size == (24, 40) and picture.mode == "RGB" and picture.format == kind.upper()
        assert found[Base.Orientation] == 1 and found[Base.Make] == "Camera" and Base.ImageWidth not in found
        assert details[Base.DateTimeOriginal] == "2021:03:04 05:06:07" and details[Base.MakerNote] == b"\1\2\3 private"
        assert float(details[Base.ExposureTime]) == pytest.approx(0.004)
        assert (details[Base.ExifImageWidth], details[Base.ExifImageHeight]) == (24, 40)
        place = found.get_ifd(IFD.GPSInfo)
        assert tuple(map(float, place[GPS.GPSLatitude])) == (48.0, 51.0, 29.5)
        assert picture.info["icc_profile"] == SRGB
        xmp = picture.info.get("xmp") or picture.info["XML:com.adobe.xmp"].encode()
        assert xmp == UPRIGHT_XMP
        if kind != "webp" and source != "a.webp":
            assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_no_metadata_means_none(regression: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.jpg", exif=exif(), icc_profile=SRGB, xmp=XMP)
    assert restore(tmp_path / "in", tmp_path / "out", regression, "--no-metadata") == 0
    with Image.open(tmp_path / "out" / "a.png") as picture:
        assert picture.size == (24, 40) and not picture.info and not picture.getexif()


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("source", ["a.png", "a.webp", "palette.png"])
def test_transparency_is_carried_over(source: str, kind: str, regression: Path, tmp_path: Path) -> None:
    picture, alpha = cut().convert("RGBA"), Image.fromarray(np.arange(24 * 40, dtype=np.uint8).reshape(24, 40))
    picture.putalpha(alpha)
    options = {"lossless": True} if source == "a.webp" else {}
    if source == "palette.png":
        picture = cut().convert("P")
        options["transparency"] = int(np.asarray(picture)[5, 5])
        alpha = Image.fromarray(np.where(np.asarray(picture) == options["transparency"], 0, 255).astype(np.uint8))
        assert alpha.getextrema() == (0, 255)
    save(tmp_path / "in" / source, picture, exif=exif(), **options)
    assert restore(tmp_path / "in", tmp_path / "out", regression, "--format", kind) == 0
    found = levels((tmp_path / "out" / source).with_suffix(SUFFIXES[kind]))
    assert found.shape == (40, 24, 4)
    np.testing.assert_array_equal(found[..., 3], np.rot90(np.asarray(alpha), -1))


def test_a_jpeg_says_that_it_has_lost_transparency(regression: Path, tmp_path: Path, capsys) -> None:
    picture = cut().convert("RGBA")
    picture.putalpha(100)
    save(tmp_path / "in" / "a.png", picture)
    assert restore(tmp_path / "in", tmp_path / "out", regression, "--format", "jpeg", "--jpeg-quality", "90") == 0
    assert "without its transparency" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "a.jpg") as found:
        reference = cut()
        reference.save(tmp_path / "90.jpg", quality=90, subsampling=0)
        assert found.quantization == Image.open(tmp_path / "90.jpg").quantization
        assert [component[1:3] for component in found.layer] == [(1, 1)] * 3


def test_webp_and_png_hold_the_same_pixels(regression: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    for name in ("b.png", "b.webp"):
        assert restore(tmp_path / "a.jpg", tmp_path / name, regression) == 0
    np.testing.assert_array_equal(levels(tmp_path / "b.png"), levels(tmp_path / "b.webp"))


@pytest.mark.parametrize(
    ("mode", "profile", "kind", "result"),
    [
        ("L", GRAY, "png", ("L", GRAY)),
        ("L", GRAY, "jpeg", ("L", GRAY)),
        ("L", GRAY, "webp", ("RGB", None)),  # WebP has no gray
        ("L", SRGB, "png", ("RGB", SRGB)),  # a profile of colours says nothing of gray pixels
        ("RGB", GRAY, "png", ("RGB", None)),
        ("RGB", b"no profile", "png", ("RGB", None)),
    ],
)
def test_a_profile_fits_the_pixels_or_is_left_out_with_a_remark(
    mode: str, profile: bytes, kind: str, result: tuple, regression: Path, tmp_path: Path, capsys
) -> None:
    save(tmp_path / "in" / "a.jpg", cut().convert(mode), icc_profile=profile)
    assert restore(tmp_path / "in", tmp_path / "out", regression, "--format", kind) == 0
    with Image.open(tmp_path / "out" / f"a{SUFFIXES[kind]}") as picture:
        assert (picture.mode, picture.info.get("icc_profile")) == result
    assert ("without its ICC profile" in capsys.readouterr().out) == (result[1] is None)


def test_what_a_jpeg_cannot_hold_is_left_out_with_a_remark(regression: Path, tmp_path: Path, capsys) -> None:
    long = exif()
    long.get_ifd(IFD.Exif)[Base.UserComment] = b"x" * 70_000
    save(tmp_path / "in" / "a.png", exif=long)
    assert restore(tmp_path / "in", tmp_path / "out", regression, "--format", "jpeg") == 0
    assert "without its EXIF" in capsys.readouterr().out and not Image.open(tmp_path / "out" / "a.jpg").getexif()


def test_xmp_that_points_into_the_file_is_left_out(regression: Path, tmp_path: Path, capsys) -> None:
    """A gain map or a film behind the picture is not kept, so nothing may say that it is there."""
    save(tmp_path / "in" / "a.jpg", xmp=b'<rdf hdrgm:Version="1.0"/>')
    assert restore(tmp_path / "in", tmp_path / "out", regression) == 0
    assert "without its XMP (hdrgm:" in capsys.readouterr().out
    assert not {"xmp", "XML:com.adobe.xmp"} & Image.open(tmp_path / "out" / "a.png").info.keys()


def test_one_damaged_tag_does_not_cost_the_others() -> None:
    """A file with texts where EXIF has fractions."""
    with Image.open(shared_path("data", "torture", "pil__broken_exif_dpi.jpg")) as picture:
        carried = read_carried(picture, picture.size, gray=False)
    found = Image.Exif()
    found.load(carried.exif)
    assert found[Base.Make] == "NIKON CORPORATION" and Base.XResolution not in found
    assert carried.notes == ("without the damaged EXIF tags 282, 283",)


def test_a_side_that_webp_cannot_hold_is_named_before_the_time_is_spent(
    regression: Path, tmp_path: Path, capsys
) -> None:
    save(tmp_path / "in" / "a.png", Image.new("RGB", (16400, 1)))
    save(tmp_path / "in" / "b.jpg")
    assert restore(tmp_path / "in", tmp_path / "out", regression, "--format", "webp") == 1
    assert files(tmp_path / "out") == ["b.webp"] and "16400x1, and webp holds sides" in capsys.readouterr().err
