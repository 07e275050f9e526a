"""MatViT: a timm ViT with nested feed-forward layers, heads, blocks and resolutions: smaller encoders are slices of it.

Letters in shape comments: B batch, C channels, H W pixels, N tokens, D embedding, F FFN width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from matvit import backbone, cost, identity, positions
from matvit.backbone import TimmBlock, TimmViT
from matvit.backbone.weights import read_weights
from matvit.block import run_block
from matvit.errors import BackboneError, SpecError, first_line
from matvit.preprocess import Preprocessing
from matvit.private import PrivateConfig, PrivateParameters
from matvit.spec import EncoderShape, SubmodelSpec
from matvit.torch_encoder import TorchEncoder


class AxesConfig(BaseModel):
    """Axes besides FFN width; all off until an encoder was trained for them (see EncoderShape)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads: bool = False
    keep_order: tuple[int, ...] = ()
    image_size_step: Annotated[int, Field(ge=0, le=2**16)] = 0  # pixels


class MatViT(nn.Module):
    """The elastic encoder: images and a submodel spec in, unit-length embeddings out.

    Make one with `MatViT.from_pretrained` (a trained checkpoint) or `MatViT.from_timm` (a plain ViT).
    """

    def __init__(
        self,
        vit: TimmViT,
        *,
        preprocessing: Preprocessing,
        axes: AxesConfig | None = None,
        name: str = "matvit",
    ) -> None:
        """Wraps `vit` itself (not a copy). Raises BackboneError when it cannot be made elastic."""
        super().__init__()
        self.config = backbone.describe(vit)
        if not isinstance(vit.head, nn.Identity):
            raise BackboneError(
                what="the model has a classifier",
                where="MatViT",
                fix="use MatViT.from_timm(model), which leaves it out",
            )
        self.preprocessing = preprocessing
        self.name = name
        self.vit = vit
        self.private: PrivateParameters | None = None  # what S, M and L own besides their slices
        self.source: str | None = None
        self.revision: str | None = None  # the hub repository's commit
        self.weights_sha256: str | None = None
        self.pareto: tuple[dict[str, Any], ...] = ()  # rows of pareto.json
        self.record: dict[str, Any] = {}  # training.json: recipe, data, seed, code version, metrics
        self.block_forward: Callable[[TimmBlock, Tensor, int, int, Tensor | None], Tensor] = (
            run_block  # training compiles it
        )
        self.open_axes(axes or AxesConfig())
        self.eval()

    def __repr__(self) -> str:
        """One line; `vit` shows the modules."""
        size, axes = f"{self.shape.num_blocks} blocks, {self.shape.image_size} px", ", ".join(self.shape.axes)
        return f"<MatViT {self.name}: {self.embedding_dim} numbers a picture, {size}, cut along {axes}>"

    def open_axes(self, axes: AxesConfig) -> None:
        """From now on the encoder can be cut along `axes`; its weights stay. Raises SpecError for unfit ones."""
        _refuse_unfit_axes(self.config, axes)
        self.shape = EncoderShape(
            ffn_widths=self.config.ffn_widths,
            num_heads=self.config.num_heads,
            image_size=self.config.image_size,
            head_axis=axes.heads,
            keep_order=axes.keep_order,
            image_size_step=axes.image_size_step,
        )
        self.axes = axes

    def add_private(self, config: PrivateConfig) -> PrivateParameters:
        """From now on S, M and L own private parameters, zero at first: no submodel computes anything else yet."""
        self.private = PrivateParameters(self.vit, config)
        return self.private

    def block_of(self, index: int, width: int) -> TimmBlock:
        """Block `index` as a submodel of `width` hidden units there computes it: with what its granularity owns."""
        block: TimmBlock = self.vit.blocks[index]
        if self.private is None:
            return block
        own = self.private.of(index, width=width, full_width=self.config.ffn_widths[index])
        return block if own is None else own.merged(block)

    @classmethod
    def from_timm(
        cls,
        model: str | nn.Module,
        *,
        pretrained: bool = False,
        weights: Path | None = None,
        image_size: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> MatViT:
        """A MatViT whose full submodel computes what the timm model computes; its units are not yet ordered.

        `model` is a timm name or a module (copied, its classifier left out). `weights` is a safetensors file to
        fill it from. `image_size` (pixels) resamples the position table. Raises BackboneError for an unknown or
        unsupported model, and for weights that cannot be fetched or do not fit.

        Of the model's `pretrained_cfg`, mean and std alone are taken over, not crop_pct and interpolation: pictures
        are resized bilinearly and their whole centre square is used. For another mean and std give
        `preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))`, from `matvit.preprocess`.
        """
        name = model.rpartition("/")[2] if isinstance(model, str) else "matvit"
        if pretrained and not isinstance(model, str):
            raise BackboneError(
                what="goes with a timm name: a module has its weights", where="pretrained", fix="leave it out"
            )
        vit = _create(model) if isinstance(model, str) else model
        config = backbone.describe(vit)
        if image_size is not None:
            _check_image_size(image_size, config)
        if pretrained and isinstance(model, str):  # what is not supported was refused before the download
            vit = _fetch(model)
        if weights is not None:
            vit = copy.deepcopy(vit)
            vit.load_state_dict(read_weights(weights, like=vit), strict=False)  # all but a classifier
        state = {key: value.detach().clone() for key, value in vit.state_dict().items() if not key.startswith("head.")}
        if image_size is not None and image_size != config.image_size:
            state, config = _resample(vit, state, config, image_size)
        built = backbone.build(config, state)
        return cls(built, preprocessing=preprocessing or _timm_preprocessing(vit), name=name)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> MatViT:
        """A trained encoder: a bundled name ("matvit-small"), a checkpoint folder, or a hub repository id.

        Raises CheckpointError when it is missing, damaged, or of a newer format.
        """
        from matvit import checkpoint

        return checkpoint.load(source, revision=revision)

    def save_pretrained(self, folder: str | Path, *, storage: Literal["float32", "int8"] = "float32") -> None:
        """Write the checkpoint folder, atomically: see `matvit.checkpoint.save`."""
        from matvit import checkpoint

        checkpoint.save(self, folder, storage=storage)

    def forward(self, images: Tensor, spec: str | SubmodelSpec | None = None) -> Tensor:
        """(B, 3, R, R), normalised as `preprocessing` says -> (B, D) of unit length; R is the spec's resolution.

        Raises SpecError when `spec` names no submodel of this encoder, or the pictures have another shape or type.
        """
        return F.normalize(self.features(images, spec), dim=-1)

    def features(self, images: Tensor, spec: str | SubmodelSpec | None = None) -> Tensor:
        """The embedding before it is scaled to unit length: (B, 3, R, R) -> (B, D)."""
        spec = self.shape.spec(spec)
        self._check(images, spec)
        return self.through(images, {index: spec.widths[index] for index in spec.kept_blocks}, heads=spec.heads)

    def _check(self, images: Tensor, spec: SubmodelSpec) -> None:
        size, wanted = spec.image_size, next(self.parameters()).dtype
        if not isinstance(images, Tensor):
            found = f"a {type(images).__name__}"
        elif images.dim() != 4 or images.shape[1:] != (3, size, size):
            found = f"a tensor of shape {tuple(images.shape)}"
        elif images.dtype != wanted and not (images.is_floating_point() and _casts(images)):
            found = f"one of {images.dtype}"
        else:
            return
        raise SpecError(
            what=f"spec '{spec}' takes pictures of {size} px, (B, 3, {size}, {size}) of {wanted}, not {found}",
            where="images",
            fix="make it with `preprocessing.batch`, or use `encoder(spec)`, which takes any picture",
        )

    def through(self, images: Tensor, widths: Mapping[int, int], *, heads: int) -> Tensor:
        """`features` of these blocks alone, in this order, each with so many hidden units, and `heads` heads."""
        return self.pooled(self.tokens(images, widths, heads=heads))

    def tokens(self, images: Tensor, widths: Mapping[int, int], *, heads: int) -> Tensor:
        """The tokens (B, N, D) that come out of these blocks, in this order, before the final norm."""
        vit = self.vit
        tokens: Tensor = vit.norm_pre(positions.embed(vit, self.config, images))  # (B, N, D)
        rope = positions.rotary(vit, self.config, images)
        for index, width in widths.items():
            tokens = self.block_forward(self.block_of(index, width), tokens, width, heads, rope)
        return tokens

    def pooled(self, tokens: Tensor) -> Tensor:
        """The last block's tokens -> `features`: (B, N, D) -> (B, D)."""
        embedding: Tensor = self.vit.forward_head(self.vit.norm(tokens), pre_logits=True)
        return embedding

    def extract(self, spec: str | SubmodelSpec | None = None) -> TimmViT:
        """A plain, really smaller timm module with copied weights, in eval mode.

        Law: normalize(extract(spec)(images)) == self(images, spec) to 1e-5 in fp32.
        """
        from matvit.extraction import extract

        return extract(self, self.shape.spec(spec))

    def encoder(self, spec: str | SubmodelSpec | None = None) -> TorchEncoder:
        """The extracted submodel with preprocessing, on this module's device: what `retrieval` takes."""
        spec = self.shape.spec(spec)
        return TorchEncoder(
            self.extract(spec),
            spec=spec,
            space_id=self.space_id,
            embedding_dim=self.embedding_dim,
            preprocessing=self.preprocessing,
        )

    def flops(self, spec: str | SubmodelSpec | None = None) -> int:
        """Floating-point operations for one picture (2 x multiply-adds, attention products included)."""
        return cost.flops(self.config, self.shape.spec(spec))

    def num_params(self, spec: str | SubmodelSpec | None = None) -> int:
        """Parameters of the extracted submodel."""
        return cost.num_params(self.config, self.shape.spec(spec))

    @property
    def embedding_dim(self) -> int:
        """D, the same for every submodel."""
        return self.config.embed_dim

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def space_id(self) -> str:
        """sha256 over the full encoder's tensors (as float32), the embedding layer and the preprocessing.

        Rounded weights (`.half()`, `.bfloat16()`, int8 storage) are others: an index made before is of another space.
        Computed at each call (a ViT-S takes 0.1 s): nothing tells when weights have changed, as fused
        optimisers write them without raising autograd's version counters.
        """
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in self.vit.state_dict().items()}
        return identity.space_id(arrays, self.config, self.preprocessing)


def _casts(images: Tensor) -> bool:
    """Whether pictures of another precision are brought to that of the weights: autocast is on."""
    return torch.is_autocast_enabled(images.device.type)


def _create(name: str) -> nn.Module:
    with _timm_errors(name, "timm cannot create it", fix="choose a name from timm.list_models('vit_*')"):
        model: nn.Module = timm.create_model(name, num_classes=0)
    return model


def _fetch(name: str) -> nn.Module:
    with _timm_errors(name, "its weights cannot be fetched", fix="check the network, or give a file of its weights"):
        model: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    return model


@contextmanager
def _timm_errors(name: str, what: str, *, fix: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # timm raises RuntimeError for unknown names; the hub client its own, httpx's, OS errors
        raise BackboneError(what=f"{what} ({_reason(error)})", where=f"timm model '{name}'", fix=fix) from error


def _reason(error: Exception) -> str:
    if isinstance(error, LocalEntryNotFoundError):  # its message speaks of caches
        return "the hub could not be reached"
    return first_line(error)


def _check_image_size(image_size: int, config: backbone.ViTConfig) -> None:
    if not isinstance(image_size, int) or image_size < config.patch_size or image_size % config.patch_size:
        raise BackboneError(
            what=f"{image_size!r} px is not a multiple of its {config.patch_size} px patches",
            where="image_size",
            fix=f"use a multiple of {config.patch_size}",
        )


def _resample(
    vit: TimmViT, state: dict[str, Tensor], config: backbone.ViTConfig, image_size: int
) -> tuple[dict[str, Tensor], backbone.ViTConfig]:
    if config.pos_embed == "learn":
        state["pos_embed"] = positions.table(vit, config, image_size // config.patch_size).detach()
    return state, config.model_copy(update={"image_size": image_size})


def _refuse_unfit_axes(config: backbone.ViTConfig, axes: AxesConfig) -> None:
    if axes.heads and config.family == "eva":
        raise SpecError(
            what="timm's Eva attention cannot be cut to fewer heads",
            where="encoder shape",
            fix="leave the heads axis out, and use the others",
        )
    if axes.image_size_step % config.patch_size:
        raise SpecError(
            what=f"resolutions in steps of {axes.image_size_step} px do not fit patches of {config.patch_size} px",
            where="encoder shape",
            fix=f"use a multiple of {config.patch_size}",
        )


def _timm_preprocessing(vit: nn.Module) -> Preprocessing:
    cfg: Mapping[str, Any] = getattr(vit, "pretrained_cfg", {})
    mean, std = cfg.get("mean", timm.data.IMAGENET_DEFAULT_MEAN), cfg.get("std", timm.data.IMAGENET_DEFAULT_STD)
    return Preprocessing(mean=tuple(mean), std=tuple(std))
