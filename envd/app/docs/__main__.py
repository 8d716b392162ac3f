"""`python -m envd.app.docs`, in a checkout: writes the pages that follow from the code, and copies of guides."""

from pathlib import Path

from .generated import write

HERE = Path(__file__).parent
write(HERE, HERE.parents[2])
