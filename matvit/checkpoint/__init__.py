"""Checkpoints: a folder (or hub repository) that holds one trained elastic encoder.

config.json          format version, name, architecture, axes, preprocessing, weight file, space_id
model.safetensors    the full encoder's tensors, of which submodels are slices, and what these own besides
pareto.json          per submodel: FLOPs, parameters, measured quality and latency
training.json        recipe, data, seed, code version and metrics of the run that made it
README.md            model card
"""

from matvit.checkpoint.forms import Storage, pareto_row, read_config
from matvit.checkpoint.places import NoSuchCheckpointError, locate, refuse_inside, refuse_to_replace, refuse_unwritable
from matvit.checkpoint.reading import load
from matvit.checkpoint.writing import save, save_table

__all__ = [
    "NoSuchCheckpointError",
    "Storage",
    "load",
    "locate",
    "pareto_row",
    "read_config",
    "refuse_inside",
    "refuse_to_replace",
    "refuse_unwritable",
    "save",
    "save_table",
]
