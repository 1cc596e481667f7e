"""A safetensors file of weights with a checksum, written through a temporary name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_CHECKSUM = "sha256"


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write weights with the rights that a new file usually has; a file that was there before is replaced.

    Raises:
        OSError: if it cannot be written; what was there before is left.
    """
    own = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.touch()
        rights = temporary.stat().st_mode
        save_file(own, temporary, {"format": "pt", _CHECKSUM: _checksum(own)})
        # safetensors gives its files rights for their owner alone.
        temporary.chmod(rights)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}): make room") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file; one without a checksum, as older ones are, is read, too.

    Raises:
        ValueError: if it is missing or damaged, or holds what is no finite number.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: restore the file") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): restore the file") from None
    if _CHECKSUM in about and about[_CHECKSUM] != _checksum(found):
        raise ValueError(f"{path} is damaged (its checksum is that of other weights): restore the file")
    for name, value in sorted(found.items()):
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise ValueError(f"{path} holds values that are no finite numbers ({name}): restore the file")
    return found


def _checksum(weights: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
