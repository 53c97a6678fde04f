"""Tables and prompts of the user that suites of questions read."""

import json
import sys

import pytest

from unialign_jax.evaluation.questions import image_name, read_prompt, read_table


def test_cells_of_a_table_without_those_that_are_empty(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffindex,text\n1,"two\nlines, ""quoted"""\n2,NA\n')
    assert list(read_table(path, ["index"])) == [
        (1, {"index": "1", "text": 'two\nlines, "quoted"'}),
        (2, {"index": "2"}),
    ]


def test_a_prompt_is_read_from_code_without_running_it(tmp_path):
    code = "raise SystemExit\nother = prompt = 1\ndef build():\n    prompt = 'inner'\nprompt = 'a' 'b'\n"
    (tmp_path / "a.py").write_text(code)
    assert read_prompt(tmp_path / "a.py", "prompt") == "ab"
    assert read_prompt(tmp_path / "a.py", "prompt", "build") == "inner"
    cells = [
        {"cell_type": "markdown", "source": ["# prompt"]},
        {"cell_type": "code", "source": ["prompt = '''x\n", "y'''"]},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert read_prompt(tmp_path / "a.ipynb", "prompt") == "x\ny"
    (tmp_path / "a.txt").write_text("as it is\n")
    assert read_prompt(tmp_path / "a.txt", "prompt") == "as it is\n"


def test_images_are_named_by_their_format():
    assert image_name("7", b"\xff\xd8\xff\xe0") == "images/7.jpg"
    assert image_name("7", b"\x89PNG\r\n") == "images/7.png"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.tsv", "a\tb\n1\t2\n3\n", ["row 2 has 1 of 2 cells", "get it again"]),
        ("a.tsv", 'a\tb\n1\t"2\n3\t4\n', ["cut short or damaged"]),
        ("a.csv", "a,b\n\xff,1\n", ["cut short or damaged", "utf-8"]),
        ("a.json", "{}", ["a.json", "expected a .tsv, .csv or .xlsx file"]),
        ("a.tsv", "", ["has no column a"]),
    ],
)
def test_tables_that_are_refused(name, content, words, tmp_path, refuses):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    refuses(lambda: list(read_table(tmp_path / name, ["a"])), *words)


@pytest.mark.bad_input
def test_an_excel_file_needs_a_package(tmp_path, monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    refuses(lambda: list(read_table(tmp_path / "a.xlsx", ["a"])), "pip install openpyxl")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "content", ["prompt = open('x').read()", "prompt = (", "a, b = 1, 2", "def build(): pass", "\0"]
)
def test_prompts_that_are_refused(content, tmp_path, refuses):
    (tmp_path / "a.py").write_text(content)
    refuses(
        lambda: read_prompt(tmp_path / "a.py", "prompt"), "a.py has no prompt where the official file has it (prompt)"
    )
