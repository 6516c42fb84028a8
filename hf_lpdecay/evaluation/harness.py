"""Tasks of EleutherAI's lm-evaluation-harness."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def lm_eval_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    include_path: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval.

    Args:
        model (`PreTrainedModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tasks (`list[str]`): Names of tasks, of lm-eval's own (they fetch their data from the hub) or of YAML files in
            `include_path`.
        include_path (`str`, *optional*): Folder with YAML files of tasks. Only these are known then, and no hub is
            needed.
        batch_size (`int`, *optional*, defaults to 8): Sequences that are read at once.
        limit (`int`, *optional*): Take that many documents of each task at most.

    Returns:
        `dict[str, dict]`: For each task its metrics, as lm-eval names them (`acc,none`, `acc_stderr,none`, ...).

    Raises:
        ImportError: If lm-eval is not installed.
        ValueError: If a task is not known.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('lm-eval tasks need the extra: pip install "hf_lpdecay[eval]"') from error

    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        where = "lm-eval" if include_path is None else include_path
        raise ValueError(
            f"Unknown tasks: {', '.join(unknown)} - {where} has {', '.join(sorted(manager.all_tasks)[:20])}."
        )
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(harness, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=1000)
    return {task: results["results"][task] for task in tasks}
