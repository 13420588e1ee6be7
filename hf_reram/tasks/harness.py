"""Tasks of lm-evaluation-harness (``pip install 'hf_reram[llm]'``) as an evaluation of chips."""

import difflib
import importlib.util
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..evaluation.content import part_of
from ..model.inputs import evaluating

# What lm-eval's own command line draws with.
SEED, NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234


class LMEval:
    """Evaluates a causal model on tasks of lm-eval: calling it with one gives lm-eval's own metrics by task, as
    ``arc_easy/acc``, or ``gsm8k/exact_match,strict-match`` where a filter has a name, without standard errors, so it
    fits :func:`hf_reram.evaluate_robustness`. Prompts and few-shot examples are those of lm-eval's command line.

    Args:
        tasks: names of tasks, groups or tags, with ``*`` for any letters, or task files (.yaml).
        tokenizer: of the model.
        num_fewshot: examples before each question; None: as the tasks say. Tasks that say 0 keep it.
        limit: the first so many questions of each task; None: all.
        include_path: folder of more task files. These may name Python functions beside them, which are run.
        batch_size: requests a forward.

    Attributes:
        content: fingerprint of all that the figures depend on beside the model, for ``key`` of
            :func:`hf_reram.evaluate_robustness`: lm-eval's version, the tasks' configs and functions, and each prompt.
        examples: questions in all. names: of the tasks and groups, of these no other's parts.

    Raises:
        ImportError: lm-eval is not installed. FileNotFoundError: no such file or folder.
        ValueError: a name that lm-eval does not know, a number that is not allowed, or a task that runs code of the
            model's.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        tokenizer: Any,
        num_fewshot: int | None = None,
        limit: int | None = None,
        include_path: str | Path | None = None,
        batch_size: int = 8,
    ):
        need_lm_eval()
        import lm_eval

        for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r}: allowed is an integer from {least} on")
        self.tokenizer, self.limit, self.batch_size = tokenizer, limit, batch_size
        with _seeded():
            self.loaded = _load(tasks, include_path)
            for task in self.loaded["tasks"].values():
                _choose_fewshot(task, num_fewshot)
        inside = {name for names in self.loaded["group_map"].values() for name in names}
        self.names = [name for part in ("groups", "tasks") for name in self.loaded[part] if name not in inside]
        self.quiet = False
        requests = self._requests()
        parts = [lm_eval.__version__, limit, [requests[name] for name in sorted(requests)]]
        self.content = part_of("tasks", [*parts, [_told(task) for task in self.loaded["tasks"].values()], tokenizer])
        self.examples = len({(name, request[0]) for name, found in requests.items() for request in found})
        self.texts = list(dict.fromkeys(_text(*request[1:3]) for found in requests.values() for request in found))

    def told_by(self) -> dict[str, Any]:
        """What figures depend on, see :func:`hf_reram.evaluation.content.described`: of lm-eval's objects ``content``
        tells it, which use changes."""
        left_out = ("loaded", "tokenizer", "batch_size", "quiet")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def _requests(self) -> dict[str, list]:
        """What the model is asked, by task: number of the question, kind, arguments, question, repeats."""
        from ..integrations.harness import without_bars

        found = {}
        with _seeded(), without_bars():
            for name, task in self.loaded["tasks"].items():
                if getattr(task, "UNSAFE_CODE", False):
                    raise ValueError(f"{name} runs code that the model writes: allowed are tasks that do not")
                if getattr(task, "MULTIMODAL", False):
                    raise ValueError(f"{name} has images or sounds: allowed are tasks of text alone")
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
                try:
                    task.build_all_requests(limit=self.limit)
                except ValueError as error:  # as where there are fewer examples
                    shots = task.get_config("num_fewshot")
                    raise ValueError(f"{name} with {shots} examples before each question: {error}") from error
                found[name] = [[r.doc_id, r.request_type, r.args, r.doc, r.repeats] for r in task.instances]
        return found

    def __call__(self, model: nn.Module) -> dict[str, float]:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        from ..integrations.harness import without_bars

        # What lm-eval warns of, as of contexts that are cut, is the same for each chip.
        said = _no_warnings() if self.quiet else nullcontext()
        with evaluating(model), _seeded(), without_bars(), said:
            with _no_warnings():  # that it was not lm-eval that loaded the model
                lm = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size)
            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
            results: Any = evaluate(lm, self.loaded, limit=self.limit, bootstrap_iters=0, log_samples=False)
        self.quiet = True
        figures = {**results.get("groups", {}), **results["results"]}
        return {
            f"{task}/{metric.removesuffix(',none')}": float(value)
            for task, metrics in figures.items()
            for metric, value in metrics.items()
            if "," in metric and "_stderr," not in metric and isinstance(value, Real)
        }

    def shown(self, metrics: Iterable[str]) -> list[str]:
        """The metrics to judge by: of each of ``names`` the first one, or of the first task where a group has none."""
        metrics = list(metrics)
        first = [next((m for m in metrics if m.startswith(f"{name}/")), None) for name in self.names]
        return [metric for metric in first if metric is not None] or metrics[:1]


def need_lm_eval() -> None:
    """
    Raises:
        ImportError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("lm-evaluation-harness is not installed: pip install 'hf_reram[llm]'")


def _load(names: Sequence[str], include_path: str | Path | None) -> Any:
    """Tasks and groups as lm-eval's TaskManager gives them."""
    from lm_eval.tasks import TaskManager

    if isinstance(names, str) or not len(names):
        raise ValueError(f"tasks={names!r}: allowed is a list of at least one name")
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"no such folder of task files: {include_path}")
    files = [name for name in names if name.endswith(".yaml")]
    if missing := [name for name in files if not Path(name).is_file()]:
        raise FileNotFoundError(f"no such task file: {missing[0]}")
    own = None if include_path is None else str(include_path)
    # lm-eval's own tasks are thousands of files, which takes seconds.
    manager = TaskManager(include_path=own, include_defaults=False) if own or files else None
    if manager is None or not {*names} <= {*manager.all_subtasks, *files}:
        manager = TaskManager(include_path=own)  # with lm-eval's own
    found: list[str] = []
    for name in names:
        matches = [str(Path(name).absolute())] if name in files else manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            raise ValueError(f"lm-eval knows no task {name!r}: near are {near}, all are shown by lm_eval ls tasks")
        found += [match for match in matches if match not in found]
    return manager.load(found)


def _choose_fewshot(task: Any, count: int | None) -> None:
    """As lm-eval's simple_evaluate does."""
    own = task.get_config("num_fewshot")
    if own is None or (count is not None and own != 0):
        task.set_config(key="num_fewshot", value=count or 0)


def _told(task: Any) -> Any:
    """What a task makes of answers, its functions as such: lm-eval's own dump has their source."""
    return [task.VERSION, type(task), {name: value for name, value in vars(task.config).items() if value is not None}]


def _text(kind: str, arguments: Sequence[Any]) -> str:
    """Of a request what the model reads."""
    return "".join(arguments[:2]) if kind == "loglikelihood" else arguments[0]


@contextmanager
def _seeded() -> Iterator[None]:
    """Python's and NumPy's random numbers as lm-eval's command line has them; what is drawn outside stays as it is.
    PyTorch's are read noise, which is another for each chip."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _no_warnings() -> Iterator[None]:
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
