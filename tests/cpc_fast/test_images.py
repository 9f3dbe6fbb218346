"""What is on disk, as arrays; and one clear sentence for each thing that cannot be."""

import os
import signal
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from cpc_fast import images
from cpc_fast.errors import CpcFastError, UsageError
from cpc_fast.images import (
    ImageCache,
    ImageError,
    find_images,
    find_test,
    find_train,
    read_image,
    read_mask,
    resize,
    shorter_sides,
)

TILES = Path(__file__).parents[2].parent / "shared" / "data" / "magnetic_tile"


def ramp(height=24, width=32, channels=1) -> np.ndarray:
    values = np.arange(height * width * channels, dtype=np.uint32) * 7 % 251
    return values.astype(np.uint8).reshape(height, width, channels)


def save(path: Path, pixels: np.ndarray | None = None, **options) -> Path:
    pixels = ramp() if pixels is None else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels if pixels.ndim == 2 or pixels.shape[2] > 1 else pixels[..., 0]).save(path, **options)
    return path


def png(width: int, height: int, *, depth: int = 8, colour: int = 0, data: bytes = bytes(1000)) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# Reading


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "PNG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_come_back_as_they_were(tmp_path, suffix, channels):
    path = save(tmp_path / f"x.{suffix}", ramp(channels=channels))
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, ramp(channels=channels))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_lose_their_low_byte(tmp_path, suffix):
    values = (np.arange(24 * 32, dtype=np.uint32) * 85).astype(np.uint16).reshape(24, 32)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"x.{suffix}")[..., 0], values >> 8)


def test_16_bit_colour(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (24, 32, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif"), values >> 8)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    (tmp_path / "x.png").write_bytes(png(32, 24, depth=16, colour=2, data=rows))
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), values >> 8)
    tifffile.imwrite(tmp_path / "x.tif", values.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    refused(tmp_path / "x.tif", "save it interleaved")


def test_where_zero_is_white(tmp_path):
    for values in (ramp()[..., 0], ramp()[..., 0].astype(np.uint16) * 257):
        tifffile.imwrite(tmp_path / "x.tif", values, photometric="miniswhite")
        np.testing.assert_array_equal(read_image(tmp_path / "x.tif"), 255 - ramp())
    values = ramp()[..., 0].astype(np.uint16) << 4
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif", depth=12), 255 - ramp())
    tifffile.imwrite(tmp_path / "x.tif", values + np.uint16(4096), photometric="miniswhite")
    refused(tmp_path / "x.tif", "holds values above 4095", read=lambda path: read_image(path, depth=12))


def test_palette_alpha_one_bit_and_cmyk(tmp_path):
    colour = Image.fromarray(ramp(channels=3))
    colour.quantize(64).save(tmp_path / "palette.png")
    expected = np.asarray(colour.quantize(64).convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), expected)

    colour.quantize(64).save(tmp_path / "transparent.png", transparency=bytes(range(64)))
    np.testing.assert_array_equal(read_image(tmp_path / "transparent.png"), expected)

    alpha = np.dstack([ramp(channels=3), np.zeros((24, 32), np.uint8)])
    save(tmp_path / "alpha.png", alpha)
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), ramp(channels=3))

    Image.fromarray(np.dstack([ramp()[..., 0], np.full((24, 32), 9, np.uint8)]), "LA").save(tmp_path / "grey_alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey_alpha.png"), ramp())

    Image.fromarray(ramp()[..., 0] > 99).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png"), (ramp() > 99) * np.uint8(255))

    colour.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert read_image(tmp_path / "cmyk.tif").shape == (24, 32, 3)
    assert np.abs(read_image(tmp_path / "cmyk.tif").astype(int) - ramp(channels=3)).max() <= 1


def test_cmyk_as_cameras_and_as_print_shops_write_it(tmp_path):
    """A JPEG of Photoshop stores its inks inverted and says so in an Adobe marker, as Pillow's own does."""
    smooth = np.repeat(np.linspace(40, 200, 24 * 32).reshape(24, 32, 1), 3, 2).astype(np.uint8)
    path = tmp_path / "x.jpg"
    Image.fromarray(smooth).convert("CMYK").save(path, quality=95)
    assert b"Adobe" in path.read_bytes()
    assert np.abs(read_image(path).astype(int) - smooth).max() <= 6


@pytest.mark.parametrize("size", [(0, 0), (0, 24), (24, 0)])
def test_no_pixels_at_all(tmp_path, size):
    (tmp_path / "x.png").write_bytes(png(*size))
    refused(tmp_path / "x.png")
    (tmp_path / "x.pgm").write_bytes(b"P5 %d %d 255\n" % size)
    refused(tmp_path / "x.pgm")


def test_an_image_in_memory_is_read_like_a_file(tmp_path):
    data = save(tmp_path / "x.png").read_bytes()
    np.testing.assert_array_equal(read_image("there.png", data), ramp())
    for bad, words in ((b"", "'there.png' is empty"), (b"no", "'there.png' is not an image"), (data[:90], "cut short")):
        with pytest.raises(ImageError, match=words):
            read_image("there.png", bad)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("kind", ["grey", "16 bits", "colour"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = ramp(channels=3 if kind == "colour" else 1)
    stored = pixels[..., 0].astype(np.uint16) * 256 if kind == "16 bits" else pixels
    path = save(tmp_path / f"x.{suffix}", stored, exif=exif)
    upright = Image.fromarray(pixels.squeeze())
    upright.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(upright))
    np.testing.assert_array_equal(read_image(path).squeeze(), expected)
    assert read_image(path).shape[:2] == ((24, 32) if orientation < 5 else (32, 24))


def test_all_that_are_no_use_are_named_at_once(tmp_path):
    paths = [save(tmp_path / f"{i:02}.png", ramp(8, 9)) for i in range(14)]
    ways = (lambda: shorter_sides(paths, None), lambda: ImageCache(paths, size=8, channels=1).shapes())
    assert [len(way()) for way in ways] == [14, 14]
    paths[0].write_text("no image")
    paths[3].write_bytes(b"")
    for way in ways:
        with pytest.raises(ImageError, match=r"00\.png' is not an image.* No use either, of 14 images: '.*03\.png'\.$"):
            way()
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"09\.png' and 4 more\.$"):
        shorter_sides(paths, None)


def test_broken_exif_does_not_matter(tmp_path):
    path = save(tmp_path / "x.png", ramp(), exif=b"Exif\0\0MM\0*garbage and no more")
    np.testing.assert_array_equal(read_image(path), ramp())


# Refusing: each with the path and something to do


def refused(path, *parts: str, read=read_image) -> str:
    with pytest.raises(ImageError) as caught:
        read(path)
    message = str(caught.value)
    assert repr(str(path)) in message
    assert "\n" not in message
    message.encode("utf-8")  # can be printed anywhere
    for part in parts:
        assert part in message
    return message


def test_damaged_files(tmp_path):
    path = save(tmp_path / "x.png", ramp(64, 64))
    data = path.read_bytes()
    for keep in (60, len(data) // 2, len(data) - 30):
        path.write_bytes(data[:keep])
        refused(path, "damaged or cut short", "copy it again")
    path.write_bytes(data[:60] + bytes(40) + data[100:])
    refused(path, "damaged or cut short")
    path.write_bytes(b"")
    refused(path, "empty (0 bytes)", "copy it again, or remove it")
    path.write_text("These are not pixels.\n")
    refused(path, "not an image in a known format", "convert or remove it")
    jpeg = save(tmp_path / "x.jpg", ramp(64, 64, 3))
    jpeg.write_bytes(jpeg.read_bytes()[:700])
    refused(jpeg, "damaged or cut short")


def test_every_cut_and_flipped_byte_is_an_image_or_a_clear_error(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "tif", "gif", "bmp", "webp", "pgm"):
        path = save(tmp_path / f"x.{suffix}", ramp(16, 16))
        data = path.read_bytes()
        for _ in range(40):
            broken = bytearray(data[: rng.integers(1, len(data) + 1)])
            for at in rng.integers(len(broken), size=3):
                broken[at] = rng.integers(256)
            path.write_bytes(broken)
            try:
                assert read_image(path).dtype == np.uint8
            except ImageError as error:
                assert repr(str(path)) in str(error)  # noqa: PT017 (either outcome is right)


def test_no_program_is_started_for_a_disguised_file(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\nshowpage\n%%EOF\n")
    refused(path, "not an image in a known format")


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_too_small(tmp_path, size):
    refused(save(tmp_path / "x.png", ramp(*size)), f"{size[0]} x {size[1]} px", "at least 8 x 8")


def test_more_than_one_frame(tmp_path):
    frames = [Image.fromarray(ramp()[..., 0]), Image.fromarray(255 - ramp()[..., 0])]
    for suffix in ("gif", "png", "tif", "webp"):
        frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
        refused(tmp_path / f"x.{suffix}", "holds 2 frames", "save the one that matters")


def test_a_camera_picture_with_a_thumbnail_is_one_picture(tmp_path):
    frames = [Image.fromarray(ramp(64, 64, 3)), Image.fromarray(ramp(16, 16, 3))]
    frames[0].save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.jpg").shape == (64, 64, 3)


@pytest.mark.parametrize("side", [9000, 9700, 60000])  # below, above, and at twice what Pillow itself lets pass
def test_decompression_bomb(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side))
    refused(path, "67,108,864", "scale it down")


def test_values_that_do_not_fit(tmp_path):
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(tmp_path / "f.tif")
    refused(tmp_path / "f.tif", "floating-point", "8 or 16 bits")
    Image.fromarray(np.full((16, 16), 1 << 20, np.int32)).save(tmp_path / "i.tif")
    refused(tmp_path / "i.tif", "1048576", "8 or 16 bits")
    for dtype in (np.int32, np.uint32):  # small values do not make them 16 bits: their high byte says nothing
        tifffile.imwrite(tmp_path / "i.tif", np.arange(1024, dtype=dtype).reshape(32, 32))
        refused(tmp_path / "i.tif", "32 bits, from 0 to 1023", "8 or 16 bits")
    tifffile.imwrite(tmp_path / "i.tif", np.full((16, 16), -1, np.int16))
    refused(tmp_path / "i.tif", "16 bits, from -1 to -1", "from 0 on")
    tifffile.imwrite(tmp_path / "i.tif", np.full((16, 16), 513, np.int16))
    assert (read_image(tmp_path / "i.tif") == 2).all()


def test_things_that_are_not_files(tmp_path):
    (tmp_path / "folder.png").mkdir()
    refused(tmp_path / "folder.png", "is a folder", "rename or remove")
    refused(tmp_path, "is a folder; name the images in it")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    refused(tmp_path / "loop.png", "circle of links")
    refused(tmp_path / "nothing.png", "check the path")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "not a regular file")


def test_a_process_forked_while_an_image_is_read_reads_too(tmp_path):
    path = save(tmp_path / "x.png")
    with images._quiet:
        if (child := os.fork()) == 0:
            signal.alarm(20)
            os._exit(read_image(path).shape[2])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_channels_come_last():
    with pytest.raises(UsageError, match=r"Got an array of uint8 \(3, 48, 48\)\. Channels come last: image\.transpose"):
        images.check_pixels(np.zeros((3, 48, 48), np.uint8))


def test_no_right_to_read(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png")
    if os.geteuid() == 0:  # root may read anything

        def denied(*_, **__):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Image, "open", denied)
    else:
        path.chmod(0)
    refused(path, "Permission denied", "give yourself the right")


@pytest.mark.parametrize("name", [b"line\nbreak.png", b"not \xff utf-8.png", "Ziegel 砖.png".encode()])
def test_odd_names(tmp_path, name):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/train/good/" + name))
    save(path)
    assert find_train(tmp_path) == [path]
    np.testing.assert_array_equal(read_image(path), ramp())
    path.write_bytes(b"")
    refused(path, "empty")


# Masks


def test_mask_is_true_from_half_range_on(tmp_path):
    values = np.array([[0, 127, 128, 255]] * 2, np.uint8)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "m.png", values), (2, 4)), values >= 128)
    deep = np.array([[0, 32767, 32768, 65535]] * 2, np.uint16)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "m.png", deep), (2, 4)), values >= 128)
    red = np.zeros((2, 4, 3), np.uint8)
    red[0, 1, 0] = 255
    assert read_mask(save(tmp_path / "m.png", red), (2, 4)).sum() == 1
    Image.fromarray(values >= 128).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", (2, 4)).sum() == 4
    assert read_mask(save(tmp_path / "m.png", values * 0), (2, 4)).sum() == 0


def test_mask_of_another_size(tmp_path):
    path = save(tmp_path / "m.png", ramp(20, 30))
    refused(path, "20 x 30", "30 x 20", "size of the image", read=lambda p: read_mask(p, (30, 20)))


def test_mask_of_labels(tmp_path):
    path = save(tmp_path / "m.png", np.eye(16, dtype=np.uint8))
    refused(path, "up to 1 of 255", "255 for defective", read=lambda p: read_mask(p, (16, 16)))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_of_16_bits_is_judged_by_all_of_them(tmp_path, suffix, value):
    values = np.eye(16, dtype=np.uint16) * value
    path = save(tmp_path / f"m.{suffix}", values)
    refused(path, f"up to {value} of 65535", "8 bits", "255 for defective", read=lambda p: read_mask(p, (16, 16)))
    np.testing.assert_array_equal(read_mask(path, (16, 16), labels=True), values > 0)


# Finding


def test_mvtec_layout(tmp_path):
    for name in ("train/good/001", "train/good/000", "test/good/000", "test/bent/000", "test/bent/001", "test/odd/0"):
        save(tmp_path / f"{name}.png")
    save(tmp_path / "train/good/.hidden.png")
    (tmp_path / "train/good/notes.txt").write_text("")
    for i in range(2):
        save(tmp_path / f"ground_truth/bent/00{i}_mask.png")
    assert [path.name for path in find_train(tmp_path)] == ["000.png", "001.png"]
    found = find_test(str(tmp_path))
    assert [(t.defect, t.path.name, t.mask_path and t.mask_path.name) for t in found] == [
        ("bent", "000.png", "000_mask.png"),
        ("bent", "001.png", "001_mask.png"),
        ("good", "000.png", None),
        ("odd", "0.png", None),
    ]
    (tmp_path / "ground_truth/bent/001_mask.png").unlink()
    with pytest.raises(UsageError, match=r"bent/001\.png' has no mask: expected .*001_mask\.png"):
        find_test(tmp_path)


def test_flat_folder_is_enough_to_fit(tmp_path):
    paths = [save(tmp_path / name) for name in ("b.png", "a.jpg")]
    assert find_train(tmp_path) == paths[::-1]
    with pytest.raises(UsageError, match="has no folder test"):
        find_test(tmp_path)


def test_only_test_and_ground_truth(tmp_path):
    save(tmp_path / "test/bad/0.png")
    save(tmp_path / "ground_truth/bad/0_mask.png")
    assert find_test(tmp_path)[0].mask_path == tmp_path / "ground_truth/bad/0_mask.png"
    with pytest.raises(UsageError, match="has test but no train/good"):
        find_train(tmp_path)


def test_folders_that_cannot_serve(tmp_path):
    with pytest.raises(UsageError, match="holds no images"):
        find_train(tmp_path)
    for find in (find_train, find_test, find_images):
        with pytest.raises(UsageError, match="There is no folder"):
            find(tmp_path / "nowhere")
        with pytest.raises(UsageError, match="is a file"):
            find(save(tmp_path / "aside" / "x.png"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="Cannot list"):
        find_train(tmp_path / "loop")
    (tmp_path / "set/brick/train/good").mkdir(parents=True)
    with pytest.raises(UsageError, match="'brick'; name one of them"):
        find_train(tmp_path / "set")
    with pytest.raises(UsageError, match="good' holds no images"):
        find_train(tmp_path / "set/brick")
    (tmp_path / "set/brick/train/good").rmdir()
    with pytest.raises(UsageError, match="has no folder good"):
        find_train(tmp_path / "set/brick")
    (tmp_path / "set/brick/test/good").mkdir(parents=True)
    with pytest.raises(UsageError, match="test' holds no images"):
        find_test(tmp_path / "set/brick")


# Scaling and caching


def test_resize_averages_and_keeps_the_shape():
    board = (np.indices((256, 128)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    small = resize(board, 32)
    assert small.shape == (64, 32, 1)
    assert np.abs(small[2:-2, 2:-2].astype(int) - 127).max() <= 2
    assert resize(ramp(24, 33, 3), 48).shape == (48, 66, 3)
    with pytest.raises(ImageError, match="Choose a smaller size"):
        resize(np.zeros((8, 40000, 1), np.uint8), 1024)


def test_cache_decodes_once(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"{i}.png", ramp(40 + i, 64, 3)) for i in range(4)]
    calls = []
    monkeypatch.setattr(images, "read_image", lambda path, **_: calls.append(path) or read_image(path))
    cache = ImageCache(paths, size=None, channels=3)
    assert len(cache) == 4
    for _ in range(2):
        for i in range(4):
            np.testing.assert_array_equal(cache[i], ramp(40 + i, 64, 3))
    assert cache[-1].shape == (43, 64, 3)
    assert len(calls) == 4
    assert not cache[0].flags.writeable
    with pytest.raises(IndexError):
        cache[4]


def test_cache_scales_and_converts(tmp_path):
    grey, colour = save(tmp_path / "g.png", ramp(40, 64)), save(tmp_path / "c.png", ramp(64, 40, 3))
    cache = ImageCache([grey, colour], size=20, channels=1)
    assert (cache[0].shape, cache[1].shape) == ((20, 32, 1), (32, 20, 1))
    cache = ImageCache([grey, colour], size=None, channels=3)
    np.testing.assert_array_equal(cache[0], ramp(40, 64).repeat(3, 2))
    np.testing.assert_array_equal(cache[1], ramp(64, 40, 3))
    for options in ({"size": None, "channels": 2}, {"size": 4, "channels": 1}):
        with pytest.raises(UsageError, match="Got"):
            ImageCache([grey], **options)


def test_cache_spills_to_disk(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"{i}.png", ramp(32 + i, 32)) for i in range(6)]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = ImageCache(paths, size=None, channels=1, memory=2500)  # room for two
    for _ in range(2):
        for i in range(6):
            np.testing.assert_array_equal(cache[i], ramp(32 + i, 32))
            assert not cache[i].flags.writeable
    assert cache._held_bytes <= 2500
    assert sorted(tmp_path.iterdir()) == paths  # the file has no name


def test_cache_says_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CpcFastError, match="No space left on device; free some space"):
        ImageCache([save(tmp_path / "x.png")], size=None, channels=1, memory=0)[0]


def test_cache_names_the_bad_image(tmp_path):
    (tmp_path / "x.png").write_text("no")
    refused(tmp_path / "x.png", read=lambda path: ImageCache([path], size=None, channels=1)[0])
    refused(save(tmp_path / "x.png", ramp(8, 9000)), read=lambda path: ImageCache([path], size=512, channels=1)[0])


@pytest.mark.skipif(not TILES.is_dir(), reason="the magnetic tiles are not beside this checkout")
def test_magnetic_tiles():
    assert len(find_train(TILES)) == 400
    found = find_test(TILES)
    assert len(found) == 407
    assert {t.defect for t in found if t.mask_path is None} == {"good"}
    for test in found[::40]:
        image = read_image(test.path)
        assert image.shape[2] == 1
        if test.mask_path:
            assert 0 < read_mask(test.mask_path, image.shape[:2]).mean() < 0.9
