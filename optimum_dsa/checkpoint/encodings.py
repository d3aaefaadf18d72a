"""How a tensor is stored: a row per encoding, and the files that hold it. A new row is all that a new encoding takes.

An encoded tensor is a vector of bytes under the tensor's own name, and begins with a header that says type and shape:
what it will become is known, and held against its length, before memory is taken for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..common.registry import Registry
from ..packed import bitmask, quantised


QUANT_METHOD = "optimum-dsa"  # in `config.json`; the name under which transformers finds our loader


class Header(Protocol):
    """What an encoded tensor says of itself."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Weights, zeros included."""

    @property
    def bytes(self) -> int:
        """Bytes of the encoded tensor."""


@dataclass(frozen=True)
class Encoding:
    """A way to store tensors.

    Attributes:
        name (`str`): of the row.
        stem (`str`): what its files are called: `stem.safetensors`, `stem-00001-of-00003.safetensors`, ...
        encode (`Callable`): a tensor on the CPU -> its bytes, (bytes,) uint8; `None` where it stays as it is.
        decode (`Callable`): the bytes, and a name for errors -> the tensor, bit for bit, on the same device.
        read_header (`Callable`): the first `header_bytes` bytes, the length of all, a name for errors -> the header;
            `None` where the bytes are something else. `ValueError` where they cannot be what they say.
        header_bytes (`int`): at most.
        version (`int`): of its format.
        alias (`str`, *optional*): another name for users.
    """

    name: str
    stem: str
    encode: Callable[[Tensor], Tensor | None] | None = None
    decode: Callable[[Tensor, str], Tensor] | None = None
    read_header: Callable[[bytes, int, str], Header | None] | None = None
    header_bytes: int = 0
    version: int = 1
    alias: str | None = None

    @property
    def shown(self) -> str:
        """What users call it."""
        return self.alias or self.name

    @property
    def is_plain(self) -> bool:
        """Whether tensors are stored as they are, which every reader of safetensors understands."""
        return self.encode is None

    @property
    def entry(self) -> dict[str, Any] | None:
        """`quantization_config` in `config.json`; `None` where nothing has to be said."""
        if self.is_plain:
            return None
        said = {} if self.name == _UNNAMED else {"encoding": self.name}
        return {"quant_method": QUANT_METHOD, "format_version": self.version, **said}


ENCODINGS = Registry("encoding")
_UNNAMED = "bitmask"  # the first that there was: an entry without a name means it

DENSE = ENCODINGS.add("dense", Encoding("dense", "model"))
BITMASK = ENCODINGS.add(
    "bitmask",
    Encoding(
        "bitmask", "dsa_model", bitmask.pack, bitmask.unpack, bitmask.read_header, bitmask.LARGEST, alias="compressed"
    ),
)
BITMASK_WHOLE = ENCODINGS.add(
    "bitmask_whole",
    Encoding(
        *("bitmask_whole", "dsa_quantised_model"),
        *(quantised.pack, quantised.unpack, quantised.read_header, quantised.LARGEST),
        alias="quantised",
    ),
)


def encoding_named(name: Any) -> Encoding:
    """The row that users call `name`.

    Raises:
        ValueError: there is none.
    """
    for encoding in ENCODINGS.values():
        if name in (encoding.name, encoding.alias):
            return encoding
    known = " or ".join(repr(encoding.shown) for encoding in ENCODINGS.values())
    raise ValueError(f"A checkpoint is stored as {known}, got {name!r}.")


def encoding_in(config: Any) -> Encoding | None:
    """The encoding that the content of a `config.json` speaks of; `None` for a quantisation that is not ours.

    Raises:
        ValueError: it is ours, and no row here.
    """
    section = config.get("quantization_config") if isinstance(config, dict) else None
    if not section:
        return DENSE
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        return None
    return encoding_named(section.get("encoding", _UNNAMED))


def header_in(start: bytes, length: int, name: str) -> tuple[Encoding, Header] | None:
    """Which row the first bytes of a vector of `length` bytes are of, and what they say; `None` for anything else."""
    for encoding in ENCODINGS.values():
        if encoding.read_header is not None:
            header = encoding.read_header(start[: encoding.header_bytes], length, name)
            if header is not None:
                return encoding, header
    return None


def header_bytes() -> int:
    """As many bytes as any row's header takes."""
    return max(encoding.header_bytes for encoding in ENCODINGS.values())


def decoded(tensor: Tensor, name: str = "tensor") -> Tensor | None:
    """What an encoded tensor, (bytes,) uint8, stands for; `None` for one that is stored as it is, of any shape."""
    # A model may have vectors of uint8 of its own: the header decides.
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) == 0:
        return None
    found = header_in(tensor[: header_bytes()].cpu().numpy().tobytes(), len(tensor), name)
    return None if found is None else found[0].decode(tensor, name)
