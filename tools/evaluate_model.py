"""Evaluates a trained model: tools/evaluate_model.py --checkpoint RUN_OR_STEP [--tasks NAME ...]."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import warnings

# Megatron-core warns at import about optional libraries that this project does not use.
warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch
import torch.distributed

from checkpoints.errors import CheckpointError
from checkpoints.trained_model import TrainedModel, find_trained_model
from data.errors import DataError
from evaluation.needle.evaluate import DEFAULT_SAMPLES, USUAL_LENGTHS
from evaluation.padding import PADDINGS
from evaluation.report import Report
from evaluation.result import EvaluationResult
from evaluation.stage_scorer import DEFAULT_BATCH_TOKENS
from evaluation.suite import (
    OWN_EVALUATIONS,
    PROBED_CHUNKS,
    EvaluationOptions,
    EvaluationRequest,
    LoadedModel,
    prepare_evaluations,
)
from inference.errors import InferenceError
from inference.memory import explained_memory_errors
from parallel.errors import ConfigurationError
from parallel.topology import start_single_process
from tools.command_line import exit_on_termination, positive, run
from tools.precision import add_precision, chosen_dtype


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Evaluates a model on one device. Results are printed and written to RUN/evaluation/step_N: "
        "results.json, where those of other evaluations stay, and plots; scalars go to RUN/tensorboard/evaluation. "
        "See docs/evaluation.md."
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="run folder (newest step) or one step folder")
    add(
        "--tasks",
        nargs="+",
        default=["validation"],
        metavar="NAME",
        help=f"{', '.join(OWN_EVALUATIONS)}, or tasks of lm-evaluation-harness such as lambada_openai "
        "(default: validation, the loss on held-out text beside the unigram entropy of the same tokens, and what it "
        "becomes when sequences are given each other's context embeddings)",
    )
    add("--output", type=Path, metavar="DIR", help="write everything there and nothing into the run's folder")
    add("--json", type=Path, metavar="FILE", help="also write the results of a single evaluation there")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer (default: that of the data or the import)")
    add_precision(parser)
    add(
        "--batch-tokens",
        type=positive,
        default=DEFAULT_BATCH_TOKENS,
        metavar="N",
        help=f"tokens per forward pass, but in validation (default {DEFAULT_BATCH_TOKENS})",
    )
    _add_validation(parser)
    _add_documents(parser)
    _add_needle(parser)
    _add_harness(parser)
    return parser.parse_args()


def _add_validation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("validation").add_argument
    add("--sequences", type=int, default=256, metavar="N", help="validation sequences, at most (default 256)")
    add("--batch-size", type=int, default=16, metavar="N", help="sequences per forward pass, at least 2 (default 16)")
    add(
        "--skip-tokens",
        type=int,
        default=0,
        metavar="N",
        help="leave out the first N tokens of each sequence as targets; a vanilla model then predicts the same tokens "
        "as a Block Transformer with blocks of N (default 0)",
    )


def _add_documents(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("positions, attention, context_embeddings").add_argument
    add("--documents", type=Path, metavar="PATH", help="file or folder of long documents: .jsonl, .txt, .parquet")
    add(
        "--context-length",
        type=positive,
        metavar="N",
        help="documents are cut into chunks of N tokens (default: the model's sequence length)",
    )
    add(
        "--chunks",
        type=positive,
        metavar="N",
        help=f"at most N chunks, a sample of all (default: all for positions, else {PROBED_CHUNKS})",
    )


def _add_needle(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("needle").add_argument
    add("--haystack", type=Path, metavar="PATH", help="file or folder of texts that needles are hidden in")
    add(
        "--needle-lengths",
        type=positive,
        nargs="+",
        metavar="N",
        help=f"contexts of N tokens, answer included (default: {', '.join(map(str, USUAL_LENGTHS))}, of these all up "
        "to the model's sequence length)",
    )
    add(
        "--needle-samples",
        type=positive,
        default=DEFAULT_SAMPLES,
        metavar="N",
        help=f"needles for each prompt, length and depth (default {DEFAULT_SAMPLES})",
    )
    add("--needle-seed", type=int, default=0, metavar="N", help="another one hides other needles (default 0)")


def _add_harness(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tasks of lm-evaluation-harness").add_argument
    add("--task-data", type=Path, metavar="DIR", help="folder of local files (default: tasks download their data)")
    add("--limit", type=positive, metavar="N", help="documents of each task, at most (default: all)")
    add(
        "--padding",
        choices=PADDINGS,
        default="auto",
        help="what a text begins with: L_B - 1 pads, or none: then its first block is not scored (default auto: as the "
        "model was trained)",
    )


def main() -> None:
    """Prepares all evaluations, loads the model and evaluates it; each result is written as soon as it is there."""
    arguments = parse_arguments()
    exit_on_termination()
    if arguments.json is not None and len(set(arguments.tasks)) > 1:
        raise ConfigurationError("--json holds the results of one evaluation; name one with --tasks, or use --output")
    trained = find_trained_model(arguments.checkpoint.absolute())
    for step, reason in trained.skipped:
        print(f"warning: step {step} is skipped: {reason}", file=sys.stderr)
    request = EvaluationRequest(trained, _options(arguments))
    evaluations = prepare_evaluations(request, arguments.tasks)
    report = _report(trained, arguments.output)
    print(f"step {trained.step} of {trained.folder.name}", flush=True)
    start_single_process()
    try:
        model = LoadedModel(request, trained.load(dtype=chosen_dtype(arguments.precision)))
        for evaluate in evaluations:
            with explained_memory_errors("the batches of an evaluation", _smaller_batches(arguments)):
                result = evaluate(model)
            _show(result, report, arguments.json)
    finally:
        torch.distributed.destroy_process_group()
    print(f"results are in {report.folder}")


def _options(arguments: argparse.Namespace) -> EvaluationOptions:
    return EvaluationOptions(**{name: getattr(arguments, name) for name in EvaluationOptions.__dataclass_fields__})


def _report(trained: TrainedModel, output: Path | None) -> Report:
    folder = output or trained.folder / "evaluation" / f"step_{trained.step}"
    tensorboard = output / "tensorboard" if output else trained.folder / "tensorboard" / "evaluation"
    return Report(folder, tensorboard, trained.folder.name, trained.step)


def _smaller_batches(arguments: argparse.Namespace) -> str:
    return (
        f"lower --batch-tokens, which is {arguments.batch_tokens}, or --batch-size for validation, which is "
        f"{arguments.batch_size}"
    )


def _show(result: EvaluationResult, report: Report, json_file: Path | None) -> None:
    print("\n".join(result.lines()), flush=True)
    report.add(result)
    if json_file is not None:
        _write(json_file, json.dumps({"step": report.step, **result.to_json()}, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--json {path} cannot be written: {error.strerror}; name another file") from None


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    run(main, CheckpointError, ConfigurationError, DataError, InferenceError)
