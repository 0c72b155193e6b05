"""The trainer's modules for tests: it is not part of the installed package, so they are imported from its folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace

from conftest import ROOT

TRAINER = ROOT / "models" / "trainer"
MODULES = sorted(path.stem for path in TRAINER.glob("*.py"))


def trainer_modules() -> Iterator[SimpleNamespace]:
    """For a fixture: every module by its name, on one thread; gone afterwards."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(TRAINER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(TRAINER))
    for name in MODULES:
        sys.modules.pop(name)
    torch.set_num_threads(threads)
