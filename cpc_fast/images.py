"""Images from disk: found, read, checked, cached.

    path -> uint8 (H, W, C), C = 1 (grey) or 3 (RGB)          path of a mask -> bool (H, W)

One file, though it is long: what can be wrong with an image, and what is said about it, should be found in one place.
A folder of the wrong shape is a UsageError, a file that cannot serve is an ImageError; both name the path and say what
to do.
"""

import errno
import hashlib
import io
import os
import stat
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from cpc_fast.errors import CpcFastError, ImageError, UsageError

SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
UNREAD = (".arw", ".avif", ".cr2", ".cr3", ".dng", ".exr", ".heic", ".heif", ".jxl", ".nef", ".raw")  # images, too
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")  # none that starts another program
MAX_PIXELS = 1 << 26  # 67 million: 8192 x 8192. Pillow's own warning comes later, at 89 million.
MIN_SIDE = 8  # no patch fits into less

T = TypeVar("T")

_quiet = threading.Lock()  # warnings.catch_warnings edits process-wide state


def _renew() -> None:
    """In a forked process nobody is left to release a lock that another thread held."""
    global _quiet
    _quiet = threading.Lock()


os.register_at_fork(after_in_child=_renew)


@dataclass(frozen=True)
class TestImage:
    """An image to judge: `defect` is "good" when it is normal; `mask_path` is None without a mask, always for good.

    A mask may be a folder of several, one for each region. With `labels`, any value of a mask but 0 is defective.
    """

    __test__ = False  # not a test case, whatever pytest makes of the name

    path: Path
    defect: str
    mask_path: Path | None
    labels: bool = False


def quoted(path: str | os.PathLike) -> str:
    """A path fit for one line of a message: newlines and bytes that are not UTF-8 are escaped."""
    return repr(os.fspath(path))


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """What is raised about an image inside names its path, in front where the message does not.

    >>> with naming("one.png"):
    ...     raise CpcFastError("It is too small.")
    Traceback (most recent call last):
        ...
    cpc_fast.errors.CpcFastError: 'one.png': It is too small.
    """
    try:
        yield
    except CpcFastError as error:
        if quoted(path) in str(error):
            raise
        raise type(error)(f"{quoted(path)}: {error}") from None


def described(value: object) -> str:
    """What somebody gave for an image, in few words.

    >>> described("one.png"), described(np.zeros((2, 3)))
    ("'one.png'", 'an array of float64 (2, 3)')
    """
    if isinstance(value, (str, os.PathLike)):
        return quoted(value)
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None or shape is None:
        return type(value).__name__
    return f"{'an array' if isinstance(value, np.ndarray) else 'a tensor'} of {dtype} {tuple(shape)}"


def is_one_image(value: object) -> bool:
    """Whether this is no list of images: a path, a tensor, or an array that is one image.

    >>> is_one_image("one.png"), is_one_image(np.zeros((32, 32, 1))), is_one_image(np.zeros((5, 32, 32, 1)))
    (True, True, False)
    >>> is_one_image(np.array(["one.png", "two.png"]))
    False
    """
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OSU":  # not an array of paths
        return value.ndim < 3 or (value.ndim == 3 and value.shape[2] in (1, 3))
    return isinstance(value, (str, os.PathLike)) or type(value).__module__ == "torch"


def check_pixels(image: object) -> None:
    """Raises UsageError for anything but uint8 (h, w), (h, w, 1) or (h, w, 3), saying how it becomes that."""
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))):
            return
        advice = ' Of values in 0 to 1: (255 * image).round().astype("uint8").' if image.dtype.kind == "f" else ""
        if image.dtype == np.uint16:
            advice = (
                ' Of 16 bits: (image >> 8).astype("uint8"), of fewer in 16: (image >> (depth - 8)).astype("uint8").'
            )
        if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
            advice += " Channels come last: image.transpose(1, 2, 0)."
    elif isinstance(image, (str, os.PathLike)):
        advice = " Read it first: cpc_fast.images.read_image(path)."
    elif isinstance(image, Image.Image):
        plain = image.mode in ("L", "RGB", "F") or image.mode.startswith("I")
        eight = "image" if plain else 'image.convert("RGB")'  # a palette's numbers are no grey values
        advice = f" Of Pillow's: numpy.asarray({eight})."
    elif hasattr(image, "shape"):  # most likely torch's, (c, h, w)
        advice = " Of a tensor (c, h, w) in 0 to 1: (255 * image).round().byte().permute(1, 2, 0).cpu().numpy()."
    else:
        advice = ""
    raise UsageError(
        "An image must be a NumPy array of uint8 (0 to 255), its shape (h, w), (h, w, 1) or (h, w, 3). "
        f"Got {described(image)}.{advice}"
    )


def read_image(path: str | os.PathLike, data: bytes | None = None, depth: int | None = None) -> np.ndarray:
    """Read an image as uint8 (H, W, C), C = 1 for grey and 3 for colour.

    16-bit values lose their low byte (v >> 8); grey ones of `depth` bits, 8 to 16, are v >> (depth - 8). EXIF
    orientation is applied; alpha is dropped, not blended; palettes, CMYK and YCbCr become RGB. Raises ImageError,
    naming the path, for anything that is not one whole still image with sides of at least MIN_SIDE and at most
    MAX_PIXELS pixels, 8 or 16 bits a value, and for grey of more than `depth`. Where the image is in memory, `data` is
    its file and `path` only its name.

    Example: `read_image("tile.png").shape` -> `(420, 260, 1)`.
    """
    path = Path(path)
    pixels = _decode(path, data, depth or 16)
    if pixels.dtype != np.uint8:
        pixels = pixels >> ((depth or 16) - 8)
        if pixels.max() > 255:
            raise ImageError(
                f"{quoted(path)} holds values above {(1 << (depth or 16)) - 1}, the most of {depth} bits; choose the "
                "depth of its camera (--set depth=N in fit), or remove it."
            )
        pixels = pixels.astype(np.uint8)
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise ImageError(
            f"{quoted(path)} is {_size(pixels.shape)} px; at least {MIN_SIDE} x {MIN_SIDE} are needed. "
            "Remove it, or replace it by the full image."
        )
    return pixels


def highest_value(path: str | os.PathLike) -> int | None:
    """The highest value stored in a 16-bit grey image; None of others, of which only the header is read."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if not picture.mode.startswith("I"):
                return None
    except Exception:  # read_image says what is wrong with it
        return None
    return int(_decode(Path(path), depth=None).max())


def read_mask(path: str | os.PathLike, size: tuple[int, int], labels: bool = False) -> np.ndarray:
    """Read a ground-truth mask as bool (H, W): true where a value reaches half of its range (128 or 32768).

    `size` is (H, W) of the image it belongs to; a mask of another size raises ImageError, as does one whose values are
    all below half range without being all zero (labels 0 and 1, most likely: with `labels`, any value but 0 is true). A
    colour mask is true where any channel is; a folder of masks where any of them is.

    Example: `read_mask("000_mask.png", (128, 128)).dtype` -> `bool`.
    """
    path = Path(path)
    if os.path.isdir(path):
        return np.any([read_mask(one, size, labels) for one in find_images(path)], axis=0)
    values = _decode(path).max(axis=2)  # (H, W); 16 bits are not cut to 8: a label may be in the low ones
    if values.shape != tuple(size):
        raise ImageError(
            f"The mask {quoted(path)} is {_size(values.shape)} px, but its image is {_size(size)} px (height x width); "
            "save the mask at the size of the image."
        )
    if labels:
        return values > 0
    top = np.iinfo(values.dtype).max
    if 0 < values.max() <= top // 2:
        raise ImageError(
            f"The mask {quoted(path)} holds values up to {values.max()} of {top}, so nothing reaches half of the "
            "range; save it with 8 bits, 0 for normal and 255 for defective."
        )
    return values > top // 2


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Scale uint8 (H, W, C) so that its shorter side is `size`, averaging over what each new pixel covers.

    Raises ImageError where the result would have more than MAX_PIXELS pixels.
    Example: `resize(np.zeros((512, 256, 3), np.uint8), 128).shape` -> `(256, 128, 3)`.
    """
    height, width = image.shape[:2]
    if min(height, width) == size:
        return image
    scale = size / min(height, width)
    new = (max(size, round(height * scale)), max(size, round(width * scale)))
    if new[0] * new[1] > MAX_PIXELS:
        raise ImageError(
            f"An image of {_size(image.shape)} px with its shorter side at {size} px would have {new[0] * new[1]:,} "
            f"pixels; the limit is {MAX_PIXELS:,}. Choose a smaller size, or cut the image into pieces."
        )
    picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    scaled = np.asarray(picture.resize((new[1], new[0]), Image.Resampling.BILINEAR))  # Pillow widens it when shrinking
    return scaled.reshape(*new, image.shape[2])


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Turn uint8 (H, W, C) into (H, W, channels): grey = 0.299 R + 0.587 G + 0.114 B; grey to colour repeats it."""
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return np.asarray(Image.fromarray(image).convert("L"))[..., None]


def find_images(folder: str | os.PathLike) -> list[Path]:
    """The image files directly in a folder, sorted, without hidden ones. Raises UsageError where it has no list."""
    folder = Path(folder)
    try:
        return sorted(e for e in folder.iterdir() if e.suffix.lower() in SUFFIXES and not e.name.startswith("."))
    except FileNotFoundError:
        raise UsageError(f"There is no folder {quoted(folder)}; check the path.") from None
    except NotADirectoryError:
        raise UsageError(f"{quoted(folder)} is a file; name the folder that holds the images.") from None
    except OSError as error:
        raise UsageError(f"Cannot list the folder {quoted(folder)}: {error.strerror}.") from error


def digest(images: Sequence[str | os.PathLike | np.ndarray]) -> str:
    """What tells these images from others: of files the names, without their folders, and the sizes in bytes; of arrays
    the pixels. Raises ImageError for a file that cannot be read."""
    told = hashlib.sha256()
    for image in images:
        if isinstance(image, np.ndarray):
            told.update(repr(image.shape).encode() + image.tobytes())
            continue
        try:
            size = os.stat(image).st_size
        except OSError:
            read_image(image)  # says what is wrong with it
            raise
        told.update(os.fsencode(Path(image).name) + f"/{size}/".encode())
    return told.hexdigest()[:16]


def find_train(root: str | os.PathLike) -> list[Path]:
    """The normal images to learn from, sorted: those in root/train/good, or in root itself where that is a flat folder.

    Raises UsageError, saying what was expected and what is there instead.
    Example: `find_train("data/textures/brick")[0]` -> `Path("data/textures/brick/train/good/000.png")`.
    """
    root = Path(root)
    flat = find_images(root)
    good = root / "train" / "good"
    if os.path.isdir(good):  # Path.is_dir raises where a parent cannot be entered
        if paths := find_images(good):
            refuse_masks(paths)
            return paths
        raise UsageError(f"{quoted(good)} holds no images; put normal images there ({' '.join(SUFFIXES)}).")
    if os.path.isdir(root / "train"):
        raise UsageError(f"{quoted(root / 'train')} has no folder good; put the normal images into {quoted(good)}.")
    if os.path.isdir(root / "test"):
        raise UsageError(f"{quoted(root)} has test but no train/good: nothing to learn from; add {quoted(good)}.")
    if flat:
        refuse_masks(flat)
        return flat
    set_of = Path(os.path.abspath(root)).parent
    if os.path.isdir(set_of / "train" / "good"):
        raise UsageError(
            f"{quoted(root)} holds no images itself; to learn from train/good beside it: {quoted(set_of)}."
        )
    if os.path.isdir(root / "good") and find_images(root / "good"):
        if Path(os.path.abspath(root)).name == "test":
            raise UsageError(
                f"{quoted(root)} is for judging, not to learn from; name {quoted(set_of)}, with normal images in "
                "train/good."
            )
        raise UsageError(f"{quoted(root)} holds no images itself, its folder good does: name {quoted(root / 'good')}.")
    inside = _categories(root, "train")
    if not inside and (count := count_below(root)):
        inside = f" Its subfolders hold {count} images: name one of them, or move the images into one folder."
    raise UsageError(
        f"{quoted(root)} holds no images ({' '.join(SUFFIXES)}) and no train/good; "
        f"name a folder of normal images, or one with train/good inside.{inside}"
    )


def refuse_masks(paths: Sequence[Path]) -> None:
    """Raises UsageError where masks lie among images: X_mask, X_gt or X_label beside X."""
    known = {(path.parent, path.stem) for path in paths}
    ends = ("_mask", "_gt", "_label")
    masks = [
        path
        for path in paths
        if any((path.parent, path.stem.removesuffix(end)) in known for end in ends if path.stem.endswith(end))
    ]
    if masks:
        more = f" and {len(masks) - 1} more like it" if len(masks) > 1 else ""
        raise UsageError(
            f"{quoted(masks[0])} lies beside the image whose mask it seems to be{more}; move masks to "
            "ground_truth/<defect>, and call what is an image by another name."
        )


def count_below(folder: str | os.PathLike) -> int:
    """How many image files the subfolders of a folder hold, to any depth, without hidden ones."""
    count = 0
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if here != os.fspath(folder):
            count += sum(Path(name).suffix.lower() in SUFFIXES and not name.startswith(".") for name in files)
    return count


def find_test(
    root: str | os.PathLike, *, test: str = "test", truth: str = "ground_truth", good: str = "good"
) -> list[TestImage]:
    """The images to judge, sorted by path: root/test/<defect>/<name>.png, with ground_truth/<defect>/<name>_mask.png.

    A mask may also be called as its image, or be a folder <name> of masks. A defect with no folder in ground_truth has
    no masks; where the folder is there, each image must have its mask. `test`, `truth` and `good` are what a layout
    calls these folders (layouts.py). Raises UsageError.

    Example: `find_test("data/textures/brick")[0].defect` -> `"blur"`.
    """
    root = Path(root)
    find_images(root)
    folders = root / test
    if not os.path.isdir(folders):
        raise UsageError(
            f"{quoted(root)} has no folder test; name one with test/good and test/<defect> inside."
            f"{_categories(root, 'test')}"
        )
    find_images(folders)
    found = []
    for folder in sorted(
        entry for entry in folders.iterdir() if os.path.isdir(entry) and not entry.name.startswith(".")
    ):
        known = root / truth / folder.name
        if folder == (root / truth):  # a layout with its truth among the tests
            continue
        masks, several = None, {}
        if folder.name != good and os.path.isdir(known):
            masks = {path.stem: path for path in find_images(known)}
            several = {path.name: path for path in known.iterdir() if os.path.isdir(path) and find_images(path)}
        images = find_images(folder)
        refuse_masks(images)
        if images and folder.name != good and folder.name.casefold() in ("good", "ok", "normal"):
            raise UsageError(
                f"{quoted(folder)} would count as a defect. If its images are normal, they go into "
                f"{quoted(folders / good)}; if not, call it by another name."
            )
        named: dict[str, Path] = {}
        for path in images:
            mask, labels = None, False
            if masks is not None:
                if (other := named.setdefault(path.stem, path)) != path:
                    raise UsageError(
                        f"{quoted(other)} and {quoted(path)} have one name, so nothing says whose mask "
                        f"{path.stem}_mask is; rename one of them, and its mask."
                    )
                mask = masks.get(f"{path.stem}_mask") or masks.get(path.stem) or several.get(path.stem)
                labels = mask is not None and mask == several.get(path.stem)
                if mask is None:
                    raise UsageError(
                        f"{quoted(path)} has no mask: expected {quoted(known / (path.stem + '_mask.png'))}; "
                        f"add it, or remove {quoted(known)} to evaluate without masks."
                    )
            found.append(TestImage(path, "good" if folder.name == good else folder.name, mask, labels))
    if not found:
        raise UsageError(f"{quoted(folders)} holds no images; expected {test}/{good}/*.png and {test}/<defect>/*.png.")
    return found


def of_each(paths: Sequence[str | os.PathLike], read: Callable[[int], T]) -> list[T]:
    """`read(i)` for the i-th of the paths. Raises one ImageError that names all files that it is raised for."""
    made: list[T] = []
    first, others = "", []
    for i, path in enumerate(paths):
        try:
            made.append(read(i))
        except ImageError as error:
            others += [quoted(path)] if first else []
            first = first or str(error)
    if others:
        more = f" and {len(others) - 9} more" if len(others) > 9 else ""
        first += f" No use either, of {len(paths)} images: {', '.join(others[:9])}{more}."
    if first:
        raise ImageError(first)
    return made


def shorter_sides(paths: Sequence[str | os.PathLike], size: int | None) -> list[int]:
    """The shorter side of each image in pixels, once scaled to `size` as an ImageCache does; only headers are read.

    Raises ImageError for files that are no images. Example: `shorter_sides(["a.png"], size=160)` -> `[160]`.
    """

    def side(i: int) -> int:
        try:
            with Image.open(paths[i], formats=FORMATS) as picture:
                return min(picture.size)
        except Exception:
            return min(read_image(paths[i]).shape[:2])  # says what is wrong with it

    return [size] * len(paths) if size is not None else of_each(paths, side)


class ImageCache(Sequence[np.ndarray]):
    """Images decoded once: `cache[i]` is uint8 (H, W, channels), read-only.

    With `size`, the shorter side is scaled to it. Up to `memory` bytes stay in memory; what is more goes to one unnamed
    temporary file, which is gone when the cache is. Raises ImageError at the first use of a bad image.

    Example: `ImageCache(find_train("data/textures/brick"), size=None, channels=1)[0].shape` -> `(128, 128, 1)`.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        *,
        size: int | None,
        channels: int,
        depth: int | None = None,
        memory: int = 1 << 31,
    ) -> None:
        if channels not in (1, 3):
            raise UsageError(f"ImageCache: channels must be 1 or 3. Got {channels}.")
        if size is not None and size < MIN_SIDE:
            raise UsageError(f"ImageCache: size must be None or at least {MIN_SIDE} px. Got {size}.")
        self.paths, self.size, self.channels, self.memory = [Path(path) for path in paths], size, channels, memory
        self.depth = depth
        self.originals: dict[int, tuple[int, int]] = {}  # (H, W) before scaling, of the images used so far
        self.digests: dict[int, str] = {}  # of the pixels of these
        self._held: dict[int, np.ndarray] = {}
        self._spilt: dict[int, tuple[int, tuple[int, ...]]] = {}  # offset in the file, shape
        self._held_bytes = self._spilt_bytes = 0
        self._file = None
        self._lock = threading.Lock()
        self._owner = os.getpid()  # a forked worker shares the file: it may read what is there, and adds nothing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]  # no slices: they would decode them all
        i = range(len(self.paths))[i]
        if (image := self._held.get(i)) is None:
            if i in self._spilt:
                return self._read_back(*self._spilt[i])
            image = to_channels(read_image(self.paths[i], depth=self.depth), self.channels)
            self.originals[i] = (image.shape[0], image.shape[1])
            if self.size is not None:
                with naming(self.paths[i]):
                    image = resize(image, self.size)
            image = np.ascontiguousarray(image)
            image.flags.writeable = False
            self.digests[i] = digest([image])
            if os.getpid() == self._owner:
                with self._lock:
                    self._keep(i, image)
        return image

    def shapes(self) -> list[tuple[int, int]]:
        """(H, W) of each image as scaled; all are decoded. Raises one ImageError for all bad ones."""
        shapes = of_each(self.paths, lambda i: self[i].shape)
        return [(shape[0], shape[1]) for shape in shapes]

    def _keep(self, i: int, image: np.ndarray) -> None:
        if i in self._held or i in self._spilt:
            return
        if self._held_bytes + image.nbytes <= self.memory:
            self._held[i] = image
            self._held_bytes += image.nbytes
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="cpc_fast_", buffering=0)  # noqa: SIM115 (lives as long as the cache)
                weakref.finalize(self, self._file.close)
            data, done = memoryview(image.tobytes()), 0
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], self._spilt_bytes + done)
        except OSError as error:
            raise CpcFastError(
                f"Cannot keep decoded images in {quoted(tempfile.gettempdir())}: {error.strerror}; free some space "
                "there, or set TMPDIR to a larger place."
            ) from error
        self._spilt[i] = (self._spilt_bytes, image.shape)
        self._spilt_bytes += image.nbytes

    def _read_back(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        assert self._file is not None
        data = os.pread(self._file.fileno(), int(np.prod(shape)), offset)
        return np.frombuffer(data, np.uint8).reshape(shape)


class Chosen(Sequence[np.ndarray]):
    """Some of the images of another sequence, by their indices; each is taken from there when it is asked for."""

    def __init__(self, images: Sequence[np.ndarray], indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]  # no slices, as in an ImageCache
        return self.images[self.indices[i]]


def _decode(path: Path, data: bytes | None = None, depth: int | None = 16) -> np.ndarray:
    """uint8 (H, W, C), or uint16 (H, W, 1) of `depth` bits (None: as stored), of any size within the limit."""
    try:
        if (size := _size_of_file(path) if data is None else len(data)) == 0:
            raise ImageError(f"{quoted(path)} is empty ({size} bytes); copy it again, or remove it.")
        with open(path, "rb") if data is None else io.BytesIO(data) as source, _quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow only warns about is checked below, or is harmless (odd EXIF)
            with Image.open(source, formats=FORMATS) as picture:  # a path is mapped, and grey TIFFs turned wrong
                _check(path, picture)
                picture.load()
                return _turned(_to_array(path, picture, depth), picture)
    except ImageError:
        raise
    except UnidentifiedImageError:
        named = ", whatever its name says" if path.suffix.lower() in SUFFIXES else ""
        raise ImageError(
            f"{quoted(path)} is not an image in a known format ({', '.join(FORMATS)}){named}; convert or remove it."
        ) from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"{quoted(path)} declares far more than {MAX_PIXELS:,} pixels, the limit; scale it down, cut it into "
            "pieces, or remove it."
        ) from None
    except OSError as error:
        if error.errno is None:  # Pillow's own, about the contents
            raise ImageError(_broken(path, error)) from error
        link = "it is a link to something that is gone, so mend or remove it"
        advice = {
            errno.ENOENT: link if path.is_symlink() else "check the path",
            errno.EACCES: "give yourself the right to read it",
            errno.ELOOP: "remove the circle of links",
        }
        raise ImageError(
            f"Cannot read {quoted(path)}: {error.strerror}; {advice.get(error.errno, 'copy it again, or remove it')}."
        ) from error
    except MemoryError:
        raise ImageError(f"{quoted(path)} does not fit into memory; scale it down, or cut it into pieces.") from None
    except Exception as error:  # decoders meet broken files with SyntaxError, ValueError, struct.error, zlib.error, ...
        raise ImageError(_broken(path, error)) from error


def _size_of_file(path: Path) -> int:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        if path.suffix.lower() in SUFFIXES:
            raise ImageError(f"{quoted(path)} is a folder with the name of an image; rename or remove it.")
        raise ImageError(f"{quoted(path)} is a folder; name the images in it.")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ImageError(f"{quoted(path)} is not a regular file; replace it by an image, or remove it.")
    return status.st_size


def _check(path: Path, picture: Image.Image) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise ImageError(
            f"{quoted(path)} is {picture.height} x {picture.width} px, more than the limit of {MAX_PIXELS:,} pixels; "
            "scale it down, or cut it into pieces."
        )
    if _tiff_tag(picture, 284) == 2 and max(_tiff_tag(picture, 258) or (8,)) > 8:
        raise ImageError(
            f"{quoted(path)} stores its 16-bit channels apart, which Pillow reads wrongly; save it interleaved."
        )
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # in MPO, a camera's format, the first picture is the picture
        raise ImageError(f"{quoted(path)} holds {frames} frames; save the one that matters as an image of its own.")


def _tiff_tag(picture: Image.Image, tag: int) -> Any:
    tags = getattr(picture, "tag_v2", None)
    return None if tags is None else tags.get(tag)


def _to_array(path: Path, picture: Image.Image, depth: int | None) -> np.ndarray:
    """uint8 (H, W, C) of a loaded picture of any mode, uint16 (H, W, 1) of grey with `depth` bits in 16."""
    mode = picture.mode
    if mode.startswith("I"):  # I;16 and its byte orders, or I, which 16 bits may come as, too
        values = np.asarray(picture)
        bits = max(_tiff_tag(picture, 258) or (16,))
        if bits > 16 or values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{quoted(path)} holds whole numbers of {bits} bits, from {values.min()} to {values.max()}; save it "
                "with 8 or 16 bits, from 0 on."
            )
        values = values.astype(np.uint16)[..., None]
        if depth is None or _tiff_tag(picture, 262) != 0:
            return values
        return np.uint16((1 << depth) - 1) - values  # white is 0, which Pillow minds at 8 bits only; too much stays so
    if mode == "F":
        raise ImageError(f"{quoted(path)} holds floating-point values; save it with 8 or 16 bits.")
    if mode in ("P", "PA", "RGBa", "La"):
        picture = picture.convert("RGBA")
        mode = "RGBA"
    if mode in ("1", "LA"):
        picture = picture.getchannel(0) if mode == "LA" else picture.convert("L")
    elif mode == "RGBA":
        return np.asarray(picture)[..., :3]
    elif mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    pixels = np.asarray(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _turned(pixels: np.ndarray, picture: Image.Image) -> np.ndarray:
    """Apply the EXIF orientation (a TIFF has been turned by Pillow already, and no longer carries it)."""
    try:
        orientation = picture.getexif().get(0x0112, 1)
    except Exception:  # EXIF that cannot be read orders nothing
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _broken(path: Path, error: Exception) -> str:
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"{quoted(path)} is damaged or cut short ({detail}); copy it again, or remove it."


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _categories(root: Path, inside: str) -> str:
    names = sorted(entry.name for entry in root.iterdir() if os.path.isdir(entry / inside))
    return f" It has such folders inside: {', '.join(map(repr, names[:5]))}; name one of them." if names else ""
