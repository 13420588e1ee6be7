"""Report and card go along where a patched model is uploaded by transformers."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

# Through which go ``push_to_hub`` and ``save_pretrained(push_to_hub=True)``.
UPLOAD = "_upload_modified_files"


class Upload:
    """What uploads a patched model in place of ``PreTrainedModel._upload_modified_files``; a class, so that the model
    can be pickled and copied."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        files_timestamps: Any = None,
        commit_message: str | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
    ) -> "CommitInfo":
        from ..hub.push import as_before_unless_done, prepare, push, save_processor

        save_processor(self.model, working_dir)
        message, description = commit_message, commit_description
        with as_before_unless_done(working_dir):
            prepare(working_dir, self.model, repo_id)
            return push(working_dir, repo_id, None, token, revision, message, description, create_pr, verify=False)


def attach_upload(model: Any) -> None:
    """Have the model's ``push_to_hub`` upload report and card too."""
    if hasattr(model, UPLOAD):
        model.__dict__[UPLOAD] = Upload(model)
