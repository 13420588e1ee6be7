"""The part of a Trainer that puts a model on the Hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..model.find import crossbar_layers
from .about import about_model
from .publish import publish
from .push import push
from .report import REPORT, report_of, unmeasured

# Of Trainer, beside which the mixin stands.
Base: Any = object


class HubMixin(Base):
    """What :class:`hf_reram.ReRAMTrainerMixin` does for the Hub: a card of the model's robustness, and an upload of all
    files at once."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer.save_model``, and beside the weights the report of :meth:`evaluate_robustness`, where it is of
        these weights."""
        super().save_model(output_dir, _internal_call)
        if _internal_call or not self.is_world_process_zero() or not crossbar_layers(self.model):
            return
        if (report := report_of(self.model)) is not None:
            report.to_json(Path(output_dir or self.args.output_dir or ".") / REPORT)

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
    ) -> None:
        """Write card, report and plot into ``output_dir``; the arguments are those of ``Trainer.create_model_card``.

        The figures are those of the last :meth:`evaluate_robustness`, if the weights are still the same. What a person
        has written in the card stays.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir or ".")
        report = report_of(self.model)
        if report is None:
            report = unmeasured(self.model)
        known = {
            "name": model_name,
            "repo": self.hub_model_id or self.args.hub_model_id,
            "base_model": finetuned_from,
            "task": tasks if isinstance(tasks, str) else None,
            "dataset": _first(dataset_tags) or _first(dataset),
            "dataset_split": _first(dataset_args),
        }
        known = {key: value for key, value in known.items() if value is not None}
        if report.about:
            report.about |= {key: value for key, value in known.items() if report.about.get(key) in (None, "")}
        else:
            report.about = about_model(self.model, report, training=[self._training_note()], **known).to_dict()
        if not report.about.get("training"):
            report.about["training"] = [self._training_note()]
        report.about |= {key: known[key] for key in ("name", "repo") if key in known}
        extra = {"language": language, "license": license, "tags": tags}
        publish(folder, report, metadata={key: value for key, value in extra.items() if value is not None})

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
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self.wait_for_push()
        revision = revision if revision is not None else self.args.hub_revision

        folder, repo = self.args.output_dir or ".", str(self.hub_model_id)

        def upload():
            return push(folder, repo, None, token, revision, commit_message, verify=False)

        return upload() if blocking else HfApi().run_as_future(upload)


def _first(value: str | list[str] | None) -> str | None:
    return value[0] if isinstance(value, list) and value else value if isinstance(value, str) else None
