"""How a model is spread over the processes of a run, and its parts on disk.

    alone       one process
    replicated  every process has the whole model and reads rows of its own; gradients are averaged
                (DistributedDataParallel, which transformers' Trainer puts around the model)
    sharded     every process keeps a part of the weights, gradients and optimizer state, and gathers one
                block at a time (FSDP2: `torch.distributed.fsdp.fully_shard`)

Checkpoints of the last are written in parts by torch.distributed.checkpoint, as safetensors, and the others'
as whole files. Each can be read by any number of processes in any of the three ways.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from titans.hf import parts
from titans.nn.mlp import SwiGLU
from titans.train import checkpoint as files
from titans.train.processes import Processes

_OPTIMIZER = "optimizer"
WEIGHTS_FILE = "model.safetensors"


class Whole:
    """The model as it is in every process: alone, or replicated.

    averages_gradients: whether the model does so by itself, once it is spread.
    """

    averages_gradients = False

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def spread(self, model: PreTrainedModel, mixed_precision: bool) -> None:
        """Take the model apart in place, before its optimizer is made."""

    def save(self, folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Write weights, configuration and optimizer state into a checkpoint; all processes call it."""
        if self.processes.is_first:
            save_whole(folder, model)
            files.save_optimizer(folder, optimizer, model)

    def save_model(self, folder: Path, model: PreTrainedModel) -> None:
        """Write the whole model, as `from_pretrained` reads it; all processes call it."""
        if self.processes.is_first:
            save_whole(folder, model)


class Sharded(Whole):
    """The model in parts, block by block, over all processes."""

    averages_gradients = True

    def spread(self, model: PreTrainedModel, mixed_precision: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        kind = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(kind, (self.processes.size,))
        blocks = model._no_split_modules or ()
        for layer in [module for module in model.modules() if type(module).__name__ in blocks]:
            # Mixed precision is autocast, which rounds weights of products to bfloat16 and leaves gates and
            # memories in float32. The feed-forward has products alone: rounded before it is gathered, half as
            # much is sent for the same result.
            mlp = getattr(layer, "mlp", None)
            if mixed_precision and isinstance(mlp, SwiGLU):
                policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
                fully_shard(mlp, mesh=mesh, mp_policy=policy)
            fully_shard(layer, mesh=mesh)
        # A part that writes rarely takes part in some steps, and not in all processes.
        fully_shard(model, mesh=mesh).set_reduce_scatter_unused_params(True)

    def save(self, folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        from torch.distributed import checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        if self.processes.is_first:
            model.config.save_pretrained(folder)
            (folder / parts.FOLDER).mkdir()
        self.processes.wait()
        writer = HuggingFaceStorageWriter(str(folder / parts.FOLDER), save_distributed=True)
        dcp.save(_tensors(model, optimizer), storage_writer=writer)

    def save_model(self, folder: Path, model: PreTrainedModel) -> None:
        weights, tied = {}, set(dict(model.named_parameters(remove_duplicate=False)))
        tied -= set(dict(model.named_parameters()))
        for name, value in model.state_dict().items():
            if name in tied:
                continue
            # Gathered one after the other, and kept by the first process alone.
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if self.processes.is_first:
                weights[name] = whole.cpu()
        if self.processes.is_first:
            save_whole(folder, model, weights)


ENGINES = {"ddp": Whole, "fsdp": Sharded}


def save_whole(folder: Path, model: PreTrainedModel, weights: dict[str, Tensor] | None = None) -> None:
    """Write a model, or these weights of it, in one file, whatever the size: it is read back by name."""
    model.save_pretrained(folder, state_dict=weights, max_shard_size="1000GB")


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Read the weights of a model of the same shapes; chunk sizes, which shape none, may be others.

    Raises:
        ValueError: naming the file, if it is missing, damaged or of another model.
    """
    parameters = dict(model.named_parameters())
    if parts.in_parts(folder):
        parts.read_model(folder, model)
        return
    file = folder / WEIGHTS_FILE
    try:
        if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
            with safe_open(str(file), framework="pt") as opened:  # type: ignore[no-untyped-call]
                for name, parameter in parameters.items():
                    _fill(parameter, opened.get_tensor(name))
        else:
            load_model(model, str(file), device=str(model.device))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{file} is missing, damaged or of another model ({reason}): delete {folder.name} to resume from "
            "an older checkpoint, or name another folder"
        ) from None


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Restore the state; learning rate and decay stay as the optimizer was made with.

    Raises:
        ValueError: if the file is missing, damaged or of another model.
    """
    parameters = dict(model.named_parameters())
    if parts.in_parts(folder):
        tensors = {}
        for name, size in parts.sizes(folder).items():
            kind, _, rest = name.partition("/")
            parameter = parameters.get(rest.rpartition("/")[0])
            if kind == _OPTIMIZER and parameter is not None:
                same = size == parameter.shape
                tensors[name] = torch.zeros_like(parameter.detach()) if same else torch.zeros(size)
        parts.read(folder, tensors)
        states = {name.partition("/")[2]: value for name, value in tensors.items()}
    else:
        states = files.read_optimizer(folder)
        for name, value in states.items():
            parameter = parameters.get(name.rpartition("/")[0])
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                states[name] = _spread_like(parameter, value)
    files.fill_optimizer(folder, states, optimizer, model)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state by name."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"{parts.MODEL}/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{_OPTIMIZER}/{name}/{key}"] = value
    return tensors


@torch.no_grad()
def _fill(parameter: Tensor, value: Tensor) -> None:
    if value.shape != parameter.shape:
        raise RuntimeError(f"shape {tuple(value.shape)} in place of {tuple(parameter.shape)}")
    parameter.copy_(_spread_like(parameter, value) if isinstance(parameter, DTensor) else value)


def _spread_like(parameter: DTensor, value: Tensor) -> DTensor:
    """A whole tensor that every process has read, spread as the parameter is."""
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
