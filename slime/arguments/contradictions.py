"""Flags of different groups that do not go together. Each sentence names the flags and says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the package's __init__ imports this module
    from slime.arguments import Args

BY_THE_LAUNCHER = " (--colocate is the launchers' default on GPUs: SLIME_SCRIPT_COLOCATE=0)"


def contradictions(args: Args) -> Iterator[str]:
    """Yield a sentence for each contradiction between groups."""
    yield from _distillation(args)
    yield from _rewards(args)
    yield from _sampling(args)
    yield from _parallelism(args)
    yield from _batches(args)
    yield from _engines(args)
    yield from _weight_sync(args)
    yield from _colocation(args)
    yield from _replay(args)


def _distillation(args: Args) -> Iterator[str]:
    if args.opd_type == "megatron" and args.train_backend == "fsdp":
        yield (
            "--opd-type megatron loads the teacher inside Megatron, and --train-backend is fsdp; "
            "serve the teacher and use --opd-type sglang with --rm-url."
        )
    if args.opd_type == "megatron" and args.opd_teacher_load is None:
        yield (
            "--opd-type megatron holds the teacher in the trainer; name its checkpoint by --opd-teacher-load."
        )
    if args.use_opd and args.opd_type == "sglang" and args.rm_url is None and not args.replays:
        yield (
            "--use-opd --opd-type sglang needs the teacher's address; "
            "add --rm-url http://HOST:PORT/generate of the server that holds it."
        )
    if args.eval_teacher and args.opd_teachers:
        yield (
            "--eval-teacher asks one teacher all questions, and --opd-teachers names several. Drop "
            "--eval-teacher."
        )
    if args.opd_top_k > 0 and not args.use_opd:
        yield (
            f"--opd-top-k {args.opd_top_k} asks a teacher for more, and there is none. Add --use-opd "
            "--opd-type sglang --rm-url URL, or drop it."
        )
    if args.eval_teacher and args.rm_url is None and args.opd_teacher_load is None:
        yield (
            "--eval-teacher asks the teacher, and neither --rm-url names its server nor --opd-teacher-load "
            "its checkpoint. Add one of them or drop --eval-teacher."
        )


def _rewards(args: Args) -> Iterator[str]:
    grades = args.rm_type is not None or args.custom_rm_path is not None
    if not args.use_opd and not grades and args.loss_type != "sft_loss":
        yield (
            "There is nothing to learn from: no --use-opd, no --rm-type and no --custom-rm-path. Add "
            "--use-opd --opd-type sglang --rm-url URL for distillation, or --rm-type math for the task's "
            "reward."
        )
    trains_on_task = args.task_reward_weight > 0 or (
        grades and not args.use_opd and args.loss_type != "sft_loss"
    )
    if trains_on_task and args.advantage_estimator == "grpo" and args.n_samples_per_prompt == 1:
        yield (
            "--advantage-estimator grpo compares the samples of one prompt, and --n-samples-per-prompt is "
            "1: every task advantage would be zero. Use at least 2, or --advantage-estimator "
            "reinforce_plus_plus."
        )
    if args.task_reward_weight > 0 and not args.use_opd and args.custom_rm_path is None:
        yield (
            f"--task-reward-weight {args.task_reward_weight:g} adds the task's grade to another signal, and "
            "without --use-opd and --custom-rm-path the grade is the only one already. Drop it, or add "
            "--use-opd."
        )
    if args.task_reward_weight > 0 and args.label_key is None:
        yield "--task-reward-weight grades against reference answers; set --label-key to their column."
    if args.opd_gate != "all" and args.rm_type is None:
        yield (
            f"--opd-gate {args.opd_gate} chooses by the task's grade, and no rule gives one; add --rm-type "
            "math, or the dotted path of your own rule."
        )


def _sampling(args: Args) -> Iterator[str]:
    yield from _teacher_samples(args)
    if args.rollout_temperature != 1.0 and not args.use_tis and args.sample_from == "student":
        yield (
            f"--rollout-temperature {args.rollout_temperature:g} samples from another distribution than the "
            "one that is learned, and nothing corrects for it. Add --use-tis, or use temperature 1."
        )


def _teacher_samples(args: Args) -> Iterator[str]:
    """Yield what does not go with text that the teacher wrote."""
    wrote = args.sample_from == "teacher"
    if args.loss_type == "sft_loss" and not wrote:
        yield (
            "--loss-type sft_loss imitates the sampled tokens, and --sample-from is student: it would "
            "imitate itself. Add --sample-from teacher."
        )
    if args.loss_type == "sft_loss" and (args.use_opd or args.kl_loss_coef > 0 or args.entropy_coef > 0):
        yield (
            "--loss-type sft_loss is the whole loss; --use-opd, --kl-loss-coef and --entropy-coef would "
            "have no effect. Drop them, or use --loss-type policy_loss."
        )
    judged = {
        "--custom-rm-path": args.custom_rm_path is not None and not args.use_opd,
        "--custom-reward-post-process-path": args.custom_reward_post_process_path is not None,
        "--normalize-advantages": args.normalize_advantages,
    }
    for flag in (flag for flag, given in judged.items() if given and args.loss_type == "sft_loss"):
        yield f"{flag} is about rewards, and --loss-type sft_loss learns from none. Drop it."
    if wrote and args.kl_loss_coef > 0:
        yield (
            "--kl-loss-coef is measured on what the student drew, and --sample-from is teacher. Drop either."
        )
    if wrote and args.deterministic_rollout:
        yield "--deterministic-rollout is about the student's engine, and the teacher samples. Drop it."
    if wrote and args.rm_url is None and not args.replays:
        yield "--sample-from teacher asks the teacher's server for responses; name it by --rm-url."
    if wrote and args.opd_teachers:
        yield "--sample-from teacher asks one teacher, and --opd-teachers several. Give one by --rm-url."
    if wrote and args.loss_type == "policy_loss" and not (args.use_opd and args.opd_loss == "topk"):
        yield (
            "--sample-from teacher gives tokens that the student did not draw: neither rewards nor the "
            "sampled reverse KL can be learned from them. Use --loss-type sft_loss, or --use-opd --opd-loss "
            "topk."
        )
    if wrote and args.task_reward_weight > 0:
        yield (
            "--task-reward-weight rewards what the student drew, and --sample-from is teacher. Drop either."
        )
    if wrote and args.use_tis:
        yield "--use-tis corrects for the student's own sampling, and the teacher samples. Drop it."


def _parallelism(args: Args) -> Iterator[str]:
    flags = args.megatron_flags_set()
    if args.train_backend == "fsdp" and flags:
        yield (
            f"{' '.join(flags)}: --train-backend fsdp shards over all training ranks and reads none of "
            "Megatron's flags. Drop them, or use --train-backend megatron."
        )
    if args.num_train_ranks % args.ranks_per_model:
        yield (
            f"{args.num_train_ranks} training ranks (--actor-num-nodes {args.actor_num_nodes} times "
            f"--actor-num-gpus-per-node {args.actor_num_gpus_per_node}) do not divide into models of "
            f"{args.ranks_per_model} (--tensor-model-parallel-size {args.tensor_model_parallel_size} times "
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size} times "
            f"--context-parallel-size {args.context_parallel_size}). Make the first a multiple of the second."
        )
    experts = args.expert_model_parallel_size * (
        args.tensor_model_parallel_size
        if args.expert_tensor_parallel_size is None
        else args.expert_tensor_parallel_size
    )
    per_stage = args.num_train_ranks // args.pipeline_model_parallel_size
    if per_stage % experts:
        yield (
            f"the {per_stage} training ranks of a pipeline stage do not divide into groups of {experts} for "
            "the experts (--expert-model-parallel-size times --expert-tensor-parallel-size, which is "
            "--tensor-model-parallel-size unless given). Change one of them."
        )


def _batches(args: Args) -> Iterator[str]:
    samples, batch = args.samples_per_rollout, args.global_batch_size
    ranks = max(1, args.num_data_ranks)
    if samples % batch:
        yield (
            f"--rollout-batch-size {args.rollout_batch_size} times --n-samples-per-prompt "
            f"{args.n_samples_per_prompt} is {samples} samples, no multiple of --global-batch-size {batch}: "
            f"some would never be trained on. Choose a divisor of {samples}."
        )
    if batch % ranks:
        yield (
            f"--global-batch-size {batch} does not divide over {ranks} training ranks (--actor-num-nodes "
            f"{args.actor_num_nodes} times --actor-num-gpus-per-node {args.actor_num_gpus_per_node}"
            f"{_per_model(args)}). "
            f"Choose a multiple of {ranks}."
        )
    elif args.micro_batch_size is not None and (batch // ranks) % args.micro_batch_size:
        yield (
            f"--global-batch-size {batch} over {ranks} training ranks is {batch // ranks} samples each, no "
            f"multiple of --micro-batch-size {args.micro_batch_size}. Choose a divisor, or "
            "--use-dynamic-batch-size."
        )


def _per_model(args: Args) -> str:
    return f", {args.ranks_per_model} of which share a model" if args.ranks_per_model > 1 else ""


def _engines(args: Args) -> Iterator[str]:
    if args.deterministic_rollout and args.rollout_deadline is not None:
        yield (
            f"--rollout-deadline {args.rollout_deadline:g} lets the clock decide what is trained on, and "
            "--deterministic-rollout promises that only the seed does. Drop either."
        )
    if args.deterministic_rollout and args.engine != "transformers":
        yield "--deterministic-rollout is a promise of our own engine; use it with --engine transformers."
    if args.sglang and args.engine != "sglang":
        names = " ".join("--sglang-" + name.replace("_", "-") for name in args.sglang)
        yield (
            f"{names} is for SGLang engines, and --engine is {args.engine}. Drop it, or use --engine sglang."
        )


def _weight_sync(args: Args) -> Iterator[str]:
    if args.weight_sync == "tensor" and args.rollout_engine_urls:
        yield (
            "--weight-sync tensor hands memory of this machine to engines of this run, and "
            "--rollout-engine-urls names others. Use --weight-sync distributed, or disk where all see "
            "--output-dir."
        )
    if args.weight_sync == "distributed" and args.colocate:
        yield (
            "--weight-sync distributed lets trainer and engines meet in a group in which each has GPUs of "
            "its own, and --colocate shares them. Use --weight-sync tensor."
        )


def _colocation(args: Args) -> Iterator[str]:
    if not args.colocate:
        return
    if args.async_rollout:
        yield (
            "--async-rollout generates while it trains, and --colocate lets them take turns on the same "
            f"GPUs. Drop either{BY_THE_LAUNCHER}."
        )
    if args.rollout_engine_urls:
        yield (
            "--colocate shares this run's GPUs with its engines, and --rollout-engine-urls names engines "
            f"elsewhere. Drop either{BY_THE_LAUNCHER}."
        )
    if args.replays:
        yield "--load-debug-rollout-data starts no engines that could share GPUs. Drop --colocate."
    if args.rollout_num_gpus is not None and args.rollout_num_gpus != args.num_train_ranks:
        yield (
            f"--colocate generates on the {args.num_train_ranks} GPUs that train, and --rollout-num-gpus is "
            f"{args.rollout_num_gpus}. Drop it."
        )
    if args.actor_num_gpus_per_node % args.rollout_num_gpus_per_engine:
        yield (
            f"--rollout-num-gpus-per-engine {args.rollout_num_gpus_per_engine} does not divide the "
            f"{args.actor_num_gpus_per_node} GPUs of a node that --colocate shares. Change either."
        )


def _replay(args: Args) -> Iterator[str]:
    if not args.prompt_data and not args.replays:  # only arguments that are made in code come here
        yield "There are no prompts; add --prompt-data PATH."
    if args.replays and args.async_rollout:
        yield (
            "--async-rollout generates a rollout while another trains, and --load-debug-rollout-data "
            "generates none. Drop either."
        )
    if args.replays and args.eval_prompt_data:
        flags = "--eval-prompt-data" + (" and --eval-teacher" if args.eval_teacher else "")
        yield (
            f"{flags} asks a server, and --load-debug-rollout-data trains without any. Drop {flags} (and "
            "--eval-interval), --save the student, and evaluate it by a run without "
            "--load-debug-rollout-data: --load its checkpoint with the same --num-rollout."
        )
