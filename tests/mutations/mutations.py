"""Bugs to plant, each with the tests that must turn red."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARITY = "tests/train/test_parity.py::test_parity[2-paper]"
RESUME = "tests/train/test_resume.py::test_stop_at_the_exact_end_of_an_epoch"
VARIANTS = "tests/train/test_parity.py::test_parity[2-variants]"
GOLDEN = "tests/parallel/test_golden.py::test_block_logits_and_losses"


@dataclass(frozen=True)
class Mutation:
    """One bug.

    Attributes:
        name: what is wrong, in words.
        file: path in the repository.
        old: text that occurs once in the file.
        new: what replaces it.
        tests: pytest selection, as small as may be.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str

    def mutate(self, text: str) -> str:
        """The file's text with the bug in it.

        Raises:
            ValueError: the old text is not there exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has the text {text.count(self.old)} times:\n{self.old}")
        return text.replace(self.old, self.new)


MUTATIONS = (
    Mutation(
        "no all-reduce of norm gradients under sequence parallelism, where ZeRO reduces gradients early",
        "parallel/partial_gradients.py",
        "        parameter.register_hook(_summed)\n",
        "        pass\n",
        PARITY,
    ),
    Mutation(
        "no all-reduce of norm gradients under sequence parallelism, where gradients accumulate",
        "train/step.py",
        "        sum_accumulated(accumulated_gradients(self.engine, self._partial))\n",
        "",
        PARITY,
    ),
    Mutation(
        "the fp32 sums of bf16 gradients stay on their rank",
        "train/accumulated_gradients.py",
        'if not hasattr(optimizer, "fp32_groups_gradients"):',
        "if True:",
        PARITY,
    ),
    Mutation(
        "a layer that is computed again computes its last product too",
        "parallel/linear.py",
        "        return linear(input, weight, bias)\n",
        "        return super()._forward_impl(input, weight, bias=bias, **_options)\n",
        "tests/parallel/test_checkpointing.py::test_the_last_product_of_a_layer_is_not_computed_again",
    ),
    Mutation(
        "no division by data-parallel size (gradients too large by it)",
        "train/step.py",
        "self._backward(micro_batches, self.parallel.data / count)",
        "self._backward(micro_batches, self.parallel.data * self.parallel.data / count)",
        PARITY,
    ),
    Mutation(
        "division by data-parallel size twice",
        "train/step.py",
        "self._backward(micro_batches, self.parallel.data / count)",
        "self._backward(micro_batches, 1.0 / count)",
        PARITY,
    ),
    Mutation(
        "token count per rank instead of global",
        "train/step.py",
        "return int(sum_over_data_parallel(torch.stack(counts).sum()))",
        "return self.parallel.data * max(1, int(torch.stack(counts).sum()))",
        PARITY,
    ),
    Mutation(
        "replicated parameters counted twice in the gradient norm",
        "parallel/topology.py",
        "return int(parallel_state.get_tensor_model_parallel_rank())",
        "return 0",
        PARITY,
    ),
    Mutation(
        "Adam moments not restored",
        "checkpoints/engine_state.py",
        "            part.view(target).copy_(_read(reader, part, kind))\n",
        '            if kind == "weight":\n                part.view(target).copy_(_read(reader, part, kind))\n',
        RESUME,
    ),
    Mutation(
        "data cursor off by one after resume",
        "train/checkpointing.py",
        'recorded = checkpoint.metadata["progress"]\n',
        'recorded = checkpoint.metadata["progress"]\n'
        '    recorded = {**recorded, "consumed_sequences": recorded["consumed_sequences"] + 1}\n',
        RESUME,
    ),
    Mutation(
        "prefix positions off by one (both prefix vectors at position 0)",
        "parallel/attention.py",
        "angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies",
        "positions = (torch.arange(length, dtype=torch.float32, device=device) - 1).clamp(min=0)\n"
        "    angles = positions[:, None] * frequencies",
        GOLDEN,
    ),
    Mutation(
        "prefix positions off by one (the first token predicted one position early)",
        "parallel/output_head.py",
        "first = config.leading_positions - 1",
        "first = config.leading_positions - 2",
        GOLDEN + "[main_prefix_b4-nopad]",
    ),
    Mutation(
        "causal mask off by one block",
        "parallel/inputs.py",
        "    if bool(valid.all()) and (units is None or bool((units == units[:, :1]).all())):\n"
        "        return None\n"
        "    size = valid.shape[1]\n"
        "    causal = torch.ones(size, size, dtype=torch.bool, device=valid.device).tril()\n",
        "    size = valid.shape[1]\n"
        "    causal = torch.ones(size, size, dtype=torch.bool, device=valid.device).tril(1)\n",
        "tests/parallel/test_no_leak.py",
    ),
    Mutation(
        "each rank keeps its own gradient of query and key norms",
        "parallel/norms.py",
        "mark_partial_gradient(norm, megatron.tensor_model_parallel_size > 1)",
        "mark_partial_gradient(norm, megatron.sequence_parallel)",
        VARIANTS,
    ),
    Mutation(
        "grouped queries share the wrong key head",
        "parallel/attention.py",
        "heads[:, :, :queries].flatten(1, 2)",
        "heads[:, :, :queries].transpose(1, 2).flatten(1, 2)",
        "tests/checkpoints/weights/test_huggingface.py",
    ),
    Mutation(
        "summation begins with the token to be predicted",
        "parallel/token_inputs.py",
        "F.pad(targets[:, :-1], (1, 0), value=BEGIN_ID)",
        "targets",
        "tests/parallel/test_no_leak.py::test_no_logit_of_a_variant_sees_a_later_token",
    ),
    Mutation(
        "uptraining gives the token decoder the first layers",
        "checkpoints/uptraining/layer_assignment.py",
        "[(i,) for i in range(block_layers, both)]",
        "[(i,) for i in range(token_layers)]",
        "tests/checkpoints/uptraining/test_initial_weights.py::test_every_weight_equals_the_references",
    ),
    Mutation(
        "the embedder's projection in the wrong order on import",
        "checkpoints/weights/weight_mapping.py",
        "tensors[0].permute(0, 2, 1).reshape(shape)",
        "tensors[0].reshape(shape)",
        "tests/checkpoints/weights/test_reference.py",
    ),
    Mutation(
        "documents that are kept apart attend to each other",
        "parallel/inputs.py",
        "        allowed &= units[:, :, None] == units[:, None, :]\n",
        "        pass\n",
        "tests/parallel/test_isolation.py",
    ),
    Mutation(
        "the first block of a document is predicted from the document before",
        "parallel/inputs.py",
        "    if batch.documents is None:\n",
        "    if True:\n",
        "tests/parallel/test_isolation.py",
    ),
    Mutation(
        "a source of a mixture starts over at each stage",
        "data/streaming/mixture.py",
        "self._cursors.append([a + b for",
        "self._cursors.append([0 * a * b for",
        "tests/data/streaming/test_mixture.py",
    ),
    Mutation(
        "pads before a document count as those of the one before it",
        "data/streaming/packing.py",
        "        self._ends = ends\n",
        "        self._ends = ends + np.append(left_pads[1:], 0)\n",
        "tests/data/streaming/test_properties.py",
    ),
    Mutation(
        "other data under a running job goes unnoticed",
        "train/streams.py",
        "    if general or of_stages:\n",
        "    if False:\n",
        "tests/train/test_resume.py::test_other_data_under_a_running_job_is_named",
    ),
    Mutation(
        "a fetched shard is believed without its checksum",
        "data/streaming/shard_cache.py",
        "    if digest.hexdigest() != file.sha256:\n",
        "    if False:\n",
        "tests/data/streaming/test_remote_stream.py",
    ),
    Mutation(
        "the cache takes every file in its folder for its own",
        "data/streaming/shard_cache.py",
        "not OWN_NAME.fullmatch(path.name) or",
        "path.name == LOCK_NAME or",
        "tests/data/streaming/test_shard_cache.py",
    ),
    Mutation(
        "a resumed preparation counts what was rejected behind the last document again",
        "data/preparation/split_writer.py",
        "        self._last = Position(file, rejection.line)\n",
        "",
        "tests/data/preparation/test_rearranging.py::test_killed_anywhere_the_output_is_the_same",
    ),
    Mutation(
        "a resumed preparation stores the last document of finished shards again",
        "data/preparation/encoding.py",
        "if (numbered.file, piece.line) <= settings.finished[split]:",
        "if (numbered.file, piece.line) < settings.finished[split]:",
        "tests/data/preparation/test_rearranging.py::test_killed_anywhere_the_output_is_the_same",
    ),
    Mutation(
        "training keeps documents of validation",
        "data/preparation/phases.py",
        "key=lambda name: name != VALIDATION",
        "key=lambda name: name == VALIDATION",
        "tests/data/preparation/test_rearranging.py::test_duplicates_leave_the_first_and_validation_wins",
    ),
    Mutation(
        "half a hash decides what a duplicate is",
        "data/preparation/duplicates.py",
        "(high[1:] == high[:-1]) & (low[1:] == low[:-1])",
        "high[1:] == high[:-1]",
        "tests/data/preparation/test_rearranging.py::test_hashes_that_agree_in_one_half_are_no_duplicates",
    ),
    Mutation(
        "shuffled shards are not merged by key",
        "data/preparation/rearranging.py",
        'np.argsort(np.concatenate(keys), kind="stable") if shuffled else np.arange(len(documents))',
        "np.arange(len(documents))",
        "tests/data/preparation/test_rearranging.py::test_a_shuffle_mixes_the_whole_corpus",
    ),
    Mutation(
        "a document that ends with a chunk loses that chunk",
        "evaluation/documents.py",
        "count = len(ids) // length",
        "count = (len(ids) - 1) // length",
        "tests/evaluation/test_positions.py::test_chunks_are_whole_and_nothing_is_lost_at_a_boundary",
    ),
    Mutation(
        "losses of sequences in a batch are mixed up",
        "evaluation/token_losses.py",
        "return units.transpose(0, 1).reshape(len(token_ids), -1)",
        "return units.reshape(len(token_ids), -1)",
        "tests/evaluation/test_positions.py::test_every_position_equals_a_slow_computation",
    ),
    Mutation(
        "needles do not heed the text before the haystack",
        "evaluation/needle/prompts.py",
        "needle_start=len(before) + place",
        "needle_start=place",
        "tests/evaluation/needle/test_prompts.py::test_the_needle_stands_at_its_depth",
    ),
    Mutation(
        "attention weights of grouped queries go to the wrong keys",
        "parallel/attention.py",
        "key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)",
        "key = key.repeat(1, query.shape[1] // key.shape[1], 1, 1)",
        "tests/evaluation/probes/test_attention.py::test_weights_reproduce_the_layers_output",
    ),
    Mutation(
        "context embeddings are compared with the block they decode",
        "evaluation/probes/context_embeddings.py",
        "current, following, mine = blocks_of_batch[:-1], blocks_of_batch[1:], nearest[:-1]",
        "current, following, mine = blocks_of_batch[:-1], blocks_of_batch[1:], nearest[1:]",
        "tests/evaluation/probes/test_context_embeddings.py::test_planted_tokens_are_found",
    ),
    Mutation(
        "scores of texts in a batch are taken from each other's blocks",
        "evaluation/stage_scorer.py",
        "rows.append((block - 1) * len(texts) + sequence)",
        "rows.append((block - 1) + len(texts) * sequence)",
        "tests/evaluation/test_stage_scorer.py::test_scores_equal_those_of_one_text_at_a_time",
    ),
    Mutation(
        "pads before a scored text count as tokens",
        "evaluation/text_batches.py",
        "mask[:, :begin] = False",
        "mask[:, :begin] = True",
        "tests/evaluation/test_stage_scorer.py::test_scores_equal_those_of_one_text_at_a_time",
    ),
    Mutation(
        "a scored text that is too long keeps its beginning",
        "evaluation/text_batches.py",
        "[*request.context, *request.continuation][-layout.max_tokens :]",
        "[*request.context, *request.continuation][: layout.max_tokens]",
        "tests/evaluation/test_stage_scorer.py::test_long_texts_lose_their_beginning",
    ),
    Mutation(
        "each tensor-parallel rank takes its own largest logit for the most likely token",
        "parallel/linear_cross_entropy.py",
        "torch.where(largest == overall, ids, torch.iinfo(torch.int64).max)",
        "torch.where(largest == largest, ids, torch.iinfo(torch.int64).max)",
        "tests/evaluation/test_sharded_scorer.py::test_every_layout_scores_as_one_process",
    ),
    Mutation(
        "data-parallel ranks score each other's texts",
        "evaluation/sharded_scorer.py",
        "mine = self.texts[data_rank::data_size]",
        "mine = self.texts[data_rank:]",
        "tests/evaluation/test_sharded_scorer.py::test_every_layout_scores_as_one_process",
    ),
    Mutation(
        "tasks that were interrupted are not made up for",
        "train/trainer.py",
        "tasks_due=metrics is None",
        "tasks_due=False",
        "tests/slurm/test_task_evaluation.py::test_results_are_those_of_the_tool_whatever_interrupts",
    ),
    Mutation(
        "rolling windows lose their context",
        "evaluation/harness/adapter.py",
        "windows.append(ScoredText(context, continuation))",
        "windows.append(ScoredText(context[-1:], continuation))",
        "tests/evaluation/harness/test_equals_hf.py::test_long_and_odd_texts",
    ),
    Mutation(
        "an evaluation forgets the results of others",
        "evaluation/report.py",
        "results = self._read() | {result.name:",
        "results = {result.name:",
        "tests/evaluation/test_report.py::test_results_of_one_model_come_together",
    ),
    Mutation(
        "the C++ kernel masks every sequence like the first",
        "inference/cpu_kernels/kernels.py",
        "mask.data_ptr(), mask.stride(0), mask.stride(2)",
        "mask.data_ptr(), 0, mask.stride(2)",
        "tests/inference/test_cpu_kernels.py::test_a_long_prompt_goes_through_in_parts",
    ),
    Mutation(
        "units of tokens store every position in the same place",
        "inference/kv_cache.py",
        "self.position.add_(positions)",
        "self.position.add_(0)",
        "tests/inference/test_unit_graphs.py::test_units_make_the_same_tokens_over_several_spans",
    ),
    Mutation(
        "units of tokens attend to positions that are not there yet",
        "inference/engine.py",
        "(self._places[: cache.span] <= cache.position)",
        "(self._places[: cache.span] >= 0)",
        "tests/inference/test_unit_graphs.py::test_units_make_the_same_tokens_over_several_spans",
    ),
    Mutation(
        "the roofline reads the block decoder's weights for every token",
        "evaluation/throughput/costs.py",
        '("block decoder", blocks, work.global_steps)',
        '("block decoder", blocks, work.new_tokens)',
        "tests/evaluation/throughput/test_costs.py::"
        "test_a_block_model_reads_a_block_decoder_once_per_block_and_a_token_decoder_once_for_a_prompt",
    ),
    Mutation(
        "an activation budget forgets the micro-batches that a pipeline has in flight",
        "parallel/planning/workload.py",
        "return min(self.num_micro_batches, self.parallel.pipeline - stage)",
        "return 1",
        "tests/parallel/test_checkpointing.py::test_early_stages_hold_more_micro_batches",
    ),
    Mutation(
        "the memory model forgets the copy of rotated queries and keys",
        "parallel/planning/activations.py",
        "size += (sizes.queries + sizes.keys) * work.value_bytes",
        "size += sizes.queries * work.value_bytes",
        "tests/parallel/planning/test_activations.py::test_long_sequences_attend_by_the_fused_kernel",
    ),
    Mutation(
        "the planner counts one half of an all-reduce",
        "parallel/planning/communication.py",
        "return 2.0 * (members - 1) * (size / members / rate + pieces * latency)",
        "return (members - 1) * (size / members / rate + pieces * latency)",
        "tests/parallel/planning/test_step_time.py::test_rings",
    ),
    Mutation(
        "the head forgets that a target's own logit has another gradient",
        "parallel/linear_cross_entropy.py",
        "-is_here[:, None].to(probabilities.dtype)",
        "-0.0 * is_here[:, None].to(probabilities.dtype)",
        "tests/parallel/test_linear_cross_entropy.py::test_losses_and_gradients",
    ),
    Mutation(
        "short blocks attend to later tokens",
        "parallel/attend.py",
        "-math.inf).triu(1)",
        "-math.inf).triu(2)",
        "tests/parallel/test_attend.py::test_attention_and_gradients",
    ),
    Mutation(
        "gradients of a token decoder with blocks of its own stay on their rank",
        "parallel/block_parallel.py",
        "parameter.sequence_parallel = True",
        "parameter.sequence_parallel = False",
        VARIANTS,
    ),
    Mutation(
        "the head makes the logits of all targets at once",
        "parallel/linear_cross_entropy.py",
        "size = math.ceil(rows / math.ceil(rows / most)) if rows else 1",
        "size = rows or 1",
        "tests/parallel/test_linear_cross_entropy.py::test_logits_of_all_targets_are_never_held",
    ),
    Mutation(
        "a block-parallel token decoder is split over its matrices as well",
        "parallel/stage.py",
        "build_piece(name, self.model_config, undivided(megatron), policy)",
        "build_piece(name, self.model_config, megatron, policy)",
        "tests/parallel/test_block_parallel.py::test_its_layers_send_nothing",
    ),
    Mutation(
        "compiled layers are not called",
        "parallel/decoder_layer.py",
        "(self.compiled or self.transform)(hidden, mask)",
        "self.transform(hidden, mask)",
        "tests/parallel/test_compilation.py::test_layers_are_compiled_when_training_calls_them",
    ),
    Mutation(
        "the groups of a topology outlive it",
        "parallel/topology.py",
        "torch.distributed.destroy_process_group(group)",
        "pass",
        "tests/parallel/test_topology.py::test_a_new_topology_ends_the_groups_of_the_one_before",
    ),
    Mutation(
        "waiting for another stage counts as work",
        "parallel/stage_clock.py",
        'COMPUTE = ("forward-compute", "backward-compute")',
        'COMPUTE = ("forward-backward",)',
        "tests/parallel/test_stage_clock.py::test_waiting_and_balance",
    ),
    Mutation(
        "ZeRO 3 keeps every parameter of a small model whole",
        "train/optimizer.py",
        "min(PERSISTENT_VALUES, parameters // 1000)",
        "PERSISTENT_VALUES",
        "tests/train/test_sharding.py::test_zero_3_shards_matrices_of_small_models_too",
    ),
    Mutation(
        "the planner forgets in what ZeRO 3 receives weights",
        "parallel/planning/memory.py",
        "fetched = states.prefetched if piece is not pieces[-1] else 0.0",
        "fetched = 0.0",
        "tests/benchmarks/test_plan_against_measurement.py::"
        "test_memory_of_states_where_gradients_are_reduced_as_they_arise",
    ),
    Mutation(
        "the planner forgets that ZeRO 3 gathers module by module",
        "parallel/planning/step_time.py",
        "cluster.all_gather(weights, members, span, _gathered_modules(work, stage))",
        "cluster.all_gather(weights, members, span)",
        "tests/parallel/planning/test_step_time.py::test_zero_3_gathers_each_module_for_itself",
    ),
    Mutation(
        "the planner forgets the sum before the head, the embedder's and the token decoder's embeddings",
        "parallel/planning/step_time.py",
        "return one  # an embedding's",
        "return 0.0  # an embedding's",
        "tests/parallel/planning/test_step_time.py::test_collectives_of_tensor_parallelism_add_up",
    ),
)
