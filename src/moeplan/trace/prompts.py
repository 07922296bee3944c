"""Prompt features: what a trace may keep of its prompts, so that experts can be predicted from them.

`ids` are the prompt's token ids: whoever has the tokenizer reads the prompt. `hashed` are unordered counts of its 1-
and 2-grams under a secret: without the secret they show how long a prompt is and which prompts share words; with it, a
dictionary recovers most of them. Neither is anonymous.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from moeplan.arrays import Int64Array
from moeplan.errors import FormatError, OutputError, UsageError
from moeplan.io.files import atomic_path
from moeplan.io.paths import open_input

__all__ = [
    "PRIVATE",
    "PromptFeatures",
    "PromptKind",
    "PromptPolicy",
    "find_secret",
    "hash_key",
    "key_id",
    "make_secret",
    "read_secret",
    "secret_beside",
]

PromptKind = Literal["ids", "hashed"]
Uint32Array = npt.NDArray[np.uint32]
Uint16Array = npt.NDArray[np.uint16]

#: Bytes of a secret: fewer can be guessed.
MIN_SECRET_BYTES, SECRET_BYTES = 16, 32
#: Only the owner reads files with prompt features or secrets.
PRIVATE = 0o600


@dataclass(frozen=True)
class PromptFeatures:
    """Features of n prompts, in the order of the requests of a trace.

    A prompt that is not known has no features.

    Attributes:
        kind: "ids": the prompts' token ids; "hashed": counts of hashed 1- and 2-grams.
        offsets: int64 [n + 1], rising from 0; request r has features offsets[r] .. offsets[r + 1] - 1.
        tokens: uint32 [T]; ids: the token ids in order; hashed: the distinct hashes of a request, ascending.
        counts: uint16 [T], how often each hash occurs (65,535: at least so often); None for ids.
        key: of hashed features, names the secret (`key_id`); empty for ids.

    Raises:
        FormatError: offsets that fall or do not fit, or counts that are missing.

    Examples:
        >>> import moeplan
        >>> prompts = moeplan.PromptFeatures.of_ids([[5, 6, 5, 6], [7]])
        >>> prompts.of(1)
        (array([7], dtype=uint32), None)
        >>> hashed = prompts.hashed(bytes(32))
        >>> sorted(hashed.of(0)[1].tolist())  # two 1-grams and one 2-gram twice, one 2-gram once
        [1, 2, 2, 2]
    """

    kind: PromptKind
    offsets: Int64Array
    tokens: Uint32Array
    counts: Uint16Array | None = None
    key: str = ""

    def __post_init__(self) -> None:
        offsets, size = self.offsets, len(self.tokens)
        if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != size or (np.diff(offsets) < 0).any():
            raise FormatError(f"offsets of prompts must rise from 0 to {size}")
        if self.kind == "ids" and self.counts is not None:
            raise FormatError("prompts of kind ids have no counts")
        if self.kind == "hashed" and (self.counts is None or len(self.counts) != size):
            raise FormatError("hashed prompts need a count for each hash")

    @classmethod
    def of_ids(cls, prompts: Sequence[npt.ArrayLike]) -> PromptFeatures:
        """Features of kind ids from a sequence of token ids for each prompt."""
        offsets = np.concatenate(([0], np.cumsum([len(np.atleast_1d(prompt)) for prompt in prompts], dtype=np.int64)))
        tokens = np.concatenate([np.empty(0, np.uint32), *(np.asarray(prompt, np.uint32) for prompt in prompts)])
        return cls("ids", offsets, tokens)

    @classmethod
    def empty(cls, n: int, kind: PromptKind = "ids", key: str = "") -> PromptFeatures:
        """Features of n prompts that are not known."""
        counts = np.empty(0, np.uint16) if kind == "hashed" else None
        return cls(kind, np.zeros(n + 1, np.int64), np.empty(0, np.uint32), counts, key)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """bool [n], prompts that have features."""
        return np.asarray(np.diff(self.offsets) > 0)

    def of(self, r: int) -> tuple[Uint32Array, Uint16Array | None]:
        """(tokens, counts) of request r; counts is None for ids."""
        part = slice(self.offsets[r], self.offsets[r + 1])
        return self.tokens[part], None if self.counts is None else self.counts[part]

    def take(self, index: npt.ArrayLike) -> PromptFeatures:
        """The features of some requests (numbers or a mask), in the order given."""
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == np.bool_ else index.astype(np.int64)
        length = np.diff(self.offsets)[index]
        offsets = np.concatenate(([0], np.cumsum(length)))
        at = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][index] - offsets[:-1], length)
        counts = None if self.counts is None else self.counts[at]
        return PromptFeatures(self.kind, offsets, self.tokens[at], counts, self.key)

    def hashed(self, secret: bytes) -> PromptFeatures:
        """Counts of hashed 1- and 2-grams under a secret: the one definition for traces, plans and gateways.

        The hash of a gram is SipHash-2-4 of its ids as little-endian 32-bit words, cut to the low 32 bits; its key is
        the BLAKE2b digest (16 bytes, person `moeplan-prompts`) of the secret.

        Args:
            secret: at least 16 random bytes; see `make_secret`.

        Raises:
            UsageError: the features are hashed already, or the secret is too short.
        """
        from moeplan._kernels.ngrams import count_ngrams

        if self.kind == "hashed":
            raise UsageError("the prompts are hashed already", hint="keep them as they are")
        _check_secret(secret)
        counted = count_ngrams(self.tokens, self.offsets, hash_key(secret))
        return PromptFeatures("hashed", *counted, key_id(secret))


@dataclass(frozen=True)
class PromptPolicy:
    """What a trace keeps of the prompts.

    Attributes:
        kind: "ids" or "hashed".
        secret: of hashed features that are made from ids.
        key: names the secret (`key_id`); follows from the secret where that is given.

    Raises:
        UsageError: hashed without a secret or the name of one.
    """

    kind: PromptKind
    secret: bytes | None = field(default=None, repr=False)
    key: str = ""

    def __post_init__(self) -> None:
        if self.kind == "hashed" and self.secret is not None:
            object.__setattr__(self, "key", key_id(self.secret))
        if self.kind == "hashed" and not self.key:
            raise UsageError("hashed prompts need a secret", hint="give --prompt-secret FILE")

    def source(self) -> dict[str, str]:
        """What a trace's `source` says of it, so that a recording is resumed as it was begun."""
        return {"prompt_tokens": self.kind, **({"prompt_key": self.key} if self.key else {})}

    def kept(self, prompt: PromptFeatures, where: str | None = None) -> PromptFeatures:
        """Features as the trace stores them.

        Raises:
            FormatError: ids of hashed features, or features hashed under another secret.
        """
        if prompt.kind == "ids":
            if self.kind == "ids":
                return prompt
            if self.secret is None:
                raise UsageError("hashed prompts need a secret", where=where, hint="give --prompt-secret FILE")
            return prompt.hashed(self.secret)
        if self.kind == "ids" or prompt.key != self.key:
            what = "ids cannot be had from hashed prompts" if self.kind == "ids" else "hashed under another secret"
            raise FormatError(what, where=where, hint="keep them as they are: --keep-prompt-tokens hashed")
        return prompt


def hash_key(secret: bytes) -> npt.NDArray[np.uint64]:
    """uint64 [2]: the key of `PromptFeatures.hashed` that a secret gives."""
    digest = hashlib.blake2b(secret, digest_size=16, person=b"moeplan-prompts").digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def key_id(secret: bytes) -> str:
    """16 hex digits that name a secret without revealing it."""
    _check_secret(secret)
    return hashlib.blake2b(secret, digest_size=8, person=b"moeplan-keyid").hexdigest()


def _check_secret(secret: bytes) -> None:
    if len(secret) < MIN_SECRET_BYTES:
        raise UsageError(f"a secret of {len(secret)} bytes can be guessed", hint="moeplan makes one of 32 bytes")


def secret_beside(trace: Path) -> Path:
    """Where the secret of a trace lies unless told otherwise: beside its folder, so that the folder can be shared."""
    return trace.parent / f"{trace.name}.secret"


def find_secret(trace: Path, key: str) -> bytes:
    """The secret that `key` names, from the file beside a trace.

    Raises:
        FormatError: no such file, or it holds another secret.
    """
    file = secret_beside(trace)
    if not file.exists():
        raise FormatError("the secret of its prompts is not beside it", where=str(trace), hint=f"put it at {file}")
    secret = read_secret(file)
    if key_id(secret) != key:
        raise FormatError(f"is not the secret of the prompts of {trace.name}", where=str(file))
    return secret


def make_secret(path: Path) -> bytes:
    """A new secret of 32 random bytes, written as hex to a file that only its owner can read.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    secret = secrets.token_bytes(SECRET_BYTES)
    if path.exists():
        raise OutputError("already exists", where=str(path), hint="remove it, or choose another place")
    with atomic_path(path, mode=PRIVATE) as temporary:
        temporary.write_text(secret.hex() + "\n", encoding="ascii")
    return secret


def read_secret(path: Path) -> bytes:
    """The secret in a file that `make_secret` wrote.

    Raises:
        FormatError: it cannot be read, or is no secret.
    """
    try:
        with open_input(path) as file:
            text = file.read(4096)
        secret = bytes.fromhex(text.decode("ascii").strip())
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path), hint="check the path") from None
    except ValueError:
        raise FormatError("is not a secret (hexadecimal digits)", where=str(path)) from None
    if len(secret) < MIN_SECRET_BYTES:
        raise FormatError(f"is a secret of {len(secret)} bytes, too short", where=str(path))
    return secret
