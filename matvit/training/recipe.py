"""Training recipes: YAML in, one checked value out. Everything that a run depends on is in here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from matvit.errors import MissingExtraError, RecipeError
from matvit.regular import read_small

_MOST = 2**20  # bytes: YAML takes a hundred times that in memory
_SIZES = ("depth", "embed_dim", "num_heads", "patch_size")  # torch warns of some that are 0
_LARGEST = 2**14  # of these: far more than any encoder has; making such a one would not end
_Weight = Annotated[float, Field(ge=0, le=1e6)]  # beyond it, float32 overflows sooner or later
_Pixels = Annotated[int, Field(ge=1, le=2**12)]  # a side of what an encoder is given
_Batch = Annotated[int, Field(ge=1, le=2**20)]  # pictures


_Location = Annotated[str, Field(min_length=1)]  # an empty one would be the working folder


def _check_arguments(arguments: Mapping[str, int | float | str]) -> None:
    for name, value in arguments.items():
        if name.startswith("pretrained") or name in ("checkpoint_path", "cache_dir"):
            raise ValueError(f"leave {name} out of model_args: weights are named by the field weights, as safetensors")
        if name in _SIZES and not isinstance(value, str) and not 1 <= value <= _LARGEST:
            raise ValueError(f"{name} in model_args must be from 1 to {_LARGEST}, not {value}")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, given: Any) -> Any:
        unknown = [name for name in given if name not in cls.model_fields] if isinstance(given, dict) else []
        if unknown:
            raise ValueError(f"unknown field '{unknown[0]}'; known are {', '.join(cls.model_fields)}")
        return given


class EncoderRecipe(_Strict):
    """The plain timm ViT to start from, or a checkpoint to go on from, which brings its own sizes and axes."""

    timm_model: str | None = None
    checkpoint: str | None = None  # bundled name, folder or hub id
    model_args: dict[str, int | float | str] = {}  # what timm's model is made with: depth, mlp_ratio, global_pool
    weights: Path | None = None  # safetensors, relative to the working folder; None: random
    pretrained: bool = False  # timm's own weights, from the hub
    image_size: _Pixels | None = None  # the native resolution; None: the model's own
    head_axis: bool = False  # the encoder can be cut to the most important heads of each block
    depth_axis: bool = False  # the encoder can be cut to its most important blocks
    resolution_axis: bool = False  # and be given smaller or larger pictures

    @model_validator(mode="after")
    def _one_start(self) -> EncoderRecipe:
        if (self.timm_model is None) == (self.checkpoint is None):
            raise ValueError("give timm_model or checkpoint, and not both")
        others = self.model_dump(exclude={"checkpoint"}, exclude_defaults=True)
        if self.checkpoint is not None and others:
            raise ValueError(f"a checkpoint brings its own {min(others)}: leave that out")
        if dropping := [name for name, value in self.model_args.items() if "drop" in name and value]:
            raise ValueError(f"nested blocks drop nothing: leave {dropping[0]} out of model_args")
        _check_arguments(self.model_args)
        return self


class TeacherRecipe(_Strict):
    """A frozen timm classifier whose pooled features and class probabilities are distilled."""

    timm_model: str
    model_args: dict[str, int | float] = {}  # sizes that timm's model is made with, such as num_classes
    weights: Path | None = None  # safetensors; None: timm's own weights, from the hub
    image_size: _Pixels
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    views: PositiveInt = 4  # fixed random crops of every picture that the teacher sees, once

    @model_validator(mode="after")
    def _arguments(self) -> TeacherRecipe:
        _check_arguments(self.model_args)
        return self


class DataRecipe(_Strict):
    """One training set; a batch is made of a fixed number of pictures from each."""

    path: _Location  # as `matvit.datasets.read_dataset` takes it, or below MATVIT_DATA
    classes: str | None = None  # "0:50": indices of the sorted class names
    exclude: tuple[str, ...] = ()
    resolution: int = Field(default=160, ge=1, le=2**14)  # pixels a side that the pictures are kept at
    batch: _Batch  # pictures of this set in every step


class ValidationRecipe(_Strict):
    """What the trained encoder is measured on, for choosing; never the final test."""

    queries: _Location
    gallery: _Location | None = None
    classes: str | None = None


class Augmentation(_Strict):
    """Random resized crops, flips and colour; strengths as in timm's training transforms."""

    scale: tuple[float, float] = (0.35, 1.0)  # share of the picture's area
    ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height
    colour_jitter: float = Field(default=0.3, ge=0, le=1)
    grayscale: float = Field(default=0.05, ge=0, le=1)
    mixup_alpha: float = Field(default=0.0, ge=0)  # Beta(alpha, alpha); 0 = off; not with teacher losses
    mosaic: float = Field(default=0.0, ge=0, le=1)  # share of pictures tiled from 4 or 9; not with teacher losses

    @model_validator(mode="after")
    def _ranges(self) -> Augmentation:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale must be two rising shares of the picture's area, above 0 and up to 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError("ratio must be two rising numbers above 0")
        return self


class Losses(_Strict):
    """Weights of the losses; 0 leaves one out. See `matvit.training.losses`."""

    classification: _Weight = 0.0  # towards the labels; 0 everywhere = a label-free run
    teacher_classes: _Weight = 0.0  # towards the teacher's probabilities
    teacher_features: _Weight = 0.0  # towards the teacher's pooled features
    cosine: _Weight = 0.0  # towards the frozen full encoder's embedding
    centred: bool = False  # what `cosine` compares: embeddings without the mean of the batch's frozen ones
    similarity: _Weight = 0.0  # towards its similarities over the batch
    contrast: _Weight = 0.0  # InfoNCE: its embedding of the same picture among the batch's
    prefix: _Weight = 0.0  # these again, but teacher_features, on the embedding's first numbers

    @property
    def train_something(self) -> bool:
        """Whether any loss has a weight."""
        return any(self.model_dump(exclude={"prefix", "centred"}).values())


class Stage(_Strict):
    """One optimisation run. `submodels` None: only the full encoder is trained; no `full` beside them: only they are.

    What is frozen for alignment is the full encoder as it was before submodels were first trained; with
    `freeze`, as it is. `ladder` lists specs, and "mixed" for random per-block widths, which may be cut further
    ("mixed-d10-r84").
    """

    name: str = Field(pattern=r"^[\w .-]+$", max_length=200)
    steps: int = Field(ge=1, le=10**9)
    learning_rate: float = Field(gt=0, le=1e30)
    full: Losses = Losses()
    submodels: Losses | None = None
    private: int | None = Field(default=None, ge=1, le=2**10)  # rank of what S, M and L own, trained with the rest
    fit: bool = False  # start them from the least-squares fit of fc2 that makes up for the units cut
    freeze: bool = False  # only these are trained: the full encoder stays to the bit
    ema: float | None = Field(default=None, gt=0, lt=1)  # the result: the weights' moving average, of this decay a step
    average: float = Field(default=1.0, gt=0, le=1)  # the result: this share of the stage's end, the rest its start
    resolutions: tuple[PositiveInt, ...] = ()  # pixels: the full encoder is given one of these a step; (): native
    fixed: tuple[str, ...] = ("S",)  # specs trained in every step besides XL
    sampled: int = Field(default=1, ge=0)  # further specs, drawn from the ladder in every step
    ladder: tuple[str, ...] = Field(default=("M", "L", "mixed"), min_length=1)
    batches: tuple[_Batch, ...] = ()  # pictures of each data set in every step; (): as `data` says
    augmentation: Augmentation = Augmentation()

    @property
    def losses(self) -> tuple[Losses, ...]:
        """The full encoder's, then the submodels' if these are trained."""
        return (self.full,) if self.submodels is None else (self.full, self.submodels)

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher must have seen the crops."""
        return any(one.teacher_classes > 0 or one.teacher_features > 0 for one in self.losses)

    @property
    def needs_anchor(self) -> bool:
        """Whether a frozen copy of the full encoder is needed."""
        return any(one.cosine > 0 or one.similarity > 0 or one.contrast > 0 for one in self.losses)


class OptimiserRecipe(_Strict):
    """AdamW with layer-wise decay, linear warm-up from 0 and cosine decay to 0."""

    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(default=0.05, ge=0, le=1000)
    layer_decay: float = Field(default=0.85, gt=0, le=1)
    head_rate: _Weight = 3.0  # learning rate of the loss heads, relative to the encoder's last layer
    warmup: float = Field(default=0.06, ge=0, lt=1)  # share of the steps; 0: the first is at the full rate
    clip_norm: PositiveFloat = 3.0

    @model_validator(mode="after")
    def _ranges(self) -> OptimiserRecipe:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be from 0 to below 1")
        return self


class Recipe(_Strict):
    """A training run, from start weights to a saved checkpoint."""

    name: str = Field(pattern=r"^[\w.-]*\w[\w.-]*$", max_length=200)
    seed: int = Field(default=0, ge=-(2**62), lt=2**62)  # the teacher's crops of each data set add its number
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed"
    devices: int = Field(default=1, ge=1, le=2**10)  # GPUs, or processes on a CPU; each takes its share of every batch
    compile: bool = False  # torch.compile the blocks (CUDA)
    storage: Literal["float32", "int8"] | None = None  # None: as the checkpoint that it goes on from, else int8
    encoder: EncoderRecipe
    teacher: TeacherRecipe | None = None
    data: tuple[DataRecipe, ...] = Field(min_length=1)
    validation: ValidationRecipe | None = None
    optimiser: OptimiserRecipe = OptimiserRecipe()
    stages: tuple[Stage, ...] = Field(min_length=1)
    license: str | None = None  # of the weights, for the model card: an identifier such as apache-2.0
    credits: tuple[str, ...] = ()  # for the model card
    notes: tuple[str, ...] = ()  # for the model card

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("two stages have the same name")
        for index, stage in enumerate(self.stages):
            self._check_batches(stage)
            self._check_losses(stage, first=index == 0 and self.encoder.checkpoint is None)
            self._check_private(stage, earlier=self.stages[:index])
        return self

    def _check_batches(self, stage: Stage) -> None:
        batches = self.batches_of(stage)
        if len(batches) != len(self.data):
            raise ValueError(f"stage '{stage.name}' names {len(batches)} batches for {len(self.data)} data sets")
        for one, batch in zip(self.data, batches, strict=True):
            if batch % self.devices:
                raise ValueError(f"a batch of {batch} from '{one.path}' cannot be shared by {self.devices} devices")

    def _check_losses(self, stage: Stage, *, first: bool) -> None:
        if not stage.losses[-1].train_something:
            raise ValueError(f"stage '{stage.name}' has an encoder without a loss")
        if stage.submodels and not (stage.full.train_something or stage.fixed or stage.sampled):
            raise ValueError(f"stage '{stage.name}' has no encoder to train: give it fixed or sampled")
        if stage.needs_teacher:
            if self.teacher is None:
                raise ValueError(f"stage '{stage.name}' distils a teacher, but the recipe names none")
            if stage.augmentation.mixup_alpha or stage.augmentation.mosaic:
                raise ValueError(f"stage '{stage.name}': mixup and mosaic need crops that the teacher has not seen")
        if first and stage.needs_anchor:
            raise ValueError(f"stage '{stage.name}' aligns to the stage before it, but is the first")

    def _check_private(self, stage: Stage, *, earlier: Sequence[Stage]) -> None:
        rank = next((one.private for one in earlier if one.private is not None), stage.private)
        if stage.private != rank:
            raise ValueError(f"stage '{stage.name}' must keep the private rank before it: private: {rank}")
        if stage.fit and (rank is None or any(one.submodels for one in earlier)):
            raise ValueError(f"stage '{stage.name}' fits private parameters: be the first with them and with submodels")
        if stage.private is not None and stage.submodels is None:
            raise ValueError(f"stage '{stage.name}' has private parameters, but trains no submodels")
        if not stage.freeze:
            return
        if stage.private is None:
            raise ValueError(f"stage '{stage.name}' freezes all that it could train: give it private parameters")
        if stage.full.train_something or stage.average < 1:
            raise ValueError(f"stage '{stage.name}' freezes the full encoder: leave out its losses and average")

    def batches_of(self, stage: Stage) -> tuple[int, ...]:
        """Pictures of each data set in every step of `stage`."""
        return stage.batches or tuple(one.batch for one in self.data)


def load_recipe(source: str | Path) -> Recipe:
    """The recipe in a YAML file, or the packaged one of that name ("matvit-small").

    Raises RecipeError when it is missing, not YAML, or not a recipe.
    """
    path = Path(source)
    packaged = resources.files("matvit.training") / "recipes" / f"{source}.yaml"
    try:
        text = packaged.read_bytes() if packaged.is_file() else read_small(path, most=_MOST)
        return Recipe.model_validate(_parsed(text, where=str(path)))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "recipe"
        raise RecipeError(
            what=f"{field}: {first['msg'].removeprefix('Value error, ')}", where=str(path), fix="correct this field"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: no file's name
        raise RecipeError(
            what=f"cannot be read ({getattr(error, 'strerror', None) or error})",
            where=str(path),
            fix="give a recipe file, or the name of a packaged recipe (matvit-small)",
        ) from error


def _parsed(text: bytes, *, where: str) -> object:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingExtraError.for_extra("train", purpose="matvit train") from error

    class Loader(yaml.SafeLoader):
        """YAML itself forbids a key twice in one mapping; PyYAML takes the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = Counter(key.value for key, _ in node.value if isinstance(key.value, str))
            for key, count in keys.most_common(1):
                if count > 1:
                    raise yaml.constructor.ConstructorError(problem=f"'{key}' is given twice")
            return super().construct_mapping(node, deep=deep)

    try:
        return yaml.load(text.decode("utf-8"), Loader)  # noqa: S506  # a safe one
    # What PyYAML raises for numbers and dates that are none, and for depths that are too much.
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        problem = (str(getattr(error, "problem", None) or error) or type(error).__name__).splitlines()[0]
        raise RecipeError(what=f"not YAML ({problem})", where=where, fix="correct the file") from error
