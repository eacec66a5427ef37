"""One image file -> pixels: every odd kind of file a folder may hold."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lehr.data import read_image
from lehr.data.images import UnreadableError, read_picture
from lehr.errors import DataError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def picture(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    made = read_picture(path)
    return np.asarray(made.image), made.done


def photo(size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth colour picture that differs in all four corners."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def refused(path: Path) -> UnreadableError:
    with pytest.raises(UnreadableError) as caught:
        read_picture(path)
    return caught.value


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_plain_grey_and_rgb_need_no_word(tmp_path: Path, mode: str) -> None:
    """A plain grey or RGB image comes out as it is, with nothing noted."""
    original = photo().convert(mode)
    original.save(tmp_path / "a.png")
    values, done = picture(tmp_path / "a.png")
    np.testing.assert_array_equal(values, np.asarray(original))
    assert done == ()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    """What is transparent becomes white, what is opaque stays, and half is half."""
    levels = [0, 128, 255]
    image = Image.new(mode, (3, 1))
    for x, alpha in enumerate(levels):
        image.putpixel((x, 0), (0, 0, 0, alpha) if mode == "RGBA" else (0, alpha))
    image.save(tmp_path / "a.png")
    values, done = picture(tmp_path / "a.png")
    assert values.reshape(3, -1)[:, 0].tolist() == [255, 127, 0]
    assert done == ("transparency, laid on white",)
    assert read_image(tmp_path / "a.png", 3).mode == "RGB"


def test_a_palette_with_a_transparent_colour_is_laid_on_white(tmp_path: Path) -> None:
    """The transparent colour of a palette becomes white, whatever colour stands behind it."""
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    values, done = picture(tmp_path / "a.png")
    assert values[0].tolist() == [list(RED), list(WHITE)]
    assert done == ("transparency, laid on white",)


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    """A palette image is read as the colours it shows, not as its indices."""
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    values, done = picture(tmp_path / "a.png")
    assert values[0].tolist() == [list(RED), [0, 255, 0]]
    assert done == ("palette, converted to RGB",)


def test_cmyk_jpegs_look_as_they_should(tmp_path: Path) -> None:
    """A CMYK JPEG comes out as the RGB picture it was made from, not inverted."""
    photo().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    values, done = picture(tmp_path / "a.jpg")
    assert np.abs(values.astype(int) - np.asarray(photo())).mean() < 4
    assert done == ("CMYK, converted to RGB",)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_images_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    """16 bits a pixel keep their whole range: 65535 is white, half of it is middle grey, 257 is one level."""
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    levels, done = picture(tmp_path / f"a{suffix}")
    assert levels.tolist() == [[0, 1, 128, 255]]
    assert done == ("16-bit, scaled to 8 bits",)


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.2, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-100000, 0, 100000]], np.int32), [0, 128, 255]),
    ],
)
def test_wide_numbers_keep_their_range(tmp_path: Path, values: np.ndarray, levels: list[int]) -> None:
    """Modes I and F are brought to 8 bits by the range they have, and it is noted."""
    Image.fromarray(values).save(tmp_path / "a.tif")
    found, done = picture(tmp_path / "a.tif")
    assert np.abs(found[0].astype(int) - levels).max() <= 1
    assert len(done) == 1


def test_an_image_of_nan_is_refused(tmp_path: Path) -> None:
    """A floating-point image with NaN in it is an error, not a black picture."""
    Image.fromarray(np.array([[np.nan, 1.0]], np.float32)).save(tmp_path / "a.tif")
    assert "not finite" in refused(tmp_path / "a.tif").what


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    """All eight EXIF orientations come out upright."""
    upright = photo((32, 16))
    undo = {
        2: 0,
        3: 1,
        4: 0,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # Pillow's transpose that puts the upright picture that way
    turns = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
    }
    turns[8] = "ROTATE_270"
    stored = upright.transpose(Image.Transpose[turns[orientation]]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    values, done = picture(tmp_path / "a.jpg")
    assert values.shape == (16, 32, 3)
    assert np.abs(values.astype(int) - np.asarray(upright)).mean() < 6
    assert done == (() if orientation == 1 else ("EXIF rotation, applied",))


@pytest.mark.parametrize("cut", [7, 12, 20, 28])
def test_damaged_exif_is_no_reason_to_refuse_or_to_warn(tmp_path: Path, cut: int) -> None:
    """A JPEG whose EXIF block is cut short is still a good picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(tmp_path / "a.jpg", exif=exif.tobytes()[:cut])
    assert picture(tmp_path / "a.jpg")[0].shape[-1] == 3


def test_the_first_of_several_frames_is_taken(tmp_path: Path) -> None:
    """An animated GIF is its first frame."""
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    values, done = picture(tmp_path / "a.gif")
    assert values[0, 0].tolist() == list(RED)
    assert "several frames, the first used" in done


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.data"])
def test_a_wrong_or_missing_suffix_does_not_matter(tmp_path: Path, name: str) -> None:
    """A PNG called .jpg, or called nothing, is used, and it is noted."""
    photo().save(tmp_path / name, format="PNG")
    values, done = picture(tmp_path / name)
    np.testing.assert_array_equal(values, np.asarray(photo()))
    assert len(done) == 1
    assert done[0].startswith("PNG image named")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_images_are_found(tmp_path: Path, form: str, share: float) -> None:
    """A file cut short is refused, in every common format."""
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole, format=form)
    path = tmp_path / f"a.{form.lower()}"
    path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * share)])
    assert refused(path).image
    with pytest.raises(DataError, match=path.name):
        read_image(path)


@pytest.mark.parametrize(
    ("name", "content", "what", "image"),
    [
        ("a.jpg", b"", "empty file", True),
        ("a.jpg", b"<html>not found</html>", "its content is text", True),
        ("a.jpg", bytes(range(200)), "not an image of a known format", True),
        ("a.txt", b"labels", "its content is text", False),
        ("a.db", bytes(range(200)), "not an image of a known format", False),
        ("a.jpg", b"\0\0\0\x18ftypheic" + bytes(50), "a format that is not read (HEIC", True),
        ("a.heic", bytes(100), "not an image of a known format", True),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "its content is text", True),
        ("a.nef", b"II*\0" + bytes(100), "camera raw", True),
    ],
)
def test_what_is_no_image_is_refused_in_words_that_help(
    tmp_path: Path, name: str, content: bytes, what: str, image: bool
) -> None:
    """Each kind of non-image has its own reason, and says whether it was meant to be an image."""
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path / name)
    assert what in str(error)
    assert error.image is image


def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More pixels than Pillow's limit are refused, whether or not warnings are errors."""
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    for limit in (9_000, 4_000):  # where Pillow warns, and where it refuses by itself
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert "decompression bomb" in refused(tmp_path / "a.png").what
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert "decompression bomb" in refused(tmp_path / "a.png").what


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A permission that is missing is named as the reason."""

    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    photo().save(tmp_path / "a.png")
    monkeypatch.setattr("lehr.data.images.open_file", closed)
    assert "permission denied" in refused(tmp_path / "a.png").what


def test_read_image_gives_the_channels_asked_for(tmp_path: Path) -> None:
    """1 channel is grey and 3 are RGB, whatever the file holds; a missing file is a DataError."""
    photo().save(tmp_path / "a.png")
    photo().convert("L").save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert read_image(tmp_path / name, 1).mode == "L"
        assert read_image(tmp_path / name, 3).mode == "RGB"
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "c.png")
