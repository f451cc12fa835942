"""Images with captions, as tensors: opened in seconds, never read whole, and gathered without a line of Python per sample.

MPI3D-Complex in one folder:

    real3d_complicated_shapes_ordered.npz                     images (N, 64, 64, 3) uint8, in row-major order of the grid
    {train,test}/image_semantics.csv                          the seven factors of each image
    {train,test}/text_semantics_{selection|perturbation}_{0..4}.csv   what its caption speaks of
    {train,test}/text_{selection|perturbation}_{0..4}.txt     its caption, one a line
    {train,test}/omitted_{selection|perturbation}_{0..4}.csv  1 where it leaves a factor out after all; without it none does
    vocab_{selection|perturbation}_{0..4}.json                w2i: word → number; without it the training captions give it

Causal3DIdent in one folder, its rows in the order of the images' numbers:

    images/000000.png …                                       (H, W), all of one size; .jpg is accepted too
    latents_image.csv                                         the factors of each image
    latents_text_{selections|perturbations}_{0..6}.csv        what its caption says
    omitted_text_{selections|perturbations}_{0..6}.csv        1 where it leaves a factor out after all; without it none does
    text/{selections|perturbations}_{0..6}/text_raw.txt       its caption, one a line

Images stay on disk as a memory map, or move to the GPU once. Captions repeat: each distinct one is tokenised once, and a
caption is the number of its row in the table of distinct ones.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch

from reading.captions import UNK, Captions, check_captions, load_captions
from reading.causal3dident import (
    CAUSAL_IMAGE,
    CAUSAL_SEMANTICS,
    CAUSAL_TEXT,
    CAUSAL_TOOLS,
    causal_text_factor,
    check_rendered_latents,
    protocols_of,
    read_factors,
    read_latents,
    read_omitted,
    spotlight_fifths,
)
from reading.images import Images, check_stored_images, checked_once, numbered_images, open_image_folder, open_npz_images
from reading.mpi3d import check_scenes
from running.command_line import InputError

MPI3D_GRID = {"OBJ_COLOR": 4, "OBJ_SHAPE": 4, "OBJ_SIZE": 2, "CAMERA": 3, "BACKGROUND": 3, "H_AXIS": 40, "V_AXIS": 40}
MPI3D_SEMANTICS = tuple(MPI3D_GRID)[:5]  # what captions speak of; the positions of the axes are the image's own
MPI3D_FILE, MPI3D_TOOLS = "real3d_complicated_shapes_ordered.npz", "rendering_data/MPI3D"
MPI3D_SOURCE = "https://github.com/rr-learning/disentanglement_dataset"
MPI3D_MEAN, MPI3D_STD = (0.00888889, 0.00888889, 0.00830382), (0.08381344, 0.07622504, 0.06356431)
BIAS_TYPES, BIAS_IDS = ("selection", "perturbation"), range(5)

CAUSAL_MEAN, CAUSAL_STD = (0.4327, 0.2689, 0.2839), (0.1201, 0.1457, 0.1082)

UNTOUCHED_ROWS = 100  # rows from which a factor that is never replaced is no accident
FINGERPRINT_IMAGES = 64  # by whose pixels a resumed run knows its images


@dataclasses.dataclass(frozen=True)
class Bias:
    """Names of the factors that captions speak of, I_θ, and of those that they may state wrongly, I_ρ.

    omitted: share of what the training captions would state that they leave out, at random.
    """

    selected: tuple
    perturbed: tuple
    omitted: float = 0.0

    @property
    def unbiased(self):
        """I_θ \\ I_ρ: what the theory says is learned."""
        return tuple(name for name in self.selected if name not in self.perturbed)


def mpi3d_bias(bias_type, bias_id):
    """Bias number `bias_id` of bias_type: selections grow from OBJ_COLOR on, perturbations from BACKGROUND back."""
    return _nested_bias(MPI3D_SEMANTICS, bias_type, bias_id)


def causal_bias(bias_type, bias_id):
    """Bias number `bias_id`: selections grow from object_shape on, perturbations from background_color back."""
    return _nested_bias(CAUSAL_SEMANTICS, bias_type, bias_id)


def _nested_bias(semantics, bias_type, bias_id):
    """The first bias_id + 1 semantics selected, or all of them and the last bias_id perturbed."""
    if bias_type.startswith("selection"):
        return Bias(semantics[: bias_id + 1], ())
    return Bias(semantics, semantics[len(semantics) - bias_id :])


@dataclasses.dataclass
class Split:
    """Pairs of a split: rows (N,) int64 of their images, captions, and factors: dicts name → (N,) int64, or float64 in [0, 1]."""

    rows: torch.Tensor
    captions: Captions
    image_factors: dict
    text_factors: dict

    def __len__(self):
        return len(self.rows)


class ImageTextPairs:
    """Splits of pairs over one set of images: batches as tensors on the device.

    splits: dict name → Split; vocabulary: dict word → number; length: tokens of a caption; fingerprint: a text that
    differs between any two sets of pairs, as to captions, vocabulary, order, number of images and FINGERPRINT_IMAGES of them;
    made_by: dict "captions", "images" → the protocol that they were made by, where the data say so and it matters.
    """

    def __init__(self, images, splits, vocabulary, made_by=()):
        self.images, self.vocabulary, self.splits, self.made_by = images, vocabulary, {}, dict(made_by)
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

    def with_training_words(self):
        """The same pairs for a model that knows the words of the training captions alone: all others are {unk}.

        Words are numbered in order of appearance, those of the training captions first.
        """
        count = 1 + max(self.vocabulary[UNK], self.splits["train"].captions.tokens.max().item())
        splits = {
            name: dataclasses.replace(
                split, rows=split.rows.cpu(), captions=split.captions.with_words(count, self.vocabulary[UNK])
            )
            for name, split in self.splits.items()
        }
        return ImageTextPairs(self.images, splits, dict(itertools.islice(self.vocabulary.items(), count)), self.made_by)

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

    def __init__(self, size, generator, device="cpu", pinned=False):
        """Order `size` pairs by a CPU torch.Generator; the rows come out on `device`.

        pinned: whether the order lies in pinned memory, from where a GPU copies it, or a batch of it, while the host goes on.
        """
        self._size, self._generator, self._device, self._pinned = size, generator, device, pinned
        self._begin_epoch()

    def _begin_epoch(self):
        self._epoch_state, self._position = self._generator.get_state(), 0
        order = torch.randperm(self._size, generator=self._generator, pin_memory=self._pinned)
        self._order = order.to(self._device, non_blocking=True)

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


# MPI3D-Complex


def mpi3d_images(folder):
    """(images, grid): memory map of a folder, and dict factor → number of values; InputError if they are missing or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder, expected that of MPI3D-Complex; --datapath names another one")
    path = folder / MPI3D_FILE
    if not path.exists():
        drawn = f"draw stand-in images with {MPI3D_TOOLS}/render_standin_images.py --output-dir {folder}"
        raise InputError(f"{path} is missing: get it from {MPI3D_SOURCE}, or {drawn}")
    images, sizes = open_npz_images(path)
    sizes = tuple(MPI3D_GRID.values()) if sizes is None else sizes
    if len(sizes) != len(MPI3D_GRID) or math.prod(sizes) != len(images):
        grid = " × ".join(map(str, sizes))
        raise InputError(f"{path} holds {len(images)} images, expected {math.prod(sizes)} of the grid {grid}")
    grid = mpi3d_grid(sizes, f"{path} is damaged: its `grid`")

    def check():
        check_stored_images(path)
        check_scenes(path, images, grid)

    checked_once(path, check)
    return images, grid


def mpi3d_grid(sizes, origin):
    """Dict factor → number of values, of seven sizes; InputError, of that origin, if there are more than the data set has."""
    grid = dict(zip(MPI3D_GRID, sizes, strict=True))
    for name, size in grid.items():
        if size > MPI3D_GRID[name]:
            raise InputError(f"{origin} has {size} values of {name}, and there are {MPI3D_GRID[name]}")
    return grid


def load_mpi3d(folder, bias_type, bias_id, device="cpu", workers=0):
    """(pairs, bias) of MPI3D-Complex: ImageTextPairs with the splits "train" and "test", in the order of their files.

    Raises InputError, one line that names the file, for whatever is missing, damaged or does not fit together.
    """
    folder, bias, name = Path(folder), mpi3d_bias(bias_type, bias_id), f"{bias_type}_{bias_id}"
    images, grid = mpi3d_images(folder)
    others = [factor for factor in grid if factor not in bias.selected]
    parts = {split: (folder / split / f"text_{name}.txt", slice(None)) for split in ("train", "test")}
    for path, _ in parts.values():
        if not path.exists():
            raise InputError(f"{path} is missing: {MPI3D_TOOLS}/render_multimodal_mpi3d.py --output-dir {folder} writes it")
    captions, vocabulary = load_captions(parts, folder / f"vocab_{name}.json", folder / f"tokens_{name}.npz")
    loaded = {}
    for split, (path, _) in parts.items():
        image_path, text_path = path.with_name("image_semantics.csv"), path.with_name(f"text_semantics_{name}.csv")
        image = read_factors(image_path, grid)
        text = read_factors(text_path, {factor: grid[factor] for factor in bias.selected})
        rows = np.ravel_multi_index(tuple(image.values()), tuple(grid.values()))
        counts = {image_path.name: len(rows), text_path.name: len(text["OBJ_COLOR"]), path.name: len(captions[split].index)}
        _check_counts(folder / split, counts)
        _check_factors(text_path, image, text, bias)
        omitted = read_omitted(path.with_name(f"omitted_{name}.csv"), bias.selected, len(rows))
        check_captions(path, captions[split], _told(image | text, omitted), bias.selected, others)
        if split == "train":
            bias = _with_omissions(bias, omitted)
        loaded[split] = Split(torch.from_numpy(rows), captions[split], _tensors(image), _tensors(text))
    times, again = torch.bincount(torch.cat([split.rows for split in loaded.values()])), "make the captions again"
    if times.sum() != len(images):
        raise InputError(f"{folder}: train and test have {times.sum()} rows and there are {len(images)} images; {again}")
    if times.max() > 1:
        raise InputError(f"{folder}: train and test have image {times.argmax()} {times.max()} times, not once; {again}")
    return ImageTextPairs(Images(images, device, workers), loaded, vocabulary), bias


def _tensors(values, part=slice(None)):
    return {factor: torch.from_numpy(column[part]) for factor, column in values.items()}


def _told(values, omitted):
    """Dict factor → (N,) of what captions state: −1 in the place of what they leave out; omitted: dict factor → (N,) bool."""
    return values | {name: np.where(flags, -1, values[name]) for name, flags in omitted.items()}


def _with_omissions(bias, omitted):
    """The bias with the share of `omitted`, a dict factor → (N,) bool of the training captions."""
    return dataclasses.replace(bias, omitted=np.mean(list(omitted.values())).item())


def _check_counts(folder, counts):
    """Raise InputError unless the files of a folder, a dict name → number of samples, all have as many."""
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{file} {count}" for file, count in counts.items())
        raise InputError(f"{folder}: the files disagree in their number of samples ({found}); make them again")


def _check_factors(path, image, text, bias):
    """Raise InputError unless the captions of `path` differ from the images in what the bias perturbs, and in nothing else."""
    for name in filter(text.__contains__, bias.selected):
        differ = np.abs(image[name] - text[name]) > 1e-6  # files may have been written with fewer digits
        if name not in bias.perturbed and differ.any():
            found = f"{name} differs from the image's in row {int(differ.argmax()) + 1}, and this setting does not perturb it"
        elif name in bias.perturbed and np.ptp(image[name]) and len(differ) >= UNTOUCHED_ROWS and not differ.any():
            found = f"{name} is the image's in every row, and this setting perturbs it, at a rate above 0"
        else:
            continue
        raise InputError(f"{path}: {found}: the file is of another setting or split; make it again")


# Causal3DIdent


def load_causal3dident(folder, bias_type, bias_id, device="cpu", workers=0):
    """(pairs, bias) of Causal3DIdent: ImageTextPairs with the splits "train", "fit" and "test".

    They are the first 80 % of the rows in file order, the next 10 %, and the rest. image_factors are those of CAUSAL_IMAGE,
    text_factors what the captions of the setting state, and their phrasing; the vocabulary has the words of all rows. Raises
    InputError, one line that names the file, for whatever is missing, damaged or does not fit together.
    """
    folder, bias, name = Path(folder), causal_bias(bias_type, bias_id), f"{bias_type}_{bias_id}"
    if not folder.is_dir():
        made = f"the scripts in {CAUSAL_TOOLS} make one, and --datapath names another"
        raise InputError(f"{folder} is no folder, expected that of Causal3DIdent; {made}")
    image_path, text_path = folder / "latents_image.csv", folder / f"latents_text_{name}.csv"
    image = read_latents(image_path, CAUSAL_IMAGE)
    check_rendered_latents(folder)
    stated = [*map(causal_text_factor, bias.selected), "text_phrasing"]
    text = read_latents(text_path, {factor: CAUSAL_TEXT[factor] for factor in stated})
    texts = folder / "text" / name
    file, total = texts / "text_raw.txt", len(image["object_shape"])
    if not file.exists():
        raise InputError(f"{file} is missing: {CAUSAL_TOOLS}/generate_text.py --output-folder {folder} writes it")
    if total < 10:
        raise InputError(f"{image_path} has {total} rows, expected at least 10: a tenth of them tests")
    fit, test = total * 8 // 10, total * 9 // 10
    splits = {"train": slice(0, fit), "fit": slice(fit, test), "test": slice(test, None)}
    parts = {split: (file, part) for split, part in splits.items()}
    captions, vocabulary = load_captions(parts, texts / "vocab.json", texts / "tokens.npz", heard=parts)
    entries = numbered_images(folder / "images")
    counts = {
        image_path.name: total,
        text_path.name: len(text["text_phrasing"]),
        f"text/{name}/text_raw.txt": sum(len(part.index) for part in captions.values()),
        "images/": len(entries),
    }
    _check_counts(folder, counts)
    _check_factors(text_path, image, text, bias)
    told = image | text
    told["spotlight_pos"] = spotlight_fifths(told["spotlight_pos"])  # as captions state it
    omitted = read_omitted(folder / f"omitted_text_{name}.csv", bias.selected, total)
    omitted = {causal_text_factor(factor): flags for factor, flags in omitted.items()}
    silent = [name for name in CAUSAL_SEMANTICS[:4] if name not in text]
    loaded = {}
    for split, part in splits.items():
        values = {name: column[part] for name, column in _told(told, omitted).items()}
        check_captions(file, captions[split], values, stated, silent, first_line=1 + part.start)
        loaded[split] = Split(torch.arange(total)[part], captions[split], _tensors(image, part), _tensors(text, part))
    bias = _with_omissions(bias, {factor: flags[splits["train"]] for factor, flags in omitted.items()})
    images = open_image_folder(folder / "images", entries)
    return ImageTextPairs(Images(images, device, workers), loaded, vocabulary, protocols_of(folder, name)), bias
