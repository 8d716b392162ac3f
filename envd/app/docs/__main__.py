"""`python -m envd.app.docs` writes the pages that follow from the code beside the others."""

from pathlib import Path

from .generated import write

write(Path(__file__).parent / "pages")
