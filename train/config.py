"""Settings of a run, composed of what each package owns."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data.config import DataConfig
from parallel.config import ModelConfig, ParallelConfig, check_layout, check_precision

if TYPE_CHECKING:
    from parallel.planning.workload import Workload

REPOSITORY = Path(__file__).resolve().parent.parent


class RunSection(BaseModel):
    """Name and place of the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run; its folder is `root`/`name`."
    )
    root: Path = Field(default=REPOSITORY / "runs", description="Folder that holds all runs.")
    seed: int = Field(default=0, ge=0, description="Seed of the initial weights.")
    initial_weights: Path | None = Field(
        default=None,
        description="Run, step or imported checkpoint (tools/convert_checkpoint.py) whose weights a new run starts "
        "from; by default they are drawn.",
    )


class OptimizerConfig(BaseModel):
    """AdamW and its learning-rate schedule: linear warm-up, then cosine."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(gt=0.0, description="Peak learning rate.")
    minimum_ratio: float = Field(
        default=0.1, ge=0.0, le=1.0, description="Final learning rate as a fraction of the peak."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Optimizer steps of linear warm-up from 0.")
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0, description="Decay of the first moment.")
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0, description="Decay of the second moment.")
    epsilon: float = Field(default=1e-8, gt=0.0, description="Added to the root of the second moment.")
    weight_decay: float = Field(default=0.1, ge=0.0, description="Decoupled weight decay.")
    decay: Literal["matrices", "all"] = Field(
        default="matrices",
        description="What is decayed: `matrices` exempts biases, norms and embeddings; `all` is the paper's reference.",
    )
    clip_gradient_norm: float = Field(default=1.0, gt=0.0, description="Largest global gradient norm; above, scaled.")


class TrainConfig(BaseModel):
    """Length of the run, batch sizes and precision."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1, description="Optimizer steps of the learning-rate schedule.")
    stop_step: int | None = Field(
        default=None, ge=1, description="Stop here instead of at `steps`; the schedule keeps its length."
    )
    global_batch_size: int = Field(ge=1, description="Sequences per optimizer step, over all processes.")
    micro_batch_size: int = Field(ge=1, description="Sequences per forward pass of one process.")
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="bf16: bf16 weights with fp32 master weights and gradient accumulation."
    )
    cpu_threads: int | None = Field(
        default=None, ge=1, description="Threads per process on CPU; default: the machine's cores / local processes."
    )

    compile_layers: bool = Field(
        default=False,
        description="Compile decoder layers with torch.compile, during the first step and once more when the first "
        "batch with padding comes; those that `parallel.activation_checkpointing` computes again are not. Measure "
        "it: docs/performance.md.",
    )
    profile: bool = Field(
        default=False,
        description="Write a trace of two steps for TensorBoard and Perfetto, and the use of memory, to "
        "`tensorboard/profile` in the run's folder.",
    )

    @property
    def last_step(self) -> int:
        """The step after which the run is complete."""
        return min(self.steps, self.stop_step or self.steps)


class ValidationConfig(BaseModel):
    """Loss on the validation split during training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(default=1000, ge=0, description="Optimizer steps between validations; 0 turns them off.")
    sequences: int = Field(default=256, ge=1, description="Sequences per validation, at most the whole split.")


class TasksConfig(BaseModel):
    """Tasks of lm-evaluation-harness during training (docs/evaluation.md)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...] = Field(
        default=(), description="Their names, such as [lambada_openai, piqa]; none turns them off."
    )
    every: int = Field(
        default=1000, ge=1, description="Optimizer steps between evaluations; there is one after the last step, too."
    )
    limit: int | None = Field(default=None, ge=1, description="Documents of each task, at most; null: all.")
    data: Path | None = Field(
        default=None, description="Folder of local files of the tasks; null: lm-eval downloads what it does not have."
    )
    padding: Literal["auto", "left", "none"] = Field(
        default="auto",
        description="What a text begins with: `left`: block_length - 1 pads; `none`: nothing, and its first block is "
        "not scored; `auto`: as the model is trained; `block` only.",
    )

    @field_validator("names", mode="before")
    @classmethod
    def _listed(cls, names: Any) -> Any:
        if isinstance(names, str):
            raise ValueError(f"{names!r} is no list; write [{names}]")
        return names


class CheckpointConfig(BaseModel):
    """When checkpoints are written and which are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(default=1000, ge=1, description="Optimizer steps between checkpoints; the last is always saved.")
    asynchronous: bool = Field(
        default=True,
        description="Train on while the checkpoint is being written; takes 12 bytes of main memory per parameter and "
        "owner for the copy.",
    )
    copy_to: str | None = Field(
        default=None,
        description="A second place that gets a copy of each checkpoint in the background, in a folder of the run's "
        "name: a folder, or a URL of fsspec such as s3://bucket/runs. A run that finds a newer checkpoint there than "
        "its own fetches it.",
    )
    keep_last: int = Field(default=2, ge=1, description="Newest checkpoints that are kept.")
    keep_every: int | None = Field(
        default=None, ge=1, description="Also keep each checkpoint whose step is a multiple."
    )


class StabilityConfig(BaseModel):
    """What happens when the loss or the gradient is not finite, or the loss jumps."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_skipped_steps: int = Field(
        default=10, ge=1, description="So many steps in a row without an update, for any reason, stop the run."
    )
    spike_deviations: float | None = Field(
        default=None,
        gt=0.0,
        description="A loss so many standard deviations above the mean of the last `spike_window` is a spike; null: "
        "none ever is.",
    )
    spike_window: int = Field(default=100, ge=10, description="Steps whose losses a spike is measured against.")
    spike_policy: Literal["warn", "skip", "roll_back"] = Field(
        default="warn",
        description="`warn`: say so; `skip`: throw the step's gradients away; `roll_back`: return to the newest "
        "checkpoint and leave the batch out.",
    )
    hang_timeout_seconds: float = Field(
        default=1200.0,
        gt=0.0,
        lt=1800.0,
        description="A rank that makes no progress for so long prints the stack of all its threads and ends. Below "
        "half an hour, after which collectives give up by themselves.",
    )
    stop_before_end_seconds: float = Field(
        default=300.0, ge=0.0, description="How long before the end of the Slurm job to save and leave."
    )


class LoggingConfig(BaseModel):
    """Console and TensorBoard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(default=10, ge=1, description="Optimizer steps between console lines and TensorBoard points.")


class RunConfig(BaseModel):
    """Everything about one run; a YAML file has these sections."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: RunSection = Field(description="Name and place.")
    model: ModelConfig = Field(description="The model.")
    parallel: ParallelConfig = Field(default=ParallelConfig(), description="The layout over processes.")
    data: DataConfig = Field(description="The corpus and its packing.")
    train: TrainConfig = Field(description="Length, batch and precision.")
    optimizer: OptimizerConfig = Field(description="AdamW and its schedule.")
    validation: ValidationConfig = Field(default=ValidationConfig(), description="Validation during training.")
    tasks: TasksConfig = Field(default=TasksConfig(), description="Tasks during training.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="Checkpoints.")
    logging: LoggingConfig = Field(default=LoggingConfig(), description="Console and TensorBoard.")
    stability: StabilityConfig = Field(default=StabilityConfig(), description="Non-finite values, spikes and hangs.")

    @property
    def directory(self) -> Path:
        """The run's folder."""
        return self.run.root / self.run.name

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per optimizer step and data-parallel rank."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.parallel.data)

    @property
    def tokens_per_step(self) -> int:
        """Tokens, padding included, per optimizer step."""
        return self.train.global_batch_size * self.model.sequence_length

    @property
    def workload(self) -> "Workload":
        """What memory and time of a step on this kind of device follow from."""
        # Imported here, as below: they take seconds, and mistakes in a configuration are to be found before.
        from parallel.cpu_adaptation import compute_device
        from parallel.planning.workload import Workload

        return Workload(
            model=self.model,
            parallel=self.parallel,
            micro_batch_size=self.train.micro_batch_size,
            num_micro_batches=self.num_micro_batches,
            precision=self.train.precision,
            on_gpu=compute_device().type == "cuda",
            decays_all=self.optimizer.decay == "all",
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_layout(self.model, self.parallel)
        unit = self.train.micro_batch_size * self.parallel.data
        if self.train.global_batch_size % unit:
            raise ValueError(
                f"train.global_batch_size={self.train.global_batch_size} is not a multiple of train.micro_batch_size="
                f"{self.train.micro_batch_size} x parallel.data={self.parallel.data}; use "
                f"{-(-self.train.global_batch_size // unit) * unit}"
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be below train.steps={self.train.steps}"
            )
        check_precision(self.parallel, self.train.precision)
        self._check_isolation()
        self._check_compilation()
        if self.parallel.activation_checkpointing == "budget":
            from parallel.planning.policies import check_budget

            check_budget(self.workload)
        return self

    def _check_isolation(self) -> None:
        mixing = [name for name, source in self.data.corpora.items() if not self.data.pads_to_block_boundary(source)]
        if self.data.isolate_documents and self.model.unit_length > 1 and mixing:
            raise ValueError(
                "data.isolate_documents=true needs data.pad_to_block_boundary=true, but it is false for the source "
                f"{', '.join(mixing)}: a block of two documents belongs to neither; change either"
            )

    def _check_compilation(self) -> None:
        if not self.train.compile_layers:
            return
        policy = self.parallel.activation_checkpointing
        if policy in ("selective", "layer"):
            raise ValueError(
                f"train.compile_layers=true has nothing to compile with parallel.activation_checkpointing={policy}, "
                "which computes all layers again; set that to none or budget, or train.compile_layers=false"
            )
        if self.parallel.zero_stage == 3:
            raise ValueError(
                "train.compile_layers=true does not go with parallel.zero_stage=3, which gathers parameters inside "
                "layers; set that to 2, or train.compile_layers=false"
            )
