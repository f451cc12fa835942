"""Images in memory: mapped from a file on disk, or moved to the GPU once, and gathered a batch at a time.

MPI3D-Complex has them in an npz file, Causal3DIdent as one file each, which are decoded once into a file of that kind.
"""

import concurrent.futures
import contextlib
import errno
import glob
import hashlib
import io
import itertools
import lzma
import math
import os
import shutil
import struct
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from reading.causal3dident import CAUSAL_TOOLS, image_files
from reading.mpi3d import refuse
from running.command_line import InputError
from running.cores import usable_cores
from running.files import locked, regular_file, replaced, write_bytes
from running.memory import allow_mapping

DAMAGED = (OSError, EOFError, RuntimeError, ValueError, OverflowError, struct.error, zlib.error)
DAMAGED_ARCHIVE = (*DAMAGED, zipfile.BadZipFile, lzma.LZMAError)
DAMAGED_IMAGE = (*DAMAGED, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)
warnings.simplefilter("error", Image.DecompressionBombWarning)  # which Pillow else prints, and goes on
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")  # of damaged EXIF beside a sound picture
LARGEST_GRID = 4096  # bytes of the file of a handful of integers
GPU_RESERVE = 4 * 2**30  # bytes of GPU memory that images leave for the training
DECODED_AT_ONCE = 1024  # images handed to the threads at a time
PROGRESS_SECONDS = 10  # between two lines of progress while images are decoded
CHECKSUM_BYTES, CHECKED_CRC = 4, 0x2144DF1C  # of a CRC at the end of a file, and the CRC of any file that ends with its own
PIXEL_STEP = 61  # between pixels that are compared before all of them are; no divisor of a width, so that columns change


def open_npz_images(path):
    """(images, grid): memory map (N, H, W, 3) uint8 of the member `images`, and the member `grid` as a tuple, None without it.

    A stored member is mapped in place; a compressed one is unpacked once, into a file beside `path` that carries its
    checksum in its name, in place of an older one, and is read for it whenever it has changed. Nothing is ever unpickled. Raises
    InputError that names what is missing, damaged or of another kind.
    """
    path = regular_file(path)
    with _opened_npz(path) as (file, archive):
        if "images.npy" not in archive.namelist():
            held = ", ".join(archive.namelist())[:100] or "nothing"
            raise InputError(f"{path} holds {held}, expected an array `images`")
        grid = _read_grid(archive, path)
        member = archive.getinfo("images.npy")
        with archive.open(member) as stream:
            start = file.tell()  # opening a member leaves the archive where its bytes begin
            shape = _read_image_header(stream, f"{path}: images")
            if member.file_size != stream.tell() + math.prod(shape):
                raise InputError(f"{path} is damaged: `images` of shape {shape} has {member.file_size - stream.tell()} bytes")
            if member.compress_type == zipfile.ZIP_STORED:
                return _map_images(path, start + stream.tell(), shape), grid
        unpacked = _unpacked(path, member)
        if not unpacked.exists():
            _unpack(path, archive, member, unpacked)
    images = _map_npy(unpacked)
    checked_once(unpacked, lambda: _check_crc(unpacked, member.CRC))
    _remove_older(unpacked)
    return images, grid


def _unpacked(path, member):
    return path.with_name(f"{path.stem}.{member.CRC:08x}.npy")


def _unpack(path, archive, member, unpacked):
    with locked(path):  # of jobs that start together one unpacks, the others wait
        if unpacked.exists():
            return
        if member.file_size > (free := shutil.disk_usage(path.parent).free):
            need = f"{member.file_size / 1e9:.2f} GB once, and {path.parent} has {free / 1e9:.2f} GB free"
            raise InputError(f"{path} is compressed and is unpacked into {need}; copy the folder to a larger disk")
        print(f"{path} is compressed: unpacking {member.file_size / 1e9:.2f} GB once into {unpacked}", flush=True)
        made = _made_once(unpacked, "the images are compressed and are unpacked")
        with made as temporary, archive.open(member) as stream, open(temporary, "wb") as target:
            shutil.copyfileobj(stream, target, 2**24)


@contextlib.contextmanager
def _opened_npz(path):
    """Context of an npz file and its ZipFile; InputError if it turns out to be damaged."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            yield file, archive
    except DAMAGED_ARCHIVE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be read; what is damaged names none
        raise InputError(f"{path} is truncated or damaged ({error}); get it again") from None


def check_stored_images(path):
    """Raise InputError unless the member `images` of an npz file has its checksum, and no image one colour alone.

    Every byte is read, which mapping does not do; of a compressed one, those that `open_npz_images` has unpacked.
    """
    path, plain, start = Path(path), [], 0
    with _opened_npz(path) as (_, archive):
        member = archive.getinfo("images.npy")
        if member.file_size > 2**30:
            print(f"{path}: reading {member.file_size / 1e9:.2f} GB once, for its checksum", flush=True)
        stored = member.compress_type == zipfile.ZIP_STORED
        with archive.open(member) if stored else open(_unpacked(path, member), "rb") as stream:
            _, *size = _read_image_header(stream, f"{path}: images")
            rows = max(1, 2**24 // math.prod(size))
            while block := stream.read(rows * math.prod(size)):  # which computes the checksum
                images = np.frombuffer(block, np.uint8).reshape(-1, size[0] * size[1], 3)
                maybe = np.flatnonzero((images[:, ::PIXEL_STEP] == images[:, :1]).all((1, 2)))
                plain += [start + number for number in maybe.tolist() if (images[number] == images[number, 0]).all()]
                start += len(images)
    if plain:
        refuse(path, f"an image has one colour alone, number {plain[0]} of {start}, and {len(plain) - 1} others")


def _check_crc(path, expected):
    """Raise InputError unless the bytes of a file have this CRC."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    if checksum != expected:
        raise InputError(f"{path} is damaged: its checksum is another; remove it, and it is made again")


def checked_once(path, check):
    """Call `check`, which raises if the file is not as it should be, unless it has passed since the file was last changed.

    A small hidden file beside `path` says so, where one can be written; elsewhere it is called each time.
    """
    path = Path(path)
    record, status = _check_record(path), path.stat()
    # the time of the last change besides: that of the modification can be set back
    state = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}\n"
    with locked(record):  # of jobs that start together one checks, the others wait
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if record.is_file() and record.read_text() == state:
                return
        check()
        with contextlib.suppress(OSError):
            write_bytes(record, state.encode())


def _check_record(path):
    return path.with_name(f".{path.name}.checked")


def _remove_older(made):
    """Remove files of the name of `made` but for its digest, and their records: they were made of what was there before."""
    stem, digest, _ = made.name.rsplit(".", 2)
    for other in made.parent.glob(f"{glob.escape(stem)}.{'[0-9a-f]' * len(digest)}.npy"):
        if other != made:  # also one that a process killed at this place has left
            for left in (_check_record(other), other):
                with contextlib.suppress(OSError):  # of no consequence but for the space, and tried again
                    left.unlink()


@contextlib.contextmanager
def _made_once(path, what):
    """Context of `replaced` for a file that is made beside the data; InputError, which says why, if none can be made there."""
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(replaced(path))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise InputError(
                f"{path.parent} cannot be written, and {what} into a file there, once; copy the folder to where you can write"
            ) from None
        yield temporary


@contextlib.contextmanager
def _damage_as_value_error():
    """Context in which NumPy parses the header of an array, which is Python: of a damaged one it may raise anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"its header: {error}") from None


def _read_image_header(stream, name):
    """Shape of the array in the .npy format that `stream` is left in front of; InputError unless it is (N, H, W, 3) uint8."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with _damage_as_value_error():
        shape, fortran_order, dtype = read_header(stream)
    if dtype.hasobject:
        raise InputError(f"{name} is a pickled array, which is not opened: it could run any code; expected uint8")
    if dtype != np.uint8:
        raise InputError(f"{name} is {dtype}, expected uint8")
    if fortran_order or len(shape) != 4 or shape[3] != 3 or min(shape) <= 0 or bool in map(type, shape):
        raise InputError(f"{name} has shape {shape}, expected (N, height, width, 3) in C order")
    return shape


def _read_grid(archive, path):
    if "grid.npy" not in archive.namelist():
        return None
    if archive.getinfo("grid.npy").file_size > LARGEST_GRID:
        raise InputError(f"{path} is damaged: `grid` must be the sizes of the factors, a few integers")
    content = io.BytesIO(archive.read("grid.npy"))
    with _damage_as_value_error():
        grid = np.lib.format.read_array(content, allow_pickle=False)
    if grid.ndim != 1 or grid.dtype.kind not in "iu" or (grid < 1).any():
        raise InputError(f"{path} is damaged: `grid` must be the sizes of the factors, positive integers")
    return tuple(grid.tolist())


def _map_images(path, start, shape):
    # copy on write, so that torch takes it for writable; no page is ever written
    allow_mapping(math.prod(shape))
    return np.memmap(path, np.uint8, mode="c", offset=start, shape=shape)


def _map_npy(path, after=0):
    """Memory map of the images that a file in the .npy format holds, with bytes `after` them; InputError if it is damaged."""
    with contextlib.suppress(ValueError), open(regular_file(path), "rb") as file:
        shape = _read_image_header(file, path)
        if path.stat().st_size == file.tell() + math.prod(shape) + after:
            return _map_images(path, file.tell(), shape)
    raise InputError(f"{path} is damaged; remove it, and it is made again")


def open_image_folder(folder, entries=None):
    """Memory map (N, H, W, 3) uint8 of the images 0.png, 1.png, … of a folder, in order of their numbers; .jpg is read too.

    They are decoded once, into a file beside the folder whose name carries a digest of their names, sizes and times, and whose
    end is its checksum; images that have changed since are decoded again, and the older file removed, as they are if the file
    is damaged. It is read for that whenever it has changed. Raises InputError that names an image that is missing, damaged or
    of another size than the first. entries: what `numbered_images` of the folder returned, if it has been asked.
    """
    folder = Path(folder)
    entries = entries or numbered_images(folder)
    statuses = ((entry.name, entry.stat()) for entry in entries)
    # the time of the last change besides: a file that another one replaced may have its size and time of modification
    listing = "".join(f"{name}/{status.st_size}/{status.st_mtime_ns}/{status.st_ctime_ns}\n" for name, status in statuses)
    digest = hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()
    decoded = folder.with_name(f"{folder.name}.{digest}.npy")
    damaged_or_missing = contextlib.suppress(FileNotFoundError, InputError)

    def mapped():
        images = _map_npy(decoded, CHECKSUM_BYTES)
        checked_once(decoded, lambda: _check_crc(decoded, CHECKED_CRC))
        return images

    images = None
    with damaged_or_missing:
        images = mapped()
    if images is None:
        with locked(folder.with_name(f".{folder.name}.lock")):  # jobs that start together: one decodes, the others wait
            with damaged_or_missing:
                return mapped()
            with _made_once(decoded, "the images are decoded") as temporary, open(temporary, "wb") as file:
                _decode_images([Path(entry.path) for entry in entries], file, decoded)
        images = mapped()
    _remove_older(decoded)
    return images


def numbered_images(folder):
    """List of the os.DirEntry of the images of a folder, in order of their numbers; InputError unless these are 0 … N − 1."""
    images, renders = image_files(folder), f"{CAUSAL_TOOLS}/generate_images.py renders"
    if not images:
        raise InputError(f"{folder} holds no images 0.png, 1.png, …; {renders} them")
    for (number, entry), (following, other) in itertools.pairwise([(-1, None), *images]):
        if number == following:
            raise InputError(f"{folder} holds {entry.name} and {other.name}: two images of one number")
        if number + 1 != following:
            raise InputError(
                f"{folder} has an image number {images[-1][0]} and none of number {number + 1}; {renders} what is missing"
            )
    return [entry for _, entry in images]


def _decode_images(paths, file, decoded):
    """Write the images of `paths` as one uint8 array in the .npy format, and a CRC, into `file`, which becomes `decoded`."""
    first = decode_image(paths[0])
    shape, started, reported = (len(paths), *first.shape), time.perf_counter(), time.perf_counter()
    print(f"decoding {len(paths):,} images once, {math.prod(shape) / 1e9:.2f} GB, into {decoded}", flush=True)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    file.write(header.getvalue())
    checksum = zlib.crc32(header.getvalue())
    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(paths), DECODED_AT_ONCE):
            part = paths[start : start + DECODED_AT_ONCE]
            for path, image in zip(part, pool.map(decode_image, part), strict=True):
                if image.shape != first.shape:
                    found, expected = (f"{height} × {width}" for height, width, _ in (image.shape, first.shape))
                    raise InputError(f"{path} has {found} pixels and {paths[0].name} {expected}; expected images of one size")
                file.write(image)
                checksum = zlib.crc32(image, checksum)
            done, now = start + len(part), time.perf_counter()
            if now - reported > PROGRESS_SECONDS or (done == len(paths) > DECODED_AT_ONCE):
                reported, rate = now, done / (now - started)
                left = round((len(paths) - done) / rate)
                print(f"image {done:,}/{len(paths):,}  {rate:.0f} images/s, {left} s left", flush=True)
    file.write(checksum.to_bytes(CHECKSUM_BYTES, "little"))


def decode_image(path):
    """(H, W, 3) uint8 of a PNG or JPEG file, upright as its EXIF says; grey has three equal channels, 16 bits become 8.

    Raises InputError that names an image that is damaged or shows through.
    """
    try:
        with Image.open(regular_file(path), formats=("PNG", "JPEG")) as image:
            ImageOps.exif_transpose(image, in_place=True)
            transparent = False
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255, not scale
                grey = np.asarray(image).astype(np.int32)
                transparent = (grey == image.info.get("transparency", -1)).any()
                pixels = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
            else:
                if "A" in image.getbands() or "transparency" in image.info:
                    image = image.convert("RGBA")
                    transparent = image.getextrema()[3][0] < 255
                pixels = np.asarray(image.convert("RGB"))
            if transparent:
                raise InputError(f"{path} has transparent pixels, expected a picture without; render it again")
            return pixels
    except DAMAGED_IMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file cannot be read; what is damaged has no number of the system's
        raise InputError(f"{path} is damaged, or no PNG or JPEG ({error}); remove it and render it again") from None


class Images:
    """Images of which batches are taken: (N, H, W, 3) uint8 on disk or, where they fit, on the GPU.

    workers: threads that read a batch from disk, 0 for none of their own; they serve disks that answer slowly.
    """

    def __init__(self, array, device="cpu", workers=0):
        self.device, self.array, self.resident = torch.device(device), array, None
        self._map = concurrent.futures.ThreadPoolExecutor(workers).map if workers > 1 else map
        self._parts = max(workers, 1)
        self._file = array.filename if isinstance(array, np.memmap) else None
        self._status = os.stat(self._file) if self._file else None
        if self.device.type == "cuda" and array.nbytes + GPU_RESERVE <= torch.cuda.mem_get_info(self.device)[0]:
            self.resident = torch.empty(array.shape, dtype=torch.uint8, device=self.device)
            rows = max(1, 2**26 // array[0].nbytes)
            for start in range(0, len(array), rows):
                self._check_length()
                self.resident[start : start + rows] = torch.from_numpy(array[start : start + rows])

    def __len__(self):
        return len(self.array)

    @property
    def index_device(self):
        """Device that `take` wants its rows on."""
        return self.device if self.resident is not None else torch.device("cpu")

    def _check_length(self):
        """Raise InputError if the mapped file has become shorter: to read what is gone ends the process without a word."""
        if self._file is None:
            return
        with contextlib.suppress(FileNotFoundError):  # removed, and still there for those who have it open
            status = os.stat(self._file)
            if status.st_ino == self._status.st_ino and status.st_size < self._status.st_size:
                raise InputError(f"{self._file} has become shorter while it is in use; get it again, and --resume goes on")

    def take(self, rows):
        """(B, H, W, 3) uint8 on the device, for (B,) int64 rows on `index_device`."""
        if self.resident is not None:
            return self.resident[rows]
        self._check_length()
        pinned = self.device.type == "cuda"
        batch = torch.empty((len(rows), *self.array.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
        parts = (np.array_split(part.numpy(), self._parts) for part in (rows, batch))
        # "clip" writes into `out` directly, and the rows are in range
        list(self._map(lambda part, out: np.take(self.array, part, axis=0, out=out, mode="clip"), *parts))
        return batch.to(self.device, non_blocking=True)
