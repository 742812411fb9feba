"""The top of a report as a PNG, down to its first answers: `make pictures` makes those of both READMEs.

Needs Chromium, or the browser that CHROMIUM names.

python -m tests.tools.report_picture runs/smoke/eval/report.html recipes/report.png
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageChops

WIDTH, TALLEST = 1100, 2000  # pixels
BELOW = "h2:nth-of-type(2), h2:nth-of-type(2) ~ * { display: none }"  # all that follows the answers
COLOURS = 64  # of the palette: black on paper with two accents


def picture(report: Path, target: Path) -> None:
    """Draw the page without what follows its answers, and cut off the empty paper."""
    page = report.read_text(encoding="utf-8").replace("</head>", f"<style>{BELOW}</style></head>")
    with TemporaryDirectory() as folder:
        top, drawn = Path(folder, "top.html"), Path(folder, "drawn.png")
        top.write_text(page, encoding="utf-8")
        browser = [os.environ.get("CHROMIUM", "chromium"), "--headless", "--no-sandbox", "--hide-scrollbars"]
        size = [f"--window-size={WIDTH},{TALLEST}", f"--user-data-dir={folder}/profile"]
        subprocess.run([*browser, *size, f"--screenshot={drawn}", top.as_uri()], check=True, capture_output=True)
        whole = Image.open(drawn).convert("RGB")
    paper = Image.new("RGB", whole.size, whole.getpixel((0, 0)))
    box = ImageChops.difference(whole, paper).getbbox()
    assert box, f"{report} shows nothing"
    whole.crop((0, 0, WIDTH, box[3] + 32)).quantize(COLOURS).save(target, optimize=True)


if __name__ == "__main__":
    picture(Path(sys.argv[1]), Path(sys.argv[2]))
