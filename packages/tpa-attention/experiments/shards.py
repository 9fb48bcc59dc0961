"""Token shards: files of uint16, mapped and never read as a whole, in an order that one number describes.

A folder holds `train*.bin`, `val*.bin` and, if `prepare` wrote it, `meta.json` with the encoding and the
size of the vocabulary. nanoGPT's files and those of llm.c (with a header of 256 int32) are read as they are.

Every shard is cut into windows of `context` tokens and the token after them. Sequence k of a run is a window

    w(k) = (offset + stride (k mod n)) mod n,    gcd(stride, n) = 1

of the n windows; offset and stride are drawn for each epoch, k div n. An epoch meets every window once, and k
is all that a checkpoint has to know.

    python experiments/train_lm.py prepare --out DIR --encoding bytes FILE_OR_FOLDER ...
"""

import argparse
import importlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold_tools import data
from tenfold_tools.run_folder import UsageError, replace_file

MAGIC = 20240520  # first int32 of a file of llm.c and modded-nanogpt
HEADER_BYTES = 1024
END_OF_TEXT = 256  # after each document in the byte encoding
STDLIB = "stdlib"

Tokens = NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Training and held-out shards, and the vocabulary of their encoding; None if nothing says how large."""

    train: "Shards"
    val: "Shards"
    vocabulary: int | None


class Shards:
    """Windows of some token files.

    Args:
        files: tokens by the name of their file.
        context: tokens that a model reads at a time.

    Raises:
        UsageError: if no file holds one window.
    """

    def __init__(self, files: dict[str, Tokens], context: int) -> None:
        self.context = context
        self._tokens = list(files.values())
        self._names = list(files)
        counts = [max(len(tokens) - 1, 0) // context for tokens in self._tokens]
        self._ends = np.cumsum(counts)
        self.windows = int(self._ends[-1]) if counts else 0
        if self.windows == 0:
            longest = max((len(tokens) for tokens in self._tokens), default=0)
            raise UsageError(
                f"{', '.join(self._names)} must hold more than {context} tokens, got {longest} at most"
            )

    @property
    def fingerprint(self) -> list[list[Any]]:
        """Name and number of tokens of every file: what must not change when a run continues."""
        return [[name, len(tokens)] for name, tokens in zip(self._names, self._tokens, strict=True)]

    def rows(self, windows: Sequence[int], vocabulary: int) -> Tensor:
        """Windows with the token after each, (len(windows), context + 1).

        Raises:
            UsageError: if a token is not below `vocabulary`, with its file.
        """
        rows = np.stack([self._row(window, vocabulary) for window in windows])
        return torch.from_numpy(rows.astype(np.int64))

    def _row(self, window: int, vocabulary: int) -> Tokens:
        shard = int(np.searchsorted(self._ends, window, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        first = (window - before) * self.context
        row = self._tokens[shard][first : first + self.context + 1]
        if row.max() >= vocabulary:
            raise UsageError(f"{self._names[shard]} must hold tokens below {vocabulary}, got {row.max()}")
        return row

    def order(self, sequences: Iterable[int], seed: int) -> list[int]:
        """Windows of these sequences of a run; see the formula above."""
        return [self._place(*divmod(sequence, self.windows), seed) for sequence in sequences]

    def _place(self, epoch: int, index: int, seed: int) -> int:
        generator, n = np.random.default_rng([seed, epoch]), self.windows
        offset, stride = (int(number) for number in generator.integers(0, n, 2))
        while math.gcd(stride, n) != 1:
            stride += 1  # n itself is no stride, but gcd(n + 1, n) = 1 ends the search
        return (offset + stride * index) % n


# ------------------------------------------------------------------------------------------------- reading


def open_corpus(path: str, context: int) -> Corpus:
    """The shards in a folder, or the bytes of the standard library under the name "stdlib".

    Raises:
        UsageError: if there is no such folder, or its files are not as they should be.
    """
    if path == STDLIB:
        text = data.stdlib_source()
        train, val = (
            Shards({f"{name} bytes of {text.source}": part.astype(np.uint16)}, context)
            for name, part in (("training", text.train), ("held-out", text.test))
        )
        return Corpus(train, val, 256)
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"--data must be a folder of shards or {STDLIB!r}, got {path}, which is none")
    train, val = (Shards(shard_files(folder, split), context) for split in ("train", "val"))
    return Corpus(train, val, vocabulary_of(folder))


def shard_files(folder: Path, split: str) -> dict[str, Tokens]:
    """The mapped files of a split, by name.

    Raises:
        UsageError: if there are none, or one is no array of uint16.
    """
    paths = sorted(folder.glob(f"{split}*.bin"))
    if not paths:
        raise UsageError(f"{folder} must hold {split}*.bin, made by `train_lm.py prepare`, and has none")
    return {path.name: read_shard(path) for path in paths}


def read_shard(path: Path) -> Tokens:
    """The tokens of a file, mapped.

    Raises:
        UsageError: if it is no array of uint16, or has a header that promises another number of tokens.
    """
    size = path.stat().st_size
    if size % 2:
        raise UsageError(f"{path} must hold uint16 tokens, got an odd number of bytes")
    if size == 0:
        return np.empty(0, np.uint16)
    if size >= HEADER_BYTES:
        magic, _, count = (int(number) for number in np.fromfile(path, "<i4", 3))
        if magic == MAGIC:
            found = (size - HEADER_BYTES) // 2
            if count != found:
                raise UsageError(f"{path} must hold the {count} tokens of its header, got {found}")
            return np.memmap(path, "<u2", "r", offset=HEADER_BYTES)
    return np.memmap(path, "<u2", "r")


def vocabulary_of(folder: Path) -> int | None:
    """The vocabulary in `meta.json`; None where there is no such file.

    Raises:
        UsageError: if the file does not say it.
    """
    path = folder / "meta.json"
    if not path.exists():
        return None
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))["vocabulary"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} must give the vocabulary: {error!r}") from error
    if not isinstance(vocabulary, int) or not 1 <= vocabulary <= 65536:
        raise UsageError(f"the vocabulary in {path} must be in [1, 65536], got {vocabulary!r}")
    return vocabulary


# ------------------------------------------------------------------------------------------------- writing


def prepare(argv: Sequence[str]) -> int:
    """The command `prepare`: tokenise local text files into shards.

    Raises:
        UsageError: if a file or an option is not as it should be; shards written so far stay, without
            `meta.json`.
    """
    parser = argparse.ArgumentParser("train_lm.py prepare", description="Tokenise text files into shards.")
    add = parser.add_argument
    add("files", nargs="+", type=Path, help="text files (UTF-8), and folders, read in the order of paths")
    add("--out", type=Path, required=True, help="folder of the shards")
    add("--encoding", default="bytes", help="bytes (default), or an encoding of tiktoken such as gpt2")
    add("--shard-tokens", type=int, default=100_000_000, help="tokens per shard, default 10^8")
    add("--val-tokens", type=int, default=100_000, help="tokens held out from the start, default 10^5")
    args = parser.parse_intermixed_args(argv)
    for name in ("shard_tokens", "val_tokens"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
    if args.out.exists() and any(args.out.glob("*.bin")):
        raise UsageError(f"{args.out} holds shards; give another --out")
    encode, vocabulary = encoder(args.encoding)
    documents = list(text_files(args.files))
    cut = pieces((encode(path) for path in documents), shard_sizes(args.val_tokens, args.shard_tokens))
    first_two = list(islice(cut, 2))
    if len(first_two) < 2:
        held_out = sum(map(len, first_two))
        raise UsageError(f"the files must hold more than --val-tokens {args.val_tokens}, got {held_out}")
    args.out.mkdir(parents=True, exist_ok=True)
    counts = {"val": 0, "train": 0}
    for index, tokens in enumerate(chain(first_two, cut)):
        split, number = ("val", 0) if index == 0 else ("train", index - 1)
        counts[split] += len(tokens)
        little = tokens.astype("<u2")
        replace_file(args.out / f"{split}_{number:06d}.bin", little.tofile)
    meta = {"encoding": args.encoding, "vocabulary": vocabulary, "documents": len(documents), **counts}
    text = json.dumps(meta, indent=2) + "\n"
    replace_file(args.out / "meta.json", lambda path: path.write_text(text, encoding="utf-8"))
    return 0


def encoder(name: str) -> tuple[Callable[[Path], Tokens], int]:
    """The tokens of a file with an end-of-text token after them, and the size of the vocabulary.

    Raises:
        UsageError: if tiktoken is missing, does not know or cannot get the encoding, or it is too large.
    """
    if name == "bytes":
        return lambda path: np.append(np.fromfile(path, np.uint8), END_OF_TEXT).astype(np.uint16), 257
    try:
        tiktoken: Any = importlib.import_module("tiktoken")
    except ImportError as error:
        raise UsageError(
            f"--encoding {name} needs tiktoken: pip install tiktoken, or --encoding bytes"
        ) from error
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # unknown names, and every failure of a download
        raise UsageError(f"tiktoken has no --encoding {name}: {str(error).splitlines()[0]}") from error
    if encoding.n_vocab > 65536:
        raise UsageError(f"--encoding must have at most 65536 tokens to fit uint16, got {encoding.n_vocab}")

    def encode(path: Path) -> Tokens:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} must be UTF-8: {error}") from error
        return np.array([*encoding.encode_ordinary(text), encoding.eot_token], np.uint16)

    return encode, encoding.n_vocab


def text_files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files given and all files below the folders given, in the order of their paths.

    Raises:
        UsageError: for a path that does not exist.
    """
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} does not exist")
        if path.is_file():
            yield path
        else:
            found = (Path(root) / name for root, _, names in os.walk(path) for name in names)
            yield from sorted(found)


def shard_sizes(first: int, others: int) -> Iterator[int]:
    """`first`, then `others` without end."""
    yield first
    while True:
        yield others


def pieces(documents: Iterable[Tokens], sizes: Iterator[int]) -> Iterator[Tokens]:
    """The documents one after the other, cut into arrays of these sizes; the last may be shorter."""
    waiting: list[Tokens] = []
    held, size = 0, next(sizes)
    for document in documents:
        waiting.append(document)
        held += len(document)
        while held >= size:
            joined = np.concatenate(waiting)
            yield joined[:size]
            waiting, held, size = [joined[size:]], held - size, next(sizes)
    if held:
        yield np.concatenate(waiting)
