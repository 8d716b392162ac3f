"""Start of the evaluator process: `python -I DIRECTORY/__main__.py CONTROL ROOT SANDBOXED`.

The directory is made a package under a name of its own, since its parent `envd` cannot be imported here.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

NAME = "envd_grader"


def main() -> None:
    here = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(NAME, here / "__init__.py", submodule_search_locations=[str(here)])
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = package
    spec.loader.exec_module(package)
    zygote = importlib.import_module(f"{NAME}.zygote")
    zygote.main(sys.argv[1:])


if __name__ == "__main__":
    main()
