"""Where getters and metrics come from: desktop-env's, our extras, and placeholders for libraries that are not there.

`desktop_env.evaluators.metrics` imports everything that any metric needs, so one missing package would break all tasks
(seen in desktop-env 1.0.2, metrics/__init__.py). Here an absent package becomes a placeholder, and only the metric
that touches it fails, by the package's name.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import extras, mended
from .ledger import Ledger, Missing

PACKAGES = {
    "acoustid": "pyacoustid",
    "borb": "borb<3",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python-headless",
    "docx": "python-docx",
    "easyocr": "easyocr",
    "fastdtw": "fastdtw",
    "fitz": "pymupdf",
    "formulas": "formulas",
    "imagehash": "ImageHash",
    "librosa": "librosa",
    "mutagen": "mutagen",
    "odf": "odfpy",
    "pdfplumber": "pdfplumber",
    "playwright": "playwright",
    "pptx": "python-pptx",
    "pydrive": "pydrive",
    "PyPDF2": "pypdf2",
    "pypdf": "pypdf",
    "skimage": "scikit-image",
    "xmltodict": "xmltodict",
}
"""Modules that evaluators import, and what pip calls them."""

PROGRAMS = {
    "file": "file",
    "xwdtopnm": "netpbm",
    "pnmtopng": "netpbm",
    "fpcalc": "libchromaprint-tools",
}
"""Programs that metrics run, and the Debian packages that have them."""


@dataclass
class Library:
    """What is there to grade with. `getters` are named as in task files (without `get_`)."""

    getters: dict[str, Callable[..., Any]] = field(default_factory=dict)
    metrics: dict[str, Callable[..., Any]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    version: str = ""


def load(extra_modules: Sequence[str] = ()) -> Library:
    """Import everything once; takes seconds. `extra_modules` are files whose functions are metrics and getters too
    (`get_…`); for tests. Raises ImportError when desktop-env itself is not there."""
    finder = _Placeholders()
    sys.meta_path.append(finder)
    from desktop_env.evaluators import getters, metrics

    library = Library(version=importlib.metadata.version("desktop-env"))
    own = {name: module for name in extra_modules if (module := _from_file(name))}
    # Theirs win over our extras, and what we mended over theirs.
    for module in (extras, *own.values(), getters, metrics, mended):
        for name, function in vars(module).items():
            if not callable(function) or isinstance(function, type) or name.startswith("_"):
                continue
            if name.startswith("get_") and module is not metrics:
                library.getters[name.removeprefix("get_")] = function
            elif not name.startswith("get_") and module is not getters:
                library.metrics[name] = function
    library.absent = tuple(sorted(finder.made))
    _warm_up()
    return library


def watch_for_missing(ledger: Ledger) -> None:
    """From now on what is missed is entered in `ledger`, since metrics swallow exceptions and return 0."""
    _Absent.ledger = ledger
    _WatchedPopen.ledger = ledger
    _watch_audioread(ledger)
    subprocess.Popen = _WatchedPopen  # type: ignore[misc]  # run() and check_output() look it up there


def missing_module(error: ModuleNotFoundError) -> Missing:
    name = (error.name or str(error)).partition(".")[0]
    package = PACKAGES.get(name, name)
    return Missing(
        f"The evaluator needs the Python package {package} (module {name}), which is not installed.",
        hint=f"Install it for the evaluators' interpreter: {sys.executable} -m pip install '{package}'",
        missing=package,
    )


class _Absent:
    """Stands for a name out of a package that is not there. Using it raises Missing."""

    ledger: Ledger | None = None

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(self._module, f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stop = missing_module(ModuleNotFoundError(name=self._module))
        if self.ledger is not None:
            self.ledger.missing.append(stop)
        raise stop


class _Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, so only for what nobody else found."""

    def __init__(self) -> None:
        self.made: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        if top in PACKAGES and (top == name or top in self.made):
            self.made.add(top)
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


class _AbsentModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(self.__name__.partition(".")[0], name)


class _WatchedPopen(subprocess.Popen):  # type: ignore[type-arg]
    ledger: Ledger | None = None

    def __init__(self, args: Any, *rest: Any, **how: Any) -> None:
        words = [args] if isinstance(args, str | bytes | os.PathLike) else list(args)
        for program in (os.fsdecode(word) for word in words[:2] if isinstance(word, str | bytes)):
            # The second word is the program when the first is `which`.
            asked = program == os.fsdecode(words[0]) or os.fsdecode(words[0]) == "which"
            if asked and program in PROGRAMS and shutil.which(program) is None:
                self._miss(program)
        super().__init__(args, *rest, **how)

    def __del__(self, *args: Any) -> None:
        if hasattr(self, "_child_created"):  # it was not refused above
            super().__del__()

    def _miss(self, program: str) -> None:
        stop = _missing_program(program, PROGRAMS[program])
        if self.ledger is not None:
            self.ledger.missing.append(stop)
        raise stop


def _watch_audioread(ledger: Ledger) -> None:
    """It is librosa's last resort for a sound that libsndfile cannot read, and wants ffmpeg; without, the metric would
    take the file for a broken one. That it looks for ffmpeg (`ffmpeg -version`) means nothing yet."""
    try:
        audioread: Any = importlib.import_module("audioread")
    except ImportError:
        return
    plain = audioread.audio_open

    def audio_open(path: Any, *rest: Any, **how: Any) -> Any:
        if shutil.which("ffmpeg") is None:
            ledger.missing.append(_missing_program("ffmpeg", "ffmpeg"))
            raise ledger.missing[-1]
        return plain(path, *rest, **how)

    audioread.audio_open = audio_open


def _missing_program(program: str, package: str) -> Missing:
    return Missing(
        f"The evaluator needs the program {program}, which is not installed.",
        hint=f"Run: apt-get install -y --no-install-recommends {package}",
        missing=package,
    )


def _from_file(path: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"extra_{abs(hash(path))}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _warm_up() -> None:
    """What would otherwise be done anew in each grading, or over the network."""
    try:
        import tldextract

        # Without lists to fetch it uses the public suffix list that it brings.
        offline = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
        offline("example.co.uk")
        tldextract.tldextract.TLD_EXTRACTOR = offline
        utils = importlib.import_module("desktop_env.evaluators.metrics.utils")
        utils.tldextract.extract = offline
    except ImportError:
        pass
    try:
        import cv2

        cv2.setNumThreads(0)
    except (ImportError, AttributeError):
        pass
    _import_lazily_used("playwright.sync_api", "borb.pdf", "requests", "sqlite3", "openpyxl", "pandas")


def _import_lazily_used(*names: str) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            pass
