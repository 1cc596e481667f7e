"""Checkpoints from which a run resumes exactly. Their files hold data only: safetensors and JSON."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from titans.locks import alone
from titans.train.processes import Processes

NUM_KEPT = 2
_NAME = re.compile(r"checkpoint-\d+")
_OPTIMIZER_FILE, _RANDOM_FILE = "optimizer.safetensors", "random.safetensors"
_CURSORS_FILE = "stream.safetensors"


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in an output folder, oldest first."""
    if not output.is_dir():
        return []
    found = [path for path in output.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Lock an output folder: a second run would delete the first one's unfinished checkpoints.

    Systems and file systems without locks are not protected.

    Raises:
        ValueError: if another process is training there.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(alone(output, wait=False))
        except BlockingIOError as error:
            raise ValueError(
                f"output={str(output)!r}: another process is training there: wait until it has ended, or "
                "give another folder"
            ) from error
        yield


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Report a failure to write within this block.

    Raises:
        OSError: naming `target`, the reason and the last good checkpoint in its folder.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        left = checkpoints(target.parent)
        raise OSError(
            f"{target} could not be written ({_reason(error)}): make room or change its rights; "
            + (f"the last good checkpoint is {left[-1].name}" if left else "there is no checkpoint yet")
        ) from error


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target`, renamed to it after the block, or deleted if the block fails.

    Raises:
        OSError: if writing fails, naming the last good checkpoint.
    """
    with writing(target):
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            yield temporary
            flush(temporary)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def shared_folder(target: Path, processes: Processes) -> Iterator[Path]:
    """`atomic_folder` for all processes of a run: the first makes and renames it, each writes its files."""
    if not processes.is_first:
        yield Path(processes.from_first(""))
        processes.wait()
    else:
        with atomic_folder(target) as folder:
            processes.from_first(str(folder))
            yield folder
            processes.wait()
    # Only now may anyone rely on its name.
    processes.wait()


def flush(folder: Path) -> None:
    """Write a finished temporary folder to the disk and give it and what is in it the usual rights."""
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o777 & ~_umask())
            continue
        with path.open("rb") as opened:
            os.fsync(opened.fileno())
        path.chmod(0o666 & ~_umask())
    folder.chmod(0o777 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip().splitlines()[0]


def delete_old(output: Path) -> None:
    """Keep the newest checkpoints."""
    for path in checkpoints(output)[:-NUM_KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def delete_unfinished(output: Path) -> None:
    """Remove checkpoints that a killed process did not finish."""
    for path in output.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a temporary name."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary name in the same folder."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises:
        ValueError: if it is missing or damaged.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:  # type: ignore[no-untyped-call]
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({_reason(error)}): delete {path.parent.name} to resume from an "
            "older checkpoint"
        ) from None


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Write the optimizer's state, by parameter name."""
    tensors = {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    save_file(tensors, folder / _OPTIMIZER_FILE)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Restore the state; learning rate and decay stay as the optimizer was made with.

    Raises:
        ValueError: if the file is missing, damaged or of another model.
    """
    fill_optimizer(folder, read_optimizer(folder), optimizer, model)


def read_optimizer(folder: Path) -> dict[str, Tensor]:
    """What `save_optimizer` wrote, by PARAMETER/KEY.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    return read_tensors(folder / _OPTIMIZER_FILE)[1]


def fill_optimizer(
    folder: Path, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, model: nn.Module
) -> None:
    """Give an optimizer the state in `tensors`, by PARAMETER/KEY; `folder`, where it is from, is for errors.

    Raises:
        ValueError: if it lacks a parameter of the model.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("/")
        states.setdefault(parameter, {})[key] = value
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    described = optimizer.state_dict()
    try:
        described["state"] = {
            index: states[names[id(parameter)]]
            for group, original in zip(described["param_groups"], optimizer.param_groups, strict=True)
            for index, parameter in zip(group["params"], original["params"], strict=True)
        }
    except KeyError as error:
        raise ValueError(
            f"the optimizer's state in {folder} holds nothing for {error}: it is of another model"
        ) from None
    optimizer.load_state_dict(described)


def save_cursors(folder: Path, cursors: Tensor) -> None:
    """Write where each row of a streamed run is in its documents, as `titans.data.streamed` has it."""
    save_file({"cursors": cursors.contiguous()}, folder / _CURSORS_FILE)


def load_cursors(folder: Path) -> np.ndarray:
    """What `save_cursors` wrote.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    tensors = read_tensors(folder / _CURSORS_FILE)[1]
    if "cursors" not in tensors:
        raise ValueError(
            f"{folder / _CURSORS_FILE} holds no cursors: delete {folder.name} to resume from an older "
            "checkpoint"
        )
    return tensors["cursors"].numpy()


def save_random_state(folder: Path) -> None:
    """Write the states of all global random number generators."""
    _, keys, *numpy_rest = np.random.get_state()
    version, python_numbers, gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    about = {
        "numpy": json.dumps([int(numpy_rest[0]), int(numpy_rest[1]), float(numpy_rest[2])]),
        "python": json.dumps([version, list(python_numbers), gauss]),
    }
    save_file(tensors, folder / _RANDOM_FILE, about)


def load_random_state(folder: Path) -> None:
    """Restore what `save_random_state` wrote.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    about, tensors = read_tensors(folder / _RANDOM_FILE)
    version, python_numbers, gauss = json.loads(about["python"])
    random.setstate((version, tuple(python_numbers), gauss))
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *json.loads(about["numpy"])))
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
