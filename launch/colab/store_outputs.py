"""Runs a notebook as it stands and keeps in it what it showed: python launch/colab/store_outputs.py quickstart.ipynb

Needs requirements-test.txt and as long as the notebook takes. It runs in its own folder, as from a checkout, and leaves
there what it made (data, runs, bundles, results): run again, its trainings resume from there.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
COLOURS = 128  # of a stored picture, enough for a look and a third of the bytes


def main():
    path = FOLDER / Path(sys.argv[1]).name
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, record_timing=False, resources={"metadata": {"path": FOLDER}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [tidied(output) for output in joined(cell.outputs)]
    nbformat.write(notebook, path)


def joined(outputs) -> list:
    """The outputs, with pieces of one stream that follow each other put together."""
    result = []
    for output in outputs:
        if output.output_type == "stream" and result and result[-1].get("name") == output.name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def tidied(output):
    """A stream as a terminal shows it in the end, without this machine's folders; a picture in fewer bytes."""
    if output.output_type == "stream":
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n")]
        output.text = "\n".join(lines).replace(str(FOLDER.parents[1]), "unialign-jax")
    elif encoded := output.get("data", {}).get("image/png"):
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)), formats=["PNG"]).convert("RGB")
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(smaller := io.BytesIO(), "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(smaller.getvalue()).decode() + "\n"
        output.data.pop("image/jpeg", None)  # the same picture once more
    return output


if __name__ == "__main__":
    main()
