"""``hf-reram lm-eval``."""

import sys

import typer

from ..tasks.harness import need_lm_eval


def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness' own command line, which then knows robust checkpoints and says whether crossbars were on.

    hf-reram lm-eval run --model reram --model_args pretrained=me/robust,time=10y,seed=3 --tasks arc_easy
    """
    need_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()
