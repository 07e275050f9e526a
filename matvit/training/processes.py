"""One process per device: what they share in a run. With one device, all of this does nothing.

Gradients are averaged here, not by `DistributedDataParallel`: a step has one backward pass per
submodel, each through other slices of the parameters, and one exchange at its end is enough.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from subprocess import Popen

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from matvit.errors import RecipeError, first_line
from matvit.threads import usable_cores
from matvit.training.recipe import Recipe


def start_fabric(recipe: Recipe) -> Fabric:
    """The recipe's devices, their processes started. Raises RecipeError when there are fewer."""
    strategy = "auto" if recipe.devices == 1 else "ddp"
    try:
        fabric = Fabric(accelerator="auto", devices=recipe.devices, strategy=strategy, precision=recipe.precision)
    except Exception as error:  # Fabric raises several kinds
        raise RecipeError(
            what=f"{recipe.devices} devices cannot be had ({first_line(error)})",
            where="devices",
            fix="lower devices in the recipe",
        ) from error
    if fabric.device.type == "cpu" and recipe.devices > usable_cores():
        raise RecipeError(
            what=f"{recipe.devices} devices are more than the {usable_cores()} cores of this CPU",
            where="devices",
            fix="lower devices in the recipe",
        )
    fabric.launch()
    return fabric


@contextmanager
def ending_together(fabric: Fabric) -> Iterator[None]:
    """Where the first process fails within, those that it started end, too: they would wait for it in an exchange.

    The other way round Fabric sees to it: it ends the first process, and all others, where one of these fails.
    """
    try:
        yield
    except BaseException:
        others: list[Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", [])
        killed = list(others)
        others.clear()  # or Fabric would end this process, too, before it says why
        for process in killed:
            process.kill()
        raise


def average_gradients(fabric: Fabric, parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes; each step's submodels are the same in all."""
    if fabric.world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:  # all blocks left of a mixed spec are XL's, and these frozen
        return
    mean = mean_of(fabric, torch.cat([gradient.flatten() for gradient in gradients]))
    parts = torch.split(mean, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def mean_of(fabric: Fabric, tensor: Tensor) -> Tensor:
    """The mean of `tensor` over the processes."""
    mean = fabric.all_reduce(tensor, reduce_op="mean")
    assert isinstance(mean, Tensor)
    return mean


def send_to_all(fabric: Fabric, module: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers."""
    if fabric.world_size == 1:
        return
    for tensor in module.state_dict().values():
        torch.distributed.broadcast(tensor, src=0)


def check_equal(fabric: Fabric, *modules: nn.Module) -> None:
    """Raises RecipeError unless all processes hold the same weights, which equal steps should have kept equal."""
    if fabric.world_size == 1:
        return
    digest = hashlib.sha256()
    for module in modules:
        for tensor in module.state_dict().values():
            digest.update(tensor.flatten().view(torch.uint8).cpu().numpy())
    everyone = fabric.all_gather(torch.tensor(list(digest.digest()), dtype=torch.uint8, device=fabric.device))
    assert isinstance(everyone, Tensor)
    if not torch.equal(everyone, everyone[:1].expand_as(everyone)):
        raise RecipeError(
            what="the devices' weights have drifted apart", where="devices", fix="use equal devices, or one"
        )
