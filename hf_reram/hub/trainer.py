"""The part of a Trainer that puts a model on the Hub."""

import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, run_as_future
from transformers.utils import logging

from ..evaluation.report import RobustnessReport
from ..model.digest import weights_digest
from ..model.find import crossbar_layers, crossbar_states
from ..model.sharding import is_sharded, of_first, processes
from .about import about_model
from .publish import holds_figures, publish, remove_foreign
from .push import is_safe, push
from .report import REPORT, report_of, unmeasured

logger = logging.get_logger(__name__)

# Of Trainer, beside which the mixin stands.
Base: Any = object


class HubMixin(Base):
    """What :class:`hf_reram.ReRAMTrainerMixin` does for the Hub: a card of the model's robustness, and an upload of all
    files at once."""

    _told_of_pickles = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer.save_model``, and beside the weights the report of :meth:`evaluate_robustness`, where it is of
        these weights. A report, plot or comparison there that says it is of others is removed, and what the card says
        of it, with a warning."""
        super().save_model(output_dir, _internal_call)
        folder, main = Path(output_dir or self.args.output_dir or "."), self.is_world_process_zero()
        there = main and holds_figures(folder)
        there &= not any(p.is_meta for p in self.model.parameters())  # offloaded ones nothing tells
        # In all processes where each holds a part of the weights, and nowhere else: one may save by itself.
        sharded = processes() > 1 and is_sharded(self.model)
        if of_first(there) if sharded else there:
            weights = weights_digest(self.model)
            if main:
                remove_foreign(folder, weights)
        if _internal_call or not crossbar_layers(self.model):
            return
        report = report_of(self.model)
        if report is not None and main:
            report.to_json(folder / REPORT)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Write card, report and plot into ``output_dir``; the arguments are those of ``Trainer.create_model_card``,
        and ``dataset_name``, as trl's trainers call ``dataset``.

        The figures are those of the last :meth:`evaluate_robustness`, if the weights are still the same. What a person
        has written in the card stays.
        """
        report = report_of(self.model)  # in all processes, which may each hold a part of the weights
        if not self.is_world_process_zero():
            return
        known = {
            "name": model_name,
            "base_model": finetuned_from,
            "task": tasks if isinstance(tasks, str) else None,
            "dataset": _first(dataset_tags) or _first(dataset) or dataset_name,
            "dataset_split": _first(dataset_args),
        }
        extra = {"language": language, "license": license, "tags": tags}
        self._publish(Path(self.args.output_dir or "."), report, known, extra)

    def _publish(
        self, folder: Path, report: RobustnessReport | None, known: dict[str, Any], metadata: dict[str, Any]
    ) -> None:
        """Card, report and plot into a folder with the model's weights; None is not known."""
        if report is None:
            report = unmeasured(self.model)
        known = {**known, "repo": self.hub_model_id or self.args.hub_model_id}
        known = {key: value for key, value in known.items() if value is not None}
        if report.about:
            report.about |= {key: value for key, value in known.items() if report.about.get(key) in (None, "")}
        else:
            report.about = about_model(self.model, report, **known).to_dict()
        if not report.about.get("training") and self.state.global_step:
            report.about["training"] = [self._training_note()]
        report.about |= {key: known[key] for key in ("name", "repo") if key in known}
        metadata = {key: value for key, value in metadata.items() if value is not None}
        publish(folder, report, metadata=metadata, configs=[state.config for state in crossbar_states(self.model)])

    def _training_note(self) -> str:
        args = self.args
        size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        return f"{self.state.global_step} steps of {size} examples, learning rate {args.learning_rate:g}"

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Upload weights, config, tokenizer or image processor, robustness report, plot and card in one commit.

        Differs from ``Trainer.push_to_hub`` in that nothing that would have to be unpickled goes up, nor what else
        stands in ``output_dir``'s folders.

        Args:
            kwargs: see :meth:`create_model_card`.

        Returns:
            the commit, or with ``blocking=False`` a Future of it; None on other processes than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_without_push()
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        self.wait_for_push()
        revision = revision if revision is not None else self.args.hub_revision

        folder, repo = self.args.output_dir or ".", str(self.hub_model_id)

        def upload():
            return push(folder, repo, None, token, revision, commit_message, verify=False)

        return upload() if blocking else run_as_future(upload)

    def push_checkpoint(
        self, checkpoint: str, report: RobustnessReport | None, message: str, path: str | None = None
    ) -> Future:
        """Upload a checkpoint's model with its card in the background, after the uploads before it.

        What would have to be unpickled stays here: a training cannot be resumed from the Hub with its optimizer.

        Args:
            checkpoint: its folder, which may be gone before the upload ends. report: of its weights, or None.
            message: of the commit.
            path: folder of the repository where the checkpoint's files go too, trainer_state.json among them; None:
                the model alone goes up.
        """
        if path is not None and not self._told_of_pickles:
            self._told_of_pickles = True
            logger.warning(
                "checkpoints go to %s without optimizer, scheduler and random state, which are pickles: a training is "
                "resumed with them from %s alone",
                self.hub_model_id,
                self.args.output_dir,
            )
        kept = tempfile.TemporaryDirectory(prefix=".pushing-", dir=self.args.output_dir or ".")
        for file in Path(checkpoint).iterdir():
            if file.is_file() and is_safe(file.name) and file.name != REPORT:
                _link(file, Path(kept.name) / file.name)
        self._publish(Path(kept.name), report, {}, {})
        repo, token, revision = str(self.hub_model_id), self.args.hub_token, self.args.hub_revision

        def upload() -> CommitInfo:
            with kept as folder:
                done = push(folder, repo, None, token, revision, message, verify=False)
                if path is not None:
                    done = HfApi(token=token).upload_folder(
                        repo_id=repo,
                        folder_path=folder,
                        path_in_repo=path,
                        commit_message=f"{message}, checkpoint",
                        revision=revision,
                        ignore_patterns=["README.md"],
                    )
            return done

        return run_as_future(_told(upload, message))


def _link(file: Path, target: Path) -> None:
    """The file under another name, which stays if the first one is replaced or deleted."""
    try:
        os.link(file, target)
    except OSError:  # a file system without links
        shutil.copy(file, target)


def _told(upload: Callable[[], CommitInfo], message: str) -> Callable[[], CommitInfo]:
    """An upload in the background, whose failure nobody would see."""

    def run() -> CommitInfo:
        try:
            return upload()
        except Exception as error:
            logger.warning("an upload to the Hub has failed (%s): %s", message, error)
            raise

    return run


def _first(value: str | list[str] | None) -> str | None:
    return value[0] if isinstance(value, list) and value else value if isinstance(value, str) else None
