"""Which models the uptraining study trains, and by which commands."""

import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).resolve().parent
SOURCE = "vanilla"
SHORT = "scratch_short"
RANDOM = "random"
FRACTION = 0.1
DRAW_SEEDS = 100  # apart, so that no draw has the seed of another


@dataclass(frozen=True)
class Method:
    """One way to get a model.

    Attributes:
        name: short name, part of run names.
        label: what the table and the plots call it.
        config: file of this folder, without its suffix.
        fraction: part of the full schedule's steps.
        uptraining: options of tools/uptrain_from_vanilla.py; None: trained from scratch.
        is_extra: not needed for the study's question, so that fewer seeds may do.
        draws: models per seed, each with other random layers; a seed counts with their mean.
    """

    name: str
    label: str
    config: str
    fraction: float = FRACTION
    uptraining: tuple[str, ...] | None = None
    is_extra: bool = False
    draws: int = 1


METHODS = (
    Method(SOURCE, "vanilla source", "vanilla", fraction=1.0),
    Method("scratch", "from scratch, all steps", "block", fraction=1.0),
    Method(SHORT, "from scratch, 10 %", "block"),
    Method("partition", "uptrained, partition", "block", uptraining=("--layers", "partition")),
    Method("skip", "uptrained, skip", "block", uptraining=("--layers", "skip")),
    Method("duplicate", "uptrained, duplicate (16 layers)", "block_double", uptraining=("--layers", "duplicate")),
    # One order of layers is much better than another, so that one draw per seed says little.
    Method(RANDOM, "uptrained, random layers", "block", uptraining=("--layers", "random"), draws=3),
    Method("average", "uptrained, average of neighbours", "block", uptraining=("--layers", "average"), is_extra=True),
    Method(
        "computed",
        "uptrained, partition, computed embeddings",
        "block",
        uptraining=("--layers", "partition", "--token-embeddings", "computed"),
        is_extra=True,
    ),
    Method(
        "grown",
        "uptrained, partition, grown from blocks of 1",
        "block",
        uptraining=("--layers", "partition", "--block-lengths", "1,2,4"),
        is_extra=True,
    ),
    Method("scratch_double_short", "from scratch, 10 % (16 layers)", "block_double", is_extra=True),
)


@dataclass(frozen=True)
class Study:
    """Where a study lives and how large it is.

    Attributes:
        output: folder for everything it makes.
        seeds: number of seeds, from 0.
        extra_seeds: number of seeds of the extra methods.
        steps: optimizer steps of a full schedule.
        block_length: tokens per block; that many at the start of a sequence are not evaluated.
    """

    output: Path
    seeds: int
    extra_seeds: int
    steps: int
    block_length: int

    @property
    def runs(self) -> list["StudyRun"]:
        """All runs, seed by seed, so that differences show early; the extra ones come last."""
        return [
            StudyRun(self, method, seed, draw)
            for is_extra, seeds in ((False, self.seeds), (True, self.extra_seeds))
            for seed in range(seeds)
            for method in METHODS
            if method.is_extra == is_extra
            for draw in range(method.draws)
        ]


@dataclass(frozen=True)
class StudyRun:
    """One model: a method with a seed, which draws its initial weights, random layers and order of sequences.

    Attributes:
        study: where it belongs.
        method: which one.
        seed: from 0.
        draw: from 0; another one changes the random layers only.
    """

    study: Study
    method: Method
    seed: int
    draw: int = 0

    @property
    def name(self) -> str:
        """Name of its run and files."""
        return f"{self.method.name}-seed{self.seed}" + (f"-draw{self.draw}" if self.draw else "")

    @property
    def steps(self) -> int:
        """Optimizer steps that it trains."""
        return round(self.study.steps * self.method.fraction)

    @property
    def needs(self) -> str | None:
        """Name of the run whose weights it starts from."""
        return None if self.method.uptraining is None else f"{SOURCE}-seed{self.seed}"

    @property
    def result(self) -> Path:
        """Its evaluation; the run is finished when this exists."""
        return self.study.output / "results" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """What its commands print."""
        return self.study.output / "logs" / f"{self.name}.log"

    @property
    def training(self) -> list[str]:
        """The command that trains it, or goes on with it."""
        runs = self.study.output / "runs"
        config = str(CONFIGS / f"{self.method.config}.yaml")
        settings = [
            f"run.root={runs}",
            f"run.name={self.name}",
            f"run.seed={self.seed + DRAW_SEEDS * self.draw}",
            f"data.seed={self.seed}",
            f"data.path={self.study.output / 'shards'}",
        ]
        if self.method.uptraining is None:
            return [*_tool("pretrain"), config, *settings, f"train.steps={self.steps}", "--launcher", "local"]
        return [
            *_tool("uptrain_from_vanilla"),
            *(
                "--vanilla",
                str(runs / str(self.needs)),
                "--config",
                config,
                *settings,
                f"train.steps={self.study.steps}",
            ),
            *("--fraction", str(self.method.fraction), *self.method.uptraining, "--launcher", "local"),
        ]

    def evaluation(self, output: Path) -> list[str]:
        """The command that evaluates it on all of the validation text and writes the result."""
        return [
            *_tool("evaluate_model"),
            *("--checkpoint", str(self.study.output / "runs" / self.name)),
            *("--sequences", "100000", "--batch-size", "16"),
            *("--skip-tokens", str(self.study.block_length), "--json", str(output)),
        ]


def _tool(name: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "tools" / f"{name}.py")]
