"""Images with captions, as tensors: opened in a second, never read whole, and gathered without a line of Python per sample.

MPI3D-Complex in one folder:

    real3d_complicated_shapes_ordered.npz                     images (N, 64, 64, 3) uint8, in row-major order of the grid
    {train,test}/image_semantics.csv                          the seven factors of each image
    {train,test}/text_semantics_{selection|perturbation}_{0..4}.csv   what its caption speaks of
    {train,test}/text_{selection|perturbation}_{0..4}.txt     its caption, one a line
    vocab_{selection|perturbation}_{0..4}.json                word → number; without it the training captions give it

Causal3DIdent in one folder, its rows in the order of the images' numbers:

    images/000000.png …                                       (H, W), all of one size; .jpg is accepted too
    latents_image.csv                                         the factors of each image
    latents_text_{selections|perturbations}_{0..6}.csv        what its caption says
    text/{selections|perturbations}_{0..6}/text_raw.txt       its caption, one a line

Images stay on disk as a memory map, or move to the GPU once. Captions repeat: each distinct one is tokenised once, and a
caption is the number of its row in the table of distinct ones.
"""

import ast
import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import lzma
import math
import os
import re
import shutil
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from running.command_line import InputError
from running.files import locked, read_csv, read_json, read_table, replaced, write_bytes

MPI3D_GRID = {"OBJ_COLOR": 4, "OBJ_SHAPE": 4, "OBJ_SIZE": 2, "CAMERA": 3, "BACKGROUND": 3, "H_AXIS": 40, "V_AXIS": 40}
MPI3D_SEMANTICS = tuple(MPI3D_GRID)[:5]  # what captions speak of; the positions of the axes are the image's own
MPI3D_FILE = "real3d_complicated_shapes_ordered.npz"
MPI3D_SOURCE = "https://github.com/rr-learning/disentanglement_dataset"
MPI3D_MEAN, MPI3D_STD = (0.00888889, 0.00888889, 0.00830382), (0.08381344, 0.07622504, 0.06356431)
BIAS_TYPES, BIAS_IDS = ("selection", "perturbation"), range(5)

# What captions may speak of, in the order in which settings add it; then all factors of the image, and of the caption.
# A number is that of a factor's values 0, 1, …; None stands for a number in [0, 1].
CAUSAL_SEMANTICS = (
    "object_shape",
    "object_xpos",
    "object_ypos",
    "spotlight_pos",
    "object_color",
    "spotlight_color",
    "background_color",
)
CAUSAL_IMAGE = {
    "object_shape": 7,
    "object_xpos": 3,
    "object_ypos": 3,
    "object_alpharot": None,
    "object_betarot": None,
    "object_gammarot": None,
    "spotlight_pos": None,
    "object_color": None,
    "spotlight_color": None,
    "background_color": None,
}
CAUSAL_TEXT = {
    "object_shape": 7,
    "object_xpos": 3,
    "object_ypos": 3,
    "spotlight_pos": None,
    "object_color_index": 10,  # Matplotlib's TABLEAU_COLORS, CSS4_COLORS, XKCD_COLORS
    "spotlight_color_index": 148,
    "background_color_index": 949,
    "text_phrasing": 5,
}
CAUSAL_MEAN, CAUSAL_STD = (0.4327, 0.2689, 0.2839), (0.1201, 0.1457, 0.1082)
CAUSAL_BIAS_TYPES, CAUSAL_BIAS_IDS = ("selections", "perturbations"), range(7)
CAUSAL_TOOLS = "rendering_data/Causal3DIdent"

DAMAGED_ARCHIVE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError, struct.error)
GPU_RESERVE = 4 * 2**30  # bytes of GPU memory that images leave for the training
UNTOUCHED_ROWS = 100  # rows from which a factor that is never replaced is no accident
CHANCE_REPEATS = 20  # repeated captions from which it is no accident that a factor they leave out agrees
FINGERPRINT_IMAGES = 64  # by whose pixels a resumed run knows its images
DECODED_AT_ONCE = 1024  # images between two writings to the memory map
PROGRESS_SECONDS = 10  # between two lines of progress while images are decoded


# --------------------------------------------------------------------------------------------------------------
# settings


@dataclasses.dataclass(frozen=True)
class Setting:
    """Names of the factors that captions speak of, I_θ, and of those that they may state wrongly, I_ρ."""

    selected: tuple
    perturbed: tuple

    @property
    def unbiased(self):
        """I_θ \\ I_ρ: what the theory says is learned."""
        return tuple(name for name in self.selected if name not in self.perturbed)


def mpi3d_setting(bias_type, bias_id):
    """Setting number `bias_id` of bias_type: selections grow from OBJ_COLOR on, perturbations from BACKGROUND back."""
    return _nested_setting(MPI3D_SEMANTICS, bias_type == "selection", bias_id)


def causal_setting(bias_type, bias_id):
    """Setting number `bias_id`: selections grow from object_shape on, perturbations from background_color back."""
    return _nested_setting(CAUSAL_SEMANTICS, bias_type == "selections", bias_id)


def causal_text_factor(name):
    """Column of a caption's latents that states the semantics `name`: colours are stated by the index of their name."""
    return name if name in CAUSAL_TEXT else f"{name}_index"


def _nested_setting(semantics, selection, bias_id):
    """The first bias_id + 1 semantics selected, or all of them and the last bias_id perturbed."""
    if selection:
        return Setting(semantics[: bias_id + 1], ())
    return Setting(semantics, semantics[len(semantics) - bias_id :])


# --------------------------------------------------------------------------------------------------------------
# captions

PAD, EOS, UNK = "{pad}", "{eos}", "{unk}"

OPENING_QUOTE = re.compile(r'(?:^|(?<=[ (\[{<]))"')
# what stands alone: marks, a comma or colon unless a digit follows, the full stop at the end; then an 's before a space
MARKS = re.compile(r"[;@#$%&?!*()\[\]{}<>]|[:,](?!\d)|(?<!\.)\.(?=[\])}>' ]*$)|--")
CLITICS = re.compile(r"(?<=[^' ])'(?:s|m|d|ll|re|ve)?(?= |$)", re.IGNORECASE)


def tokenise(caption):
    """List of the Penn Treebank tokens of a caption.

    A hyphenated word is one token, marks stand alone, double quotes become `` and ''. For captions of this kind these
    are the tokens of NLTK's NLTKWordTokenizer, whose import alone takes longer than to open a data set.
    """
    text = OPENING_QUOTE.sub(" `` ", caption).replace('"', " '' ")
    return CLITICS.sub(r" \g<0> ", MARKS.sub(r" \g<0> ", text)).split()


def read_lines(path):
    """List of the lines of a UTF-8 text file, with LF or CRLF, the last one ended or not; InputError names a bad file."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8 ({error}); make it again") from None
    lines = text.replace("\r\n", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    return lines


@dataclasses.dataclass
class Captions:
    """Captions as numbers: row i of N is tokens[index[i]]; tokens: (M, L) of the distinct ones, index: (N,), int32."""

    tokens: torch.Tensor
    index: torch.Tensor

    def to(self, device):
        """The same on `device`."""
        return Captions(self.tokens.to(device), self.index.to(device))

    def take(self, rows):
        """(B, L) int64 tokens of the captions `rows`, a (B,) int64 tensor on the captions' device."""
        return self.tokens[self.index[rows]].long()


def load_captions(parts, vocabulary_file, cache_file):
    """(captions, vocabulary): dict split → Captions, and dict word → number.

    parts: dict split → (file, slice of its lines), with "train" among the splits. Each caption ends with {eos} and is padded
    with {pad}, up to the longest of all splits plus one, so that one encoder reads them all. The vocabulary is that of
    vocabulary_file; where there is none it is {pad}, {eos}, {unk}, then the words of "train" in order of appearance. The
    result is kept in cache_file, if that can be written, and taken from there as long as the files hold the same bytes.
    Raises InputError that names a missing or damaged file or an empty caption.
    """
    digest = hashlib.blake2b(repr([(split, lines) for split, (_, lines) in parts.items()]).encode())
    files = dict.fromkeys(path for path, _ in parts.values())
    for path in (*files, vocabulary_file):
        content = _bytes_or_none(path)
        digest.update(struct.pack("<q", -1 if content is None else len(content)))
        digest.update(content or b"")
    cached = _read_cache(cache_file, digest.hexdigest(), parts)
    if cached is None:
        vocabulary = _read_vocabulary(vocabulary_file)
        distinct, index = {}, {}
        files = {path: read_lines(path) for path in files}
        for path, lines in files.items():
            if (empty := next((number for number, line in enumerate(lines, 1) if not line.strip()), None)) is not None:
                raise InputError(f"{path}: the caption in line {empty} is empty; make the file again")
        for split, (path, part) in parts.items():
            if not files[path][part]:
                raise InputError(f"{path} holds no caption for {split}; make it again")
            index[split], captions = pd.factorize(np.array(files[path][part], dtype=object))
            distinct[split] = [tokenise(caption) for caption in captions]
        if vocabulary is None:
            words = dict.fromkeys(word for caption in distinct["train"] for word in caption)
            vocabulary = {word: number for number, word in enumerate(dict.fromkeys((PAD, EOS, UNK, *words)))}
        length = 1 + max(len(caption) for captions in distinct.values() for caption in captions)
        tables = {split: _encode(captions, vocabulary, length) for split, captions in distinct.items()}
        cached = tables, {split: codes.astype(np.int32) for split, codes in index.items()}, vocabulary
        _write_cache(cache_file, digest.hexdigest(), *cached)
    tables, index, vocabulary = cached
    captions = {part: Captions(torch.from_numpy(tables[part]), torch.from_numpy(index[part])) for part in parts}
    return captions, vocabulary


def _encode(captions, vocabulary, length):
    """(M, length) table of token numbers, in the smallest integers that hold the vocabulary."""
    table = np.full((len(captions), length), vocabulary[PAD], np.uint8 if len(vocabulary) <= 256 else np.int32)
    unknown = vocabulary[UNK]
    for row, caption in zip(table, captions, strict=True):
        row[: len(caption)] = [vocabulary.get(word, unknown) for word in caption]
        row[len(caption)] = vocabulary[EOS]
    return table


def _bytes_or_none(path):
    with contextlib.suppress(FileNotFoundError):
        return Path(path).read_bytes()
    return None


def _read_vocabulary(path):
    """Dict word → number of a JSON file, None if there is none; {"w2i": …} around it is accepted."""
    content = _bytes_or_none(path)
    if content is None:
        return None
    try:
        vocabulary = json.loads(content)
        if isinstance(vocabulary.get("w2i"), dict):
            vocabulary = vocabulary["w2i"]
        complete = sorted(vocabulary.values()) == list(range(len(vocabulary)))
    except (ValueError, AttributeError, TypeError, RecursionError):
        complete = False
    if not complete or not {PAD, EOS, UNK} <= vocabulary.keys():
        raise InputError(
            f"{path} is damaged: expected an object of words numbered from 0 with {PAD}, {EOS} and {UNK} among them; "
            "remove it and it is made from the training captions"
        )
    return dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))


def _read_cache(path, digest, splits):
    """(tables, index, vocabulary) of a cache of the same files, else None."""
    try:
        with np.load(path, allow_pickle=False) as content:
            if str(content["digest"]) != digest:
                return None
            tables, index = ({split: content[f"{kind}_{split}"] for split in splits} for kind in ("tokens", "index"))
            words = json.loads(str(content["vocabulary"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return tables, index, {word: number for number, word in enumerate(words)}


def _write_cache(path, digest, tables, index, vocabulary):
    words = sorted(vocabulary, key=vocabulary.get)
    arrays = {f"tokens_{split}": table for split, table in tables.items()}
    arrays |= {f"index_{split}": codes for split, codes in index.items()}
    buffer = io.BytesIO()
    np.savez(buffer, digest=np.array(digest), vocabulary=np.array(json.dumps(words)), **arrays)
    with contextlib.suppress(OSError):  # a data set that cannot be written is read all the same
        write_bytes(path, buffer.getbuffer())


def check_captions(path, captions, values, own, others, first_line=1):
    """Raise InputError unless equal captions state equal values, and none but those.

    captions: of the file `path`; values: dict factor → (N,) integers of the same rows; own: the factors that the captions
    of the setting speak of; others: those that they leave out; first_line: number of the first caption's line in the file.
    Captions of another setting or split fail, whatever words they use, as soon as captions repeat.
    """
    index = captions.index.numpy()
    _, first = np.unique(index, return_index=True)
    representative = first[index]  # every number below M occurs, so `first` has M entries
    for name in own:
        if (differ := values[name] != values[name][representative]).any():
            row = int(differ.argmax())
            raise InputError(
                f"{path}: line {first_line + row} reads as line {first_line + representative[row]}, and their {name} differ: "
                "the captions are of another setting or split than the CSV file; make both again"
            )
    for name in others:
        told = values[name] == values[name][representative]
        if len(index) - len(first) >= CHANCE_REPEATS and np.ptp(values[name]) and told.all():
            raise InputError(
                f"{path}: the captions tell {name}, which this setting leaves out: they are of another one; make them again"
            )


# --------------------------------------------------------------------------------------------------------------
# images


def open_npz_images(path):
    """(images, grid): memory map (N, H, W, 3) uint8 of the member `images`, and the member `grid` as a tuple, None without it.

    A stored member is mapped in place; a compressed one is unpacked once, into a file beside `path` that carries its
    checksum in its name. Nothing is ever unpickled. Raises InputError that names what is missing, damaged or of another kind.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if "images.npy" not in archive.namelist():
                raise InputError(
                    f"{path} holds {', '.join(archive.namelist())[:100] or 'nothing'}, expected an array `images`"
                )
            member = archive.getinfo("images.npy")
            with archive.open(member) as stream:
                shape, start = _read_image_header(stream, f"{path}: images")
            if member.file_size != start + math.prod(shape):
                raise InputError(f"{path} is damaged: `images` of shape {shape} has {member.file_size - start} bytes")
            grid = _read_grid(archive, path)
            if member.compress_type == zipfile.ZIP_STORED:
                return _map_images(path, _data_start(path, member) + start, shape), grid
            unpacked = path.with_name(f"{path.stem}.{member.CRC:08x}.npy")
            if not unpacked.exists():
                print(
                    f"{path} is compressed: unpacking {member.file_size / 1e9:.2f} GB once into {unpacked}", flush=True
                )
                with (
                    _made_once(unpacked, "the images are compressed and are unpacked") as temporary,
                    archive.open(member) as stream,
                    open(temporary, "wb") as target,
                ):
                    shutil.copyfileobj(stream, target, 2**24)
    except DAMAGED_ARCHIVE as error:
        raise InputError(f"{path} is truncated or damaged ({error}); get it again") from None
    except OSError as error:
        if error.filename is not None:
            raise  # the file cannot be read; what is damaged names none
        raise InputError(f"{path} is truncated or damaged ({error}); get it again") from None
    if unpacked.stat().st_size != start + math.prod(shape):
        raise InputError(f"{unpacked} is damaged; remove it, and it is made again")
    return _map_images(unpacked, start, shape), grid


@contextlib.contextmanager
def _made_once(path, what):
    """Context of `replaced` for a file that is made beside the data; InputError, which says why, if none can be made there."""
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(replaced(path))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise InputError(f"{path.parent} cannot be written, and {what} into a file there, once; copy the folder to where "
                             "you can write") from None  # fmt: skip
        yield temporary


def _read_image_header(stream, name):
    """(shape, bytes of the header) of an array in the .npy format; InputError unless it is (N, H, W, 3) uint8."""
    version = np.lib.format.read_magic(stream)
    length_format = "<H" if version == (1, 0) else "<I"
    (length,) = struct.unpack(length_format, stream.read(struct.calcsize(length_format)))
    if length > 2**16:
        raise ValueError("the header of images is too long")
    try:
        header = ast.literal_eval(stream.read(length).decode("utf-8"))
        shape, dtype, fortran_order = header["shape"], np.dtype(header["descr"]), header["fortran_order"]
    except (SyntaxError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(f"its header cannot be read: {type(error).__name__}") from None
    if dtype.hasobject:
        raise InputError(f"{name} is a pickled array, which is not opened: it could run any code; expected uint8")
    if dtype != np.uint8:
        raise InputError(f"{name} is {dtype}, expected uint8")
    if (
        not isinstance(shape, tuple)
        or len(shape) != 4
        or shape[3] != 3
        or not all(isinstance(size, int) and size > 0 for size in shape)
        or fortran_order
    ):
        raise InputError(f"{name} has shape {shape}, expected (N, height, width, 3) in C order")
    return shape, 8 + struct.calcsize(length_format) + length


def _read_grid(archive, path):
    if "grid.npy" not in archive.namelist():
        return None
    grid = np.lib.format.read_array(io.BytesIO(archive.read("grid.npy")), allow_pickle=False)
    if grid.ndim != 1 or grid.dtype.kind not in "iu" or (grid < 1).any():
        raise InputError(f"{path} is damaged: `grid` must be the sizes of the factors, positive integers")
    return tuple(grid.tolist())


def _data_start(path, member):
    """Offset of a stored member's bytes in the archive: behind a local header that repeats its name."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile("no header where `images` starts")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return member.header_offset + 30 + name_length + extra_length


def _map_images(path, start, shape):
    if path.stat().st_size < start + math.prod(shape):
        raise InputError(f"{path} is truncated: `images` of shape {shape} does not fit into it; get it again")
    # copy on write, so that torch takes it for writable; no page is ever written
    return np.memmap(path, np.uint8, mode="c", offset=start, shape=shape)


def open_image_folder(folder):
    """Memory map (N, H, W, 3) uint8 of the images 0.png, 1.png, … of a folder, in order of their numbers; .jpg is read too.

    They are decoded once, into a file beside the folder whose name carries a digest of their names, sizes and times of
    modification; images that have changed since are decoded again, and the older file removed. Raises InputError that
    names an image that is missing, damaged or of another size than the first.
    """
    folder = Path(folder)
    entries = _numbered_images(folder)
    digest = hashlib.blake2b(digest_size=8)
    for entry in entries:
        status = entry.stat()
        digest.update(f"{entry.name}/{status.st_size}/{status.st_mtime_ns}\n".encode())
    digest, paths = digest.hexdigest(), [Path(entry.path) for entry in entries]
    decoded = folder.with_name(f"{folder.name}.{digest}.npy")
    if (images := _map_decoded(decoded, len(paths))) is not None:
        return images
    with locked(folder.with_name(f".{folder.name}.lock")):  # jobs that start together: one decodes, the others wait
        if (images := _map_decoded(decoded, len(paths))) is not None:
            return images
        with _made_once(decoded, "the images are decoded") as temporary, open(temporary, "wb") as file:
            shape = _decode_images(paths, file, decoded)
            start = file.tell() - math.prod(shape)
    for other in folder.parent.glob(f"{folder.name}.{'[0-9a-f]' * len(digest)}.npy"):
        if other != decoded:
            other.unlink()
    return _map_images(decoded, start, shape)


def _map_decoded(path, count):
    """Memory map of `count` images that were decoded into `path`, None if it is not there or not whole."""
    with contextlib.suppress(FileNotFoundError, ValueError, struct.error, InputError), open(path, "rb") as file:
        shape, start = _read_image_header(file, path)
        if shape[0] == count and path.stat().st_size == start + math.prod(shape):
            return _map_images(path, start, shape)
    return None


def _numbered_images(folder):
    """List of the os.DirEntry of the images of a folder, in order of their numbers; InputError unless these are 0 … N − 1."""
    found = {}
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is missing: {CAUSAL_TOOLS}/generate_images.py renders the images") from None
    for entry in entries:
        stem, suffix = os.path.splitext(entry.name)
        if suffix.lower() in (".png", ".jpg", ".jpeg") and stem.isdecimal():
            if int(stem) in found:
                raise InputError(f"{folder} holds {found[int(stem)].name} and {entry.name}: two images of one number")
            found[int(stem)] = entry
    if not found:
        raise InputError(f"{folder} holds no images 0.png, 1.png, …; {CAUSAL_TOOLS}/generate_images.py renders them")
    absent = next((number for number in range(len(found)) if number not in found), None)
    if absent is not None:
        raise InputError(
            f"{folder} has an image number {max(found)} and none of number {absent}; "
            f"{CAUSAL_TOOLS}/generate_images.py renders what is missing"
        )
    return [found[number] for number in range(len(found))]


def _decode_images(paths, file, decoded):
    """Write the images of `paths` as one uint8 array in the .npy format into `file`; returns its shape."""
    first = _decoded(paths[0])
    shape, started, reported = (len(paths), *first.shape), time.perf_counter(), time.perf_counter()
    print(f"decoding {len(paths):,} images once, {math.prod(shape) / 1e9:.2f} GB, into {decoded}", flush=True)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(paths), DECODED_AT_ONCE):
            part = paths[start : start + DECODED_AT_ONCE]
            for path, image in zip(part, pool.map(_decoded, part), strict=True):
                if image.shape != first.shape:
                    height, width = image.shape[:2]
                    raise InputError(f"{path} has {height} × {width} pixels and {paths[0].name} "
                                     f"{shape[1]} × {shape[2]}; expected images of one size")  # fmt: skip
                file.write(image)
            done = start + len(part)
            if time.perf_counter() - reported > PROGRESS_SECONDS or (done == len(paths) > DECODED_AT_ONCE):
                reported = time.perf_counter()
                rate = done / (reported - started)
                left = round((len(paths) - done) / rate)
                print(f"image {done:,}/{len(paths):,}  {rate:.0f} images/s, {left} s left", flush=True)
    return shape


def _decoded(path):
    """(H, W, 3) uint8 of an image file; InputError that names a damaged one."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file cannot be read; what is damaged has no number of the system's
        raise InputError(f"{path} is damaged ({error}); remove it and render it again") from None


class Images:
    """Images of which batches are taken: (N, H, W, 3) uint8 on disk or, where they fit, on the GPU.

    workers: threads that read a batch from disk, 0 for none of their own; they serve disks that answer slowly.
    """

    def __init__(self, array, device="cpu", workers=0):
        self.device, self.array, self.resident = torch.device(device), array, None
        self._readers = concurrent.futures.ThreadPoolExecutor(workers) if workers > 1 else None
        self._parts = max(workers, 1)
        if self.device.type == "cuda" and array.nbytes + GPU_RESERVE <= torch.cuda.mem_get_info(self.device)[0]:
            self.resident = torch.empty(array.shape, dtype=torch.uint8, device=self.device)
            rows = max(1, 2**26 // array[0].nbytes)
            for start in range(0, len(array), rows):
                self.resident[start : start + rows] = torch.from_numpy(array[start : start + rows])

    def __len__(self):
        return len(self.array)

    @property
    def index_device(self):
        """Device that `take` wants its rows on."""
        return self.device if self.resident is not None else torch.device("cpu")

    def take(self, rows):
        """(B, H, W, 3) uint8 on the device, for (B,) int64 rows on `index_device`."""
        if self.resident is not None:
            return self.resident[rows]
        pinned = self.device.type == "cuda"
        batch = torch.empty((len(rows), *self.array.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
        pieces = zip(np.array_split(rows.numpy(), self._parts), np.array_split(batch.numpy(), self._parts), strict=True)
        if self._readers:
            list(self._readers.map(lambda piece: self._copy(*piece), pieces))
        else:
            self._copy(*next(pieces))
        return batch.to(self.device, non_blocking=True)

    def _copy(self, rows, target):
        # "clip" writes into `target` directly, and the rows are in range
        np.take(self.array, rows, axis=0, out=target, mode="clip")


# --------------------------------------------------------------------------------------------------------------
# pairs


@dataclasses.dataclass
class Split:
    """Pairs of one split: rows (N,) int64 of their images, their captions, image_factors and text_factors.

    The factors are dicts name → (N,) int64, or float64 where they are continuous.
    """

    rows: torch.Tensor
    captions: Captions
    image_factors: dict
    text_factors: dict

    def __len__(self):
        return len(self.rows)


class ImageTextPairs:
    """Splits of pairs over one set of images: batches as tensors on the device.

    splits: dict name → Split; vocabulary: dict word → number; length: tokens of a caption; fingerprint: a text that
    differs between any two sets of pairs, as to captions, vocabulary, order, number of images and FINGERPRINT_IMAGES of them.
    """

    def __init__(self, images, splits, vocabulary):
        self.images, self.vocabulary, self.splits = images, vocabulary, {}
        for name, split in splits.items():
            rows, captions = split.rows.to(images.index_device), split.captions.to(images.device)
            self.splits[name] = dataclasses.replace(split, rows=rows, captions=captions)
        self.length = next(iter(splits.values())).captions.tokens.shape[1]
        digest = hashlib.blake2b(json.dumps([list(vocabulary), len(images)]).encode(), digest_size=16)
        for number in np.linspace(0, len(images) - 1, FINGERPRINT_IMAGES, dtype=np.int64):
            digest.update(images.array[number].tobytes())
        for split in splits.values():
            for part in (split.rows, split.captions.tokens, split.captions.index):
                digest.update(part.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def images_of(self, split, rows):
        """(B, H, W, 3) uint8 images of the pairs `rows`, (B,) int64 on any device, of a split."""
        own = self.splits[split].rows
        return self.images.take(own[rows.to(own.device)])

    def encode_images(self, split, rows, encoder, batch_size):
        """(len(rows), D) encodings of the images of the pairs `rows`, a batch at a time."""
        return torch.cat([encoder(self.images_of(split, part)) for part in rows.split(batch_size)])

    def encode_captions(self, split, rows, encoder, batch_size):
        """(len(rows), D) encodings of the captions of the pairs `rows`; each distinct caption is encoded once."""
        captions = self.splits[split].captions
        distinct, place = captions.index[rows.to(captions.index.device)].unique(return_inverse=True)
        encodings = [encoder(captions.tokens[part].long()) for part in distinct.split(batch_size)]
        return torch.cat(encodings)[place]

    def tokens_of(self, split, rows):
        """(B, L) int64 tokens of the captions of the pairs `rows` of a split."""
        captions = self.splits[split].captions
        return captions.take(rows.to(captions.index.device, non_blocking=True))


class EpochOrder:
    """Rows of batches: each epoch a fresh permutation, whose last incomplete batch is dropped.

    Its state stands for the order of the data in a checkpoint: the generator as the epoch began, and the rows given out.
    """

    def __init__(self, size, generator, device="cpu"):
        """Order `size` pairs by a CPU torch.Generator; the rows come out on `device`."""
        self._size, self._generator, self._device = size, generator, device
        self._begin_epoch()

    def _begin_epoch(self):
        self._epoch_state, self._position = self._generator.get_state(), 0
        self._order = torch.randperm(self._size, generator=self._generator).to(self._device)

    def next(self, batch_size):
        """(batch_size,) int64; ValueError if there are fewer pairs than that."""
        if batch_size > self._size:
            raise ValueError(f"a batch of {batch_size} pairs, and there are {self._size}")
        if self._position + batch_size > self._size:
            self._begin_epoch()
        self._position += batch_size
        return self._order[self._position - batch_size : self._position]

    def get_state(self):
        """uint8 tensor for `set_state`, as a torch.Generator has it."""
        position = torch.tensor([self._position], dtype=torch.int64)
        return torch.cat((position.view(torch.uint8), self._epoch_state))

    def set_state(self, state):
        """Go on where `get_state` was taken."""
        self._generator.set_state(state[8:].clone())
        self._begin_epoch()
        self._position = state[:8].clone().view(torch.int64).item()


# --------------------------------------------------------------------------------------------------------------
# MPI3D-Complex


def mpi3d_images(folder):
    """(images, grid): the memory-mapped images of a folder, and dict factor → number of its values.

    Raises InputError if they are missing, damaged, or not as many as the grid has points.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder, expected that of MPI3D-Complex; --datapath names another one")
    path = folder / MPI3D_FILE
    if not path.exists():
        raise InputError(
            f"{path} is missing: get it from {MPI3D_SOURCE}, or draw stand-in images with "
            f"rendering_data/MPI3D/render_standin_images.py --output-dir {folder}"
        )
    images, sizes = open_npz_images(path)
    sizes = tuple(MPI3D_GRID.values()) if sizes is None else sizes
    if len(sizes) != len(MPI3D_GRID) or math.prod(sizes) != len(images):
        raise InputError(
            f"{path} holds {len(images)} images, expected {math.prod(sizes)} of the grid {' × '.join(map(str, sizes))}"
        )
    for (name, largest), size in zip(MPI3D_GRID.items(), sizes, strict=True):
        if size > largest:
            raise InputError(f"{path} is damaged: its `grid` has {size} values of {name}, and there are {largest}")
    return images, dict(zip(MPI3D_GRID, sizes, strict=True))


def load_mpi3d(folder, bias_type, bias_id, device="cpu", workers=0):
    """(pairs, setting) of MPI3D-Complex: ImageTextPairs with the splits "train" and "test", in the order of their files.

    Raises InputError, one line that names the file, for whatever is missing, damaged or does not fit together.
    """
    folder, setting, name = Path(folder), mpi3d_setting(bias_type, bias_id), f"{bias_type}_{bias_id}"
    images, grid = mpi3d_images(folder)
    splits = ("train", "test")
    files = {split: folder / split / f"text_{name}.txt" for split in splits}
    for path in files.values():
        if not path.exists():
            raise InputError(
                f"{path} is missing: rendering_data/MPI3D/render_multimodal_mpi3d.py --output-dir {folder} writes it"
            )
    parts = {split: (path, slice(None)) for split, path in files.items()}
    captions, vocabulary = load_captions(parts, folder / f"vocab_{name}.json", folder / f"tokens_{name}.npz")
    loaded = {}
    for split in splits:
        image_path, text_path = (
            folder / split / file for file in ("image_semantics.csv", f"text_semantics_{name}.csv")
        )
        image_values = _read_factors(image_path, grid)
        text_values = _read_factors(text_path, {factor: grid[factor] for factor in setting.selected})
        counts = {
            path: len(next(iter(values.values())))
            for path, values in ((image_path, image_values), (text_path, text_values))
        }
        counts[files[split]] = len(captions[split].index)
        if len(set(counts.values())) > 1:
            rows = ", ".join(f"{path.name} {count}" for path, count in counts.items())
            raise InputError(f"{folder / split}: the files disagree in their number of rows ({rows}); make them again")
        _check_factors(text_path, image_values, text_values, setting.selected, setting.perturbed)
        others = [factor for factor in MPI3D_GRID if factor not in setting.selected]
        check_captions(files[split], captions[split], {**image_values, **text_values}, setting.selected, others)
        rows = np.ravel_multi_index(tuple(image_values.values()), tuple(grid.values()))
        tensors = (
            {factor: torch.from_numpy(column) for factor, column in part.items()}
            for part in (image_values, text_values)
        )
        loaded[split] = Split(torch.from_numpy(rows), captions[split], *tensors)
    if (count := sum(map(len, loaded.values()))) != len(images):
        raise InputError(
            f"{folder}: train and test have {count} rows and there are {len(images)} images; make the captions again, "
            "with the grid of the images"
        )
    numbers = np.concatenate([split.rows.numpy() for split in loaded.values()])
    if (times := np.bincount(numbers)).max() > 1:
        raise InputError(
            f"{folder}: train and test have image {times.argmax()} {times.max()} times, and each once is right; make the "
            "captions again"
        )
    return ImageTextPairs(Images(images, device, workers), loaded, vocabulary), setting


def _read_factors(path, sizes):
    """Dict factor → (N,) int64 of a CSV with exactly the factors of `sizes`; InputError for values off the grid."""
    table = read_csv(path, sizes)
    return {name: _checked_values(path, table[name], size) for name, size in sizes.items()}


def _checked_values(path, column, size):
    """(N,) int64 of a column (a Series) of integers from 0 to size − 1, or float64 in [0, 1] where size is None.

    Raises InputError that names the first value that is something else.
    """
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, copy=True)
    valid = (values >= 0) & (values <= (1 if size is None else size - 1))
    if size is not None:
        valid &= values == np.floor(values)
    if not valid.all():
        row = int(valid.argmin())
        expected = "numbers from 0 to 1" if size is None else f"integers from 0 to {size - 1}"
        raise InputError(
            f"{path}: {column.name} is {column.iloc[row]}, expected {expected} (line {row + 2}); make the file again"
        )
    return values if size is None else values.astype(np.int64)


def _check_factors(path, image_values, text_values, names, perturbed):
    """Raise InputError unless the text differs from the image in the factors `perturbed` of `names`, and in no other."""
    for name in names:
        differ = np.abs(image_values[name] - text_values[name]) > 1e-6  # files may have been written with fewer digits
        if name not in perturbed and differ.any():
            raise InputError(
                f"{path}: {name} differs from the image's in row {int(differ.argmax()) + 1}, and this setting does not "
                "perturb it: the file is of another setting or split; make it again"
            )
        if name in perturbed and np.ptp(image_values[name]) and len(differ) >= UNTOUCHED_ROWS and not differ.any():
            raise InputError(
                f"{path}: {name} is the image's in every row, and this setting perturbs it: the file is of another setting; "
                "make it again"
            )


# --------------------------------------------------------------------------------------------------------------
# Causal3DIdent


def load_causal3dident(folder, bias_type, bias_id, device="cpu", workers=0):
    """(pairs, setting) of Causal3DIdent: ImageTextPairs with the splits "train", "fit" and "test".

    They are the first 80 % of the rows in file order, the next 10 %, and the rest. image_factors are those of CAUSAL_IMAGE,
    text_factors what the captions of the setting state, and their phrasing. Raises InputError, one line that names the
    file, for whatever is missing, damaged or does not fit together.
    """
    folder, setting, name = Path(folder), causal_setting(bias_type, bias_id), f"{bias_type}_{bias_id}"
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder, expected that of Causal3DIdent; the scripts in {CAUSAL_TOOLS} make one, and "
            "--datapath names another"
        )
    stated = [*map(causal_text_factor, setting.selected), "text_phrasing"]
    image_path, text_path = folder / "latents_image.csv", folder / f"latents_text_{name}.csv"
    check_rendered_latents(folder)
    image_values = _read_latents(image_path, CAUSAL_IMAGE)
    text_values = _read_latents(text_path, {factor: CAUSAL_TEXT[factor] for factor in stated})
    texts = folder / "text" / name
    if not (texts / "text_raw.txt").exists():
        raise InputError(
            f"{texts / 'text_raw.txt'} is missing: {CAUSAL_TOOLS}/generate_text.py --output-folder {folder} writes it"
        )
    total = len(image_values["object_shape"])
    bounds = (0, total * 8 // 10, total * 9 // 10, None)
    splits = {split: slice(*bounds[k : k + 2]) for k, split in enumerate(("train", "fit", "test"))}
    if total < 10:
        raise InputError(f"{image_path} has {total} rows, expected at least 10: a tenth of them tests")
    parts = {split: (texts / "text_raw.txt", part) for split, part in splits.items()}
    captions, vocabulary = load_captions(parts, texts / "vocab.json", texts / "tokens.npz")
    counts = {
        image_path.name: total,
        text_path.name: len(text_values["text_phrasing"]),
        f"text/{name}/text_raw.txt": sum(len(part.index) for part in captions.values()),
        "images/": len(_numbered_images(folder / "images")),
    }
    if len(set(counts.values())) > 1:
        rows = ", ".join(f"{file} {count}" for file, count in counts.items())
        raise InputError(f"{folder}: the files disagree in their number of samples ({rows}); make them again")
    _check_factors(
        text_path, image_values, text_values, [n for n in setting.selected if n in text_values], setting.perturbed
    )
    loaded = {}
    for split, part in splits.items():
        own = ({factor: column[part] for factor, column in values.items()} for values in (image_values, text_values))
        loaded[split] = Split(
            torch.arange(total)[part],
            captions[split],
            *({factor: torch.from_numpy(column) for factor, column in values.items()} for values in own),
        )
        _check_causal_captions(texts / "text_raw.txt", loaded[split])
    return ImageTextPairs(Images(open_image_folder(folder / "images"), device, workers), loaded, vocabulary), setting


def check_rendered_latents(folder):
    """Raise InputError if images.json, where there is one, says that the images were rendered from other latents."""
    path, latents = Path(folder) / "images.json", _bytes_or_none(Path(folder) / "latents_image.csv")
    if path.exists() and latents is not None and read_json(path).get("latents") != hashlib.sha256(latents).hexdigest():
        raise InputError(
            f"{folder}: images/ was rendered from other latents than latents_image.csv, as {path.name} says; remove both and "
            f"render them again with {CAUSAL_TOOLS}/generate_images.py, or restore the latents"
        )


def _read_latents(path, factors):
    """Dict factor → (N,) of a CSV with the columns `factors`, a dict name → number of values or None, and maybe others.

    Earlier tools spelled the spotlight's colour `splotlight_color`. Raises InputError for a column that is missing, for gaps
    and for values out of range.
    """
    if not path.exists():
        raise InputError(f"{path} is missing; {CAUSAL_TOOLS}/generate_latents.py writes it")
    table = read_table(path).rename(columns=lambda name: name.replace("splotlight", "spotlight"))
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()][0]
        raise InputError(f"{path} has the column {twice} in two spellings; remove one of them")
    if missing := [name for name in factors if name not in table]:
        raise InputError(f"{path} has no column {', '.join(missing)}; {CAUSAL_TOOLS}/generate_latents.py writes it")
    if table.empty:
        raise InputError(f"{path} has no rows; {CAUSAL_TOOLS}/generate_latents.py writes them")
    return {name: _checked_values(path, table[name], size) for name, size in factors.items()}


def _check_causal_captions(path, split):
    """Raise InputError unless the captions of a Split state its text_factors and no others, as far as captions repeat."""

    def told(factors):
        # captions state the spotlight's position in fifths
        return {
            name: (5 * values).long().clamp(max=4).numpy() if name == "spotlight_pos" else values.numpy()
            for name, values in factors.items()
        }

    image, text = told(split.image_factors), told(split.text_factors)
    silent = [name for name in CAUSAL_SEMANTICS[:4] if name not in text]
    check_captions(path, split.captions, {**image, **text}, list(text), silent, first_line=1 + int(split.rows[0]))
