"""Makes tcinfer and the modules of tests/ importable from a checkout in which nothing is installed.

Imported before them. kernels/, converters/ and models/ stand beside tcinfer/ and install inside it: where nobody has
installed it, a tree of links in a temporary folder does.
"""

import atexit
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), *sorted(str(path) for path in (ROOT / "tests").iterdir() if path.is_dir())]


def _installed() -> bool:
    try:
        return importlib.util.find_spec("tcinfer.kernels") is not None
    except ImportError:
        return False


if not _installed():
    _tree = Path(tempfile.mkdtemp(prefix="tcinfer-tree-"))
    atexit.register(shutil.rmtree, _tree, ignore_errors=True)
    (_tree / "tcinfer").mkdir()
    for _part in [*(ROOT / "tcinfer").iterdir(), *(ROOT / name for name in ("kernels", "converters", "models"))]:
        (_tree / "tcinfer" / _part.name).symlink_to(_part)
    for _name in [name for name in sys.modules if name.split(".")[0] == "tcinfer"]:
        del sys.modules[_name]  # found beside the checkout, without what belongs inside
    sys.path.insert(0, str(_tree))
    importlib.invalidate_caches()
