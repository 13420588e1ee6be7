"""What models are finetuned for, with data and metrics; the comparison that every recipe makes; the demo.

Its names are all that a recipe needs beside those of ``hf_reram``, and are imported when they are first used. Importing
it lets ``transformers.pipeline`` answer questions.
"""

from typing import TYPE_CHECKING

from ..integrations.register import register_pipelines as _register_pipelines
from ..lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from ..calibration.batch_norm import batch_norms, fold_batch_norm, reestimate_batch_norm
    from ..hub.about import About
    from ..hub.push import push
    from ..training.checkpoints import last_checkpoint
    from .about import name_of_data, recipe_about
    from .arguments import RecipeTrainingArguments, ReRAMArguments
    from .comparison import METHODS, OURS, Method, claim_folder, run_protocol, write_comparison
    from .data import draw, load_rows, load_tokenizer
    from .demo import CORNER, Digits, train_base
    from .flags import device_of, number_or_word
    from .generation import generate_texts
    from .harness import LMEval
    from .image_classification import (
        ImageClassification,
        ImageDataset,
        MixUp,
        check_labels,
        find_columns,
        image_processor,
        image_transforms,
        keep_preprocessing,
    )
    from .language_modeling import Perplexity, packed, texts_of, window_length
    from .metrics.entities import entity_metrics
    from .metrics.squad_v2 import token_f1
    from .question_answering import QuestionAnswering, training_features
    from .registry import TASKS, Task, load_task
    from .settings import recipe_settings
    from .text_classification import TextClassification
    from .token_classification import TokenClassification

# The same for Python, by module; tests/test_import.py compares the three lists.
_NAMES = {
    ".calibration.batch_norm": ["batch_norms", "fold_batch_norm", "reestimate_batch_norm"],
    ".hub.about": ["About"],
    ".hub.push": ["push"],
    ".training.checkpoints": ["last_checkpoint"],
    "about": ["name_of_data", "recipe_about"],
    "arguments": ["RecipeTrainingArguments", "ReRAMArguments"],
    "comparison": ["METHODS", "OURS", "Method", "claim_folder", "run_protocol", "write_comparison"],
    "data": ["draw", "load_rows", "load_tokenizer"],
    "demo": ["CORNER", "Digits", "train_base"],
    "flags": ["device_of", "number_or_word"],
    "generation": ["generate_texts"],
    "harness": ["LMEval"],
    "image_classification": [
        "ImageClassification",
        "ImageDataset",
        "MixUp",
        "check_labels",
        "find_columns",
        "image_processor",
        "image_transforms",
        "keep_preprocessing",
    ],
    "language_modeling": ["Perplexity", "packed", "texts_of", "window_length"],
    "metrics.entities": ["entity_metrics"],
    "metrics.squad_v2": ["token_f1"],
    "question_answering": ["QuestionAnswering", "training_features"],
    "registry": ["TASKS", "Task", "load_task"],
    "settings": ["recipe_settings"],
    "text_classification": ["TextClassification"],
    "token_classification": ["TokenClassification"],
}

__all__ = [
    "CORNER",
    "METHODS",
    "OURS",
    "TASKS",
    "About",
    "Digits",
    "ImageClassification",
    "ImageDataset",
    "LMEval",
    "Method",
    "MixUp",
    "Perplexity",
    "QuestionAnswering",
    "ReRAMArguments",
    "RecipeTrainingArguments",
    "Task",
    "TextClassification",
    "TokenClassification",
    "batch_norms",
    "check_labels",
    "claim_folder",
    "device_of",
    "draw",
    "entity_metrics",
    "find_columns",
    "fold_batch_norm",
    "generate_texts",
    "image_processor",
    "image_transforms",
    "keep_preprocessing",
    "last_checkpoint",
    "load_rows",
    "load_task",
    "load_tokenizer",
    "name_of_data",
    "number_or_word",
    "packed",
    "push",
    "recipe_about",
    "recipe_settings",
    "reestimate_batch_norm",
    "run_protocol",
    "texts_of",
    "token_f1",
    "train_base",
    "training_features",
    "window_length",
    "write_comparison",
]

__getattr__, __dir__ = _lazy_names(__name__, _NAMES)

_register_pipelines()
