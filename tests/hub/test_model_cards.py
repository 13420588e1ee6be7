"""The cards in model_cards are what their reports say."""

from pathlib import Path

import pytest

from hf_reram import RobustnessReport
from hf_reram.hub.card import model_card
from hf_reram.hub.publish import read_comparison

CARDS = sorted((Path(__file__).parents[2] / "model_cards").glob("*.md"))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_card_is_what_its_report_says(card):
    folder = card.with_suffix("")
    report = RobustnessReport.from_json(folder / "robustness.json")
    rows = read_comparison(folder / "comparison.json")
    assert (folder / "robustness.png").exists()
    again = model_card(report, rows, plot=f"{folder.name}/robustness.png")
    assert str(again).strip() == card.read_text(encoding="utf-8").strip()


def test_there_are_cards():
    assert CARDS
