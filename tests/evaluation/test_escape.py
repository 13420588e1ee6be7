"""What others call things is shown, and is nothing else."""

import ast

import pytest

from hf_reram.evaluation.escape import code_block, code_span, escaped, python_text
from hf_reram.evaluation.tables import markdown


@pytest.mark.parametrize(
    "text",
    ["plain", 'x"); import os; os.system("id") #', "`\n```\n", "\\", "é ü 漢", "<!-- x -->", "a'b", "\0\x1b[31m"],
)
def test_a_python_text_is_that_text_and_one_line(text):
    literal = python_text(text)
    assert ast.literal_eval(literal) == text
    assert not set("`<\n'#;") & set(literal) and literal.count('"') == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("HasAns_span_f1 of g/g_max, 2 % [0.1, 0.2]", "HasAns_span_f1 of g/g_max, 2 % [0.1, 0.2]"),
        ("[a](http://b)", "[a\\]\\(http://b)"),
        ("[a][b]", "[a\\]\\[b]"),
        ("<img src=x>", "&lt;img src=x>"),
        ("&lt;b>", "&amp;lt;b>"),
        ("a | b\nc", "a \\| b c"),
        ("**a** `b` _c_", "\\*\\*a\\*\\* \\`b\\` \\_c\\_"),
        ("a\u202eb\x1b[31m\u2028c", "ab[31m c"),
    ],
)
def test_markdown_shows_the_text(text, shown):
    assert escaped(text) == shown


def test_code_stays_code():
    assert code_span("minilm") == "`minilm`" and code_span("a`b<") == "a\\`b&lt;"
    assert code_block("run me", "bash") == "```bash\nrun me\n```"
    block = code_block("a\n```\n<!-- end --> # b")
    assert block.startswith("````\n") and block.endswith("\n````") and "<!--" not in block and "-->" not in block


def test_a_table_has_the_cells_that_it_is_given():
    lines = markdown(["a|b", "c"], [["d\ne", "<f>"]]).splitlines()
    assert lines == ["| a\\|b | c |", "| --- | --- |", "| d e | &lt;f> |"]
