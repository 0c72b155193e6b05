"""The texts that measure_gpu.py's models are compiled from, and what they compile to, made where there is no GPU.

    python tests/gpu/programs.py [--quick] FOLDER [SECTION ...]

compiles them for compute capability 9.0 into FOLDER, which measure_gpu.py takes as --cubins: time on a lent GPU is
short, and compiling takes most of a minute of it. Needs cupy-cuda13x and nvidia-cuda-nvrtc.
"""

from __future__ import annotations

import hashlib
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class OnRecord:
    """Stands for an H100 while models are made: keeps their programs' texts, and does nothing."""

    name = "a device that records"
    multiprocessors = 132
    capability = (9, 0)
    shared_bytes = 232448
    warm = True
    free_bytes = 1 << 36

    def __init__(self) -> None:
        self.texts: dict[tuple[str, bool], None] = {}  # (text, together), in order
        self._next = 1 << 20

    def zeros(self, nbytes: int) -> Any:
        self._next += -(-nbytes // 256) * 256
        return SimpleNamespace(address=self._next - -(-nbytes // 256) * 256, nbytes=nbytes)

    def put(self, address: int, array: Any) -> None: ...

    def copy(self, to: int, from_: int, nbytes: int) -> None: ...

    def get(self, address: int, array: Any) -> Any:
        array[...] = 0
        return array

    def program(self, text: str, together: bool = False) -> Any:
        self.texts[text, together] = None
        return SimpleNamespace(kernel=lambda name: None)


def recorded(sections: Iterable[str], golden: Path, quick: bool = False) -> list[tuple[str, bool]]:
    """The texts of some sections of measure_gpu.py, and whether each is a token's one launch."""
    from measure_gpu import SECTIONS
    from measuring import SHAPES, Bench, Shape

    class Small(Bench):
        """Shapes whose programs are those of the large ones."""

        def shape(self, name: str) -> Shape:
            return SHAPES[name]._replace(layers=1, vocab=256, ffn=256)

        def tidy(self) -> None: ...

    device = OnRecord()
    cupy = SimpleNamespace(RawKernel=lambda *a: None, cuda=SimpleNamespace(Event=lambda: None))
    bench = Small(Namespace(seconds=3600, quick=quick, golden=golden, traces=None), device, cupy)
    for name in sections:
        SECTIONS[name].models(bench)
    return list(device.texts)


def written(texts: Sequence[tuple[str, bool]], folder: Path) -> list[Path]:
    """A file of each text, its name saying whether it is a token's one launch."""
    paths = [Path(folder, f"{i}.{'together' if together else 'alone'}.cu") for i, (_, together) in enumerate(texts)]
    for path, (text, _) in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


def cubin_of(folder: Path, text: str) -> Path:
    """Where a text's machine code is kept."""
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.cubin"


def compiled_here(folder: Path, text: str) -> None:
    """Compile a text as device.py does on such a GPU, if it is not there yet."""
    from cupy.cuda import nvrtc

    from tcinfer.kernels.cuda.device import machine_code

    to = cubin_of(folder, text)
    if not to.exists():
        to.write_bytes(machine_code(nvrtc, text))


def main() -> None:
    import importable
    from measure_gpu import SECTIONS

    quick = "--quick" in sys.argv
    name, *sections = (argument for argument in sys.argv[1:] if argument != "--quick")
    folder, sections = Path(name), sections or list(SECTIONS)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text for text, _ in recorded(sections, importable.ROOT.parent / "shared" / "golden", quick)]
    with ProcessPoolExecutor() as pool:
        for done, _ in enumerate(pool.map(partial(compiled_here, folder), texts), 1):
            print(f"{done} of {len(texts)}", flush=True)
    for other in set(folder.glob("*.cubin")) - {cubin_of(folder, text) for text in texts}:
        other.unlink()
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
