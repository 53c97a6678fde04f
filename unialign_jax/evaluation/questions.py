"""What suites of questions about images share: tables of rows, and the images of rows in the run's folder."""

import ast
import base64
import binascii
import contextlib
import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from unialign_jax.data.images import open_image
from unialign_jax.evaluation.suite import Request
from unialign_jax.files import check_regular, first_line, replacing_file, shown

IMAGES = "images"  # folder of a run
MAX_CELL = 2**30  # characters of a table's cell, which may be an image
# What pandas, and so the official code, takes for an empty cell.
EMPTY = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA")
    + ("NULL", "NaN", "None", "n/a", "nan", "null")
)
SUFFIXES = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"RIFF", ".webp"), (b"BM", ".bmp"))


def read_table(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(number, cells by column) of the rows of a .tsv, .csv or .xlsx, counted from 1; empty cells are left out.

    Raises FileNotFoundError or ValueError, in one line, for another kind of file, one without the columns that are
    `needed`, and one that is cut short.
    """
    check_regular(path)
    if path.suffix not in (".tsv", ".csv", ".xlsx"):
        raise ValueError(f"{path}: expected a .tsv, .csv or .xlsx file")
    with contextlib.ExitStack() as stack:
        rows = _sheet(path, stack) if path.suffix == ".xlsx" else _lines(path, stack)
        head = next(rows, [])
        lacks = [name for name in needed if name not in head]
        if lacks:
            raise ValueError(f"{path} has no column {', '.join(lacks)}; it has {shown(', '.join(head), 200)}")
        number = 0
        for number, cells in enumerate(rows, start=1):
            if len(cells) != len(head):
                raise ValueError(
                    f"{path}, row {number} has {len(cells)} of {len(head)} cells: the file is cut short or damaged; "
                    "get it again"
                )
            yield number, {name: cell for name, cell in zip(head, cells, strict=True) if cell not in EMPTY}
        if not number:
            raise ValueError(f"{path} has no rows")


def _lines(path, stack):
    csv.field_size_limit(MAX_CELL)
    file = stack.enter_context(open(path, newline="", encoding="utf-8-sig"))
    try:
        yield from csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read, it is cut short or damaged: {first_line(error)}") from None


def _sheet(path, stack):
    try:
        import openpyxl
    except ImportError:
        raise ValueError(f"{path} needs a package that is not installed: pip install openpyxl") from None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # openpyxl raises many kinds on damaged files
        raise ValueError(f"{path} is no readable Excel file: {first_line(error)}") from None
    stack.callback(book.close)
    for cells in book.active.iter_rows(values_only=True):
        yield ["" if cell is None else str(cell) for cell in cells]


def write_table(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    """Writes a .tsv, or an .xlsx where openpyxl is installed (without it, nothing), as pandas reads them."""
    cells = [[row.get(name, "") for name in columns] for row in rows]
    if path.suffix == ".xlsx":
        try:
            import openpyxl
        except ImportError:
            return
        book = openpyxl.Workbook(write_only=True)
        sheet = book.create_sheet()
        for row in ([*columns], *cells):
            sheet.append([_cell(sheet, value) for value in row])
        with replacing_file(path) as scratch:
            book.save(scratch)
        return
    with replacing_file(path) as scratch, open(scratch, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([[*columns], *cells])


def _cell(sheet, value):
    """A value as Excel can hold it: without control characters, and never a formula."""
    if not isinstance(value, str):
        return value
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value)[:32767])
    cell.data_type = "s"
    return cell


def decode_base64(text: str, name: str) -> bytes:
    """The bytes of an image's cell. Raises ValueError, whose line begins with `name`, where they are none."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise ValueError(f"{name}: its image is no base64: the file is cut short or damaged; get it again")
    return data


def image_name(stem: str, head: bytes) -> str:
    """The name, in the run's folder, of an image that begins with `head`."""
    suffix = next((suffix for begin, suffix in SUFFIXES if head.startswith(begin)), ".png")
    return f"{IMAGES}/{stem}{suffix}"


def save_image(request: Request, name: str, data: bytes, what: str) -> None:
    """Writes an image into the run's folder, where it is not there. Raises ValueError for what is no image."""
    path = request.output / name
    if path.exists():
        return
    with open_image(data, what):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        scratch.write_bytes(data)


def copy_image(request: Request, name: str, source: Path) -> None:
    """Copies an image file into the run's folder, where it is not there."""
    path = request.output / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as scratch:
            shutil.copyfile(source, scratch)


def read_prompt(path: Path, name: str, function: str | None = None) -> str:
    """A judge's prompt: the text of a file, or the string of a variable in a Python file, which is not executed.

    Args:
      name: of the variable.
      function: in which it is assigned; None for the module.

    Raises FileNotFoundError or ValueError, in one line.
    """
    check_regular(path, 2**22)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        elif path.suffix != ".py":
            return text
        body = ast.parse(text).body
        if function:
            body = next(n.body for n in body if isinstance(n, ast.FunctionDef) and n.name == function)
        assigned = (n for n in body if isinstance(n, ast.Assign) and [t.id for t in n.targets] == [name])
        return str(ast.literal_eval(next(assigned).value))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text") from None
    except (SyntaxError, ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
        where = f"{name} of {function}()" if function else name
        raise ValueError(f"{path} has no prompt where the official file has it ({where})") from None
