"""Captions as numbers: each distinct one is tokenised once, and a caption is the number of its row in their table."""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from running.command_line import InputError
from running.files import opened_npz, read_text, regular_file, write_bytes

CHANCE_REPEATS = 20  # repeated captions from which it is no accident that a factor they leave out agrees
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
        text = read_text(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8 ({error}); make it again") from None
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


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

    def with_words(self, count, unknown):
        """The same, on the CPU, with `unknown` for every number from `count` on."""
        tokens = self.tokens.cpu().int()
        tokens = torch.where(tokens < count, tokens, unknown)
        return Captions(tokens.to(torch.uint8 if count <= 256 else torch.int32), self.index.cpu())


def load_captions(parts, vocabulary_file, cache_file, heard=("train",)):
    """(captions, vocabulary): dict split → Captions, and dict word → number.

    parts: dict split → (file, slice of its lines), with "train" among the splits. Each caption ends with {eos} and is padded
    with {pad}, up to the longest of all splits plus one, so that one encoder reads them all. The vocabulary is that of
    vocabulary_file; where there is none it is {pad}, {eos}, {unk}, then the words of the splits `heard` in order of
    appearance. The result is kept in cache_file, if that can be written, and taken from there as long as the files hold the
    same bytes. Prints a line where the vocabulary lacks words of the training captions. Raises InputError that names a missing
    or damaged file or an empty caption.
    """
    digest = hashlib.blake2b(repr([(split, lines, split in heard) for split, (_, lines) in parts.items()]).encode())
    files = dict.fromkeys(path for path, _ in parts.values())
    for path in (*files, vocabulary_file):  # the vocabulary last: its content is needed again
        content = regular_file(path).read_bytes() if Path(path).exists() else None
        digest.update(struct.pack("<q", -1 if content is None else len(content)))
        digest.update(content or b"")
    loaded = _read_cache(cache_file, digest.hexdigest(), parts)
    if loaded is None:
        loaded = _tokenise_files(parts, files, heard, _parsed_vocabulary(vocabulary_file, content))
        _write_cache(cache_file, digest.hexdigest(), *loaded)
    captions, vocabulary = loaded
    if share := _share_unknown(captions["train"], vocabulary[UNK]):
        print(f"{vocabulary_file} lacks words of {share:.1%} of the training captions, which are read as {UNK}; where the "
              "captions are newer than it, remove it, and it is made of theirs", flush=True)  # fmt: skip
    return captions, vocabulary


def _share_unknown(captions, unknown):
    """Share of captions with a word that the vocabulary lacks."""
    return (captions.tokens == unknown).any(dim=1)[captions.index.long()].double().mean().item()


def _tokenise_files(parts, files, heard, vocabulary):
    """What `load_captions` returns, from the captions' `files`; vocabulary: None for that of the splits `heard`."""
    files = {path: read_lines(path) for path in files}
    for path, lines in files.items():
        if empty := next((number for number, line in enumerate(lines, 1) if not line.strip()), None):
            raise InputError(f"{path}: the caption in line {empty} is empty; make the file again")
    distinct, index = {}, {}
    for split, (path, part) in parts.items():
        if not files[path][part]:
            raise InputError(f"{path} holds no caption for {split}; make it again")
        numbers, captions = pd.factorize(np.array(files[path][part], dtype=object))
        index[split], distinct[split] = torch.from_numpy(numbers.astype(np.int32)), list(map(tokenise, captions))
    vocabulary = vocabulary or number_words(caption for split in heard for caption in distinct[split])
    length = 1 + max(len(caption) for captions in distinct.values() for caption in captions)
    return {split: Captions(_encode(distinct[split], vocabulary, length), index[split]) for split in parts}, vocabulary


def number_words(captions):
    """Dict word → number of tokenised captions: {pad}, {eos}, {unk}, then their words in order of appearance."""
    words = dict.fromkeys((PAD, EOS, UNK, *(word for caption in captions for word in caption)))
    return {word: number for number, word in enumerate(words)}


def _encode(captions, vocabulary, length):
    """(M, length) table of token numbers, in the smallest integers that hold the vocabulary."""
    table = np.full((len(captions), length), vocabulary[PAD], np.uint8 if len(vocabulary) <= 256 else np.int32)
    for row, caption in zip(table, captions, strict=True):
        row[: len(caption) + 1] = [vocabulary.get(word, vocabulary[UNK]) for word in (*caption, EOS)]
    return torch.from_numpy(table)


def _parsed_vocabulary(path, content):
    """Dict word → number of the bytes of the JSON file `path`, None for None; {"w2i": …} around it is accepted."""
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
    """(captions, vocabulary) of a cache of the same files, else None."""
    try:
        with opened_npz(path) as content:
            if str(content["digest"]) != digest:
                return None
            words = json.loads(str(content["vocabulary"]))
            captions = {}
            for split in splits:
                tokens, index = content[f"tokens_{split}"], content[f"index_{split}"]
                kinds = tokens.ndim, index.ndim, index.dtype.name, tokens.dtype.name in ("uint8", "int32")
                within = 0 <= index.min() <= index.max() < len(tokens) and 0 <= tokens.min() <= tokens.max() < len(words)
                if kinds != (2, 1, "int32", True) or not within:
                    return None
                captions[split] = Captions(torch.from_numpy(tokens), torch.from_numpy(index))
            return captions, {word: number for number, word in enumerate(words)}
    except Exception:  # whatever is wrong with it, it is made again
        return None


def _write_cache(path, digest, captions, vocabulary):
    words = sorted(vocabulary, key=vocabulary.get)
    arrays = {f"tokens_{split}": part.tokens.numpy() for split, part in captions.items()}
    arrays |= {f"index_{split}": part.index.numpy() for split, part in captions.items()}
    buffer = io.BytesIO()
    np.savez(buffer, digest=np.array(digest), vocabulary=np.array(json.dumps(words)), **arrays)
    with contextlib.suppress(OSError):  # a data set that cannot be written is read all the same
        write_bytes(path, buffer.getbuffer())


def check_captions(path, captions, values, own, others, first_line=1):
    """Raise InputError unless equal captions state equal values, and none but those.

    captions: of the file `path`; values: dict factor → (N,) integers of the same rows, −1 where a caption leaves the factor
    out; own: the factors that the captions of the setting speak of; others: those that they never do; first_line: number of
    the first caption's line in the file.
    Captions of another setting or split fail, whatever words they use, as soon as captions repeat.
    """
    index = captions.index.numpy()
    _, first = np.unique(index, return_index=True)
    representative = first[index]  # every number below M occurs, so `first` has M entries
    for name in own:
        if (differ := values[name] != values[name][representative]).any():
            row = int(differ.argmax())
            raise InputError(
                f"{path}: line {first_line + row} reads as line {first_line + representative[row]}, and their {name} differ: the "
                "captions are of another setting or split than the CSV files; make all again"
            )
    for name in others:
        told = values[name] == values[name][representative]
        if len(index) - len(first) >= CHANCE_REPEATS and np.ptp(values[name]) and told.all():
            raise InputError(f"{path}: the captions tell {name}, which this setting leaves out; make those of this setting")
