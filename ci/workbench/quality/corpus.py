# SPDX-License-Identifier: Apache-2.0
"""Text that every machine with Python has: the sources and documentation of its standard library, as tokens.

Which files are held out depends only on their names, so measured text is never trained on.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from workbench.loads.checkpoints import SPECIAL_TOKENS

_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__")
"""Excluded: other packages, and long repetitive files."""

_HELD_OUT_ONE_IN = 16
END = SPECIAL_TOKENS.index("<|endoftext|>")
"""Token between files."""


@dataclass(frozen=True)
class Corpus:
    """A tokenizer, and the tokens of the training text and of the held-out text.

    Attributes:
        train: int64 ``[tokens]``.
        held_out: int64 ``[tokens]``.
    """

    tokenizer: Tokenizer
    train: torch.Tensor
    held_out: torch.Tensor


def read_corpus(vocab_size: int) -> Corpus:
    """The standard library's ``*.py`` files, ``pydoc_data/topics.py`` (the language reference) among them."""
    train: list[str] = []
    held_out: list[str] = []
    for path in _files(Path(sysconfig.get_path("stdlib"))):
        digest = hashlib.sha256(path.name.encode()).digest()
        (train if digest[0] % _HELD_OUT_ONE_IN else held_out).append(path.read_text(encoding="utf-8", errors="ignore"))
    tokenizer = _tokenizer(train, vocab_size)
    return Corpus(tokenizer, _tokens(tokenizer, train), _tokens(tokenizer, held_out))


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not any(part in _LEFT_OUT for part in path.relative_to(root).parts):
            yield path


def _tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    parts = [[*encoded.ids, END] for encoded in tokenizer.encode_batch(texts)]
    return torch.tensor([token for part in parts for token in part], dtype=torch.int64)


def windows(tokens: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """``count`` windows, spread evenly: ``[count, length]``."""
    starts = torch.linspace(0, len(tokens) - length, count, dtype=torch.float64).long()
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])
