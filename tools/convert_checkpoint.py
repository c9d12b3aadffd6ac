"""Converts weights: tools/convert_checkpoint.py SOURCE OUTPUT [--to ours|huggingface|reference]."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import warnings

# Megatron-core warns at import about optional libraries that this project does not use.
warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch.distributed

from checkpoints.errors import CheckpointError
from checkpoints.trained_model import TOKENIZER_NAMES
from checkpoints.weights.conversion import TARGETS, Conversion, convert
from checkpoints.weights.tensor_output import check_absent
from checkpoints.weights.weight_source import CheckpointSource, WeightSource, open_weight_source
from data.errors import DataError
from inference.errors import InferenceError
from inference.tokenizer_choice import tokenizer_of
from parallel.errors import ConfigurationError
from parallel.topology import start_single_process
from tools.command_line import exit_on_termination, run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Converts weights between our checkpoints, Hugging Face folders and the paper's reference code, "
        "and compares the logits of both models; see docs/weights.md."
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder of safetensors from Hugging Face (GPT-NeoX/Pythia, Llama, Mistral, Qwen2, Qwen3), from the "
        "reference code or from this tool; or a run folder, or one of its steps",
    )
    add("output", type=Path, metavar="OUTPUT", help="folder to make; it must not exist")
    add("--to", choices=TARGETS, help="format of OUTPUT (default: huggingface from our checkpoints, else ours)")
    add("--config", type=Path, metavar="YAML", help="trainer YAML of the reference code (default: SOURCE/config.yaml)")
    add("--dtype", choices=DTYPES, help="type of exported weights (default: the one they came with)")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer to put beside them (default: the one of SOURCE)")
    add("--sequence-length", type=int, metavar="N", help="tokens per sequence, instead of what SOURCE says")
    return parser.parse_args()


def tokenizer_file(source: WeightSource, given: Path | None) -> Path | None:
    """The tokenizer of a model, if there is one.

    Raises:
        DataError: the given file is no tokenizer.
        InferenceError: the given one has more tokens than the model.
    """
    if given is not None:
        return tokenizer_of(source.model, None, given).path
    if not isinstance(source, CheckpointSource):
        return next((source.path / name for name in TOKENIZER_NAMES if (source.path / name).is_file()), None)
    if source.trained.data is None:
        return source.trained.tokenizer
    try:
        return tokenizer_of(source.model, source.trained.data).path
    except (DataError, InferenceError) as error:
        print(f"warning: no tokenizer is written: {error}", file=sys.stderr)
        return None


def main() -> None:
    """Converts and prints how far the logits are apart."""
    arguments = parse_arguments()
    exit_on_termination()
    if arguments.sequence_length is not None and arguments.sequence_length < 2:
        raise ConfigurationError(f"--sequence-length {arguments.sequence_length} is too short; use at least 2")
    output = arguments.output.absolute()
    check_absent(output)
    with open_weight_source(arguments.source.absolute(), arguments.config, arguments.sequence_length) as source:
        target = arguments.to or ("huggingface" if isinstance(source, CheckpointSource) else "ours")
        parameters = sum(torch.Size(shape).numel() for shape in source.shapes.values())
        print(f"{source.description}: {parameters} parameters", flush=True)
        conversion = Conversion(target, DTYPES.get(arguments.dtype), tokenizer_file(source, arguments.tokenizer))
        start_single_process()
        try:
            difference = convert(source, output, conversion, lambda line: print(line, flush=True))
        finally:
            torch.distributed.destroy_process_group()
    print(difference)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run(main, CheckpointError, ConfigurationError, DataError, InferenceError)
