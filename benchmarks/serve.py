"""What a click costs through `segvol-pl serve`, with nnInteractive's own client on the same machine.

    python benchmarks/serve.py [--checkpoint FILE] [--seeds 4] [--structures 8] [KEY=VALUE ...]

A phantom is sent for each seed. Its structures are clicked one after another in their middle, then corrected by a click
outside. Each click is timed from the call to the mask drawn into the client's buffer; next, the same prompt is given to
the library in this process. The difference is what the server adds: HTTP, what changed, and what undo needs. Seconds of
CPU are given too, which other work on the machine disturbs less. Medians in ms, by the number of windows that are
decoded, which decides the time. Keys are those of `serve`.

Without --checkpoint, the model of configs/model/tiny.yaml has random weights, whose masks are no structures. The
structure itself is sent as the initial segmentation then, and the click inside corrects it too.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession as Client
from results import Column, markdown
from scipy import ndimage

from segvol_pl.config import OptimConfig, SegVolConfig, TrainConfig
from segvol_pl.config.loader import load, plain
from segvol_pl.imaging.geometry import NativeGrid, Volume
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.inference.predictor import Predictor
from segvol_pl.model import SegVol
from segvol_pl.packing.phantom import Phantom, make_phantom

ROOT = Path(__file__).parents[1]
SMALLEST = 50
"""Voxels of a structure that is clicked."""
WINDOWS = (0, 10, 30, 100, 1_000_000)
"""Windows at which one class of clicks ends and the next begins."""
Times = dict[int, list[tuple[float, ...]]]
"""By the class of the click: seconds through the server and in this process; CPU of the server and of this process."""


def untrained(path: Path) -> Path:
    """A checkpoint of the tiny model with random weights."""
    torch.manual_seed(0)
    config = SegVolConfig(**yaml.safe_load((ROOT / "configs/model/tiny.yaml").read_text()))
    state = {f"model.{name}": value for name, value in SegVol(config).state_dict().items()}
    settings = plain(TrainConfig(model=config, optim=OptimConfig(max_steps=1)))
    parameters = {"task": "segment", "config": settings, "categories": []}
    torch.save({"state_dict": state, "hyper_parameters": parameters}, path)
    return path


@contextmanager
def serving(checkpoint: Path, keys: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Address and process of a server as users start it; its arrays have the phantom's axes."""
    given = [f"checkpoint={checkpoint}", "port=0", "axes=SAR", *keys]
    command = [sys.executable, "-m", "segvol_pl", "serve", *given]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stderr is not None
    try:
        said = []
        for line in server.stderr:
            said.append(line)
            if match := re.search(r"listening at (\S+)", line):
                yield match[1], psutil.Process(server.pid)
                return
        raise SystemExit("".join(said))
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


def organs(phantom: Phantom) -> Iterator[tuple[np.ndarray, tuple[int, int, int], tuple[int, int, int]]]:
    """Mask of each organ, its innermost voxel, and a voxel some way outside."""
    for value in np.unique(phantom.label_DHW)[1:]:
        mask_DHW = phantom.label_DHW == value
        if mask_DHW.sum() >= SMALLEST:
            inside = np.unravel_index(np.argmax(ndimage.distance_transform_edt(mask_DHW)), mask_DHW.shape)
            far_DHW = ndimage.distance_transform_edt(~mask_DHW)
            outside = np.argwhere((far_DHW > 2) & (far_DHW < 4) & (phantom.hu_DHW > -200))[0]
            yield mask_DHW, tuple(map(int, inside)), tuple(map(int, outside))


def cpu(process: psutil.Process) -> float:
    spent = process.cpu_times()
    return spent.user + spent.system


def seconds(process: psutil.Process, call: Callable[..., object], *given: object) -> tuple[float, float]:
    """Seconds that a call takes, and that the process computes meanwhile."""
    start, spent = time.perf_counter(), cpu(process)
    call(*given)
    return time.perf_counter() - start, cpu(process) - spent


@dataclass(frozen=True)
class Bench:
    """A client with its server, and the same model in this process."""

    client: Client
    server: psutil.Process
    predictor: Predictor
    trained: bool
    most: int
    """Structures of a phantom."""
    times: Times = field(default_factory=lambda: defaultdict(list))


class Counted:
    """Counts the windows that a model decodes."""

    def __init__(self, predictor: Predictor) -> None:
        self.windows, self._decode = 0, predictor.model.decode
        predictor.model.decode = self  # type: ignore[method-assign]

    def __call__(self, tokens_BTE: torch.Tensor, prompts: list[list[Prompt]]) -> torch.Tensor:
        self.windows += len(tokens_BTE)
        return self._decode(tokens_BTE, prompts)


def click_all(bench: Bench, phantom: Phantom) -> None:
    client, predictor, own = bench.client, bench.predictor, psutil.Process()
    client.set_image(phantom.hu_DHW[None], {"spacing": list(phantom.spacing)})
    client.set_target_buffer(np.zeros(phantom.hu_DHW.shape, np.uint8))
    native = NativeGrid.of(phantom.hu_DHW.shape, phantom.affine)
    session = predictor.open(Volume(phantom.hu_DHW, phantom.affine, native, Path("phantom")))
    counted = Counted(predictor)
    for mask_DHW, inside, outside in itertools.islice(organs(phantom), bench.most):
        client.reset_interactions()
        previous = None
        if not bench.trained:
            client.add_initial_seg_interaction(mask_DHW.astype(np.uint8))
            previous = mask_DHW
        first = Prompt(points_N3=np.array([inside]), labels_N=np.array([1]))
        both = Prompt(points_N3=np.array([inside, outside]), labels_N=np.array([1, 0]))
        for place, prompt in ((inside, first), (outside, both)):
            served = seconds(bench.server, client.add_point_interaction, place, prompt is first)
            counted.windows = 0
            alone = seconds(own, session.segment, prompt, previous)
            found = (served[0], alone[0], served[1], alone[1])
            bench.times[bisect.bisect(WINDOWS, counted.windows) - 1].append(found)
            previous = client.target_buffer != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--structures", type=int, default=8)
    parser.add_argument("keys", nargs="*")
    given = parser.parse_args()
    trained, phantoms = given.checkpoint is not None, [make_phantom(seed) for seed in range(given.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = given.checkpoint.resolve() if trained else untrained(Path(folder) / "tiny.ckpt")
        config = load("serve", [f"checkpoint={checkpoint}", *given.keys])
        predictor = Predictor.from_checkpoint(checkpoint, config.device, config.zoom, config.precision, config.seed)
        with serving(checkpoint, given.keys) as (address, server), Client(address) as client:
            bench = Bench(client, server, predictor, trained, given.structures)
            for phantom in phantoms:
                click_all(bench, phantom)
    shapes = ", ".join(" x ".join(map(str, phantom.hu_DHW.shape)) for phantom in phantoms)
    print(f"{torch.get_num_threads()} threads; phantoms of {shapes} voxels")
    names = ("windows from", "clicks", "served", "in process", "CPU of the server", "CPU in process")
    rows = [
        [str(WINDOWS[size]), str(len(found)), *(f"{figure * 1e3:.0f}" for figure in np.median(found, axis=0))]
        for size, found in sorted(bench.times.items())
    ]
    print("\n".join(markdown([*map(Column, names)], rows)))


if __name__ == "__main__":
    main()
