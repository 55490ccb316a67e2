"""Zoom out and in on a CT with a model of `segvol-pl export CHECKPOINT MODEL_DIR format=onnx`, without torch.

python onnx_predict.py MODEL_DIR ct.nii.gz mask.nii.gz liver
"""

import json
import sys
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import onnxruntime

folder, category = Path(sys.argv[1]), sys.argv[4]
about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
shape, fine, zoom = np.array(about["input_shape"]), about["mask_shape"], about["zoom"]
encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder"))
# The prompt: -1 stands for a box, landmarks or a mask that it lacks, label -2 for no point.
given = {"points": np.zeros((1, 1, 3), np.float32), "labels": np.full((1, 1), -2), "box": np.full((1, 6), -1.0, "f4")}
given |= {"text": np.load(folder / "text_bank.npy")[[[*about["categories"], *about["synonyms"]].index(category)]]}
given |= {"landmarks": np.full((1, n, 3), -1, np.float32)} if (n := sum(about["landmarks"].values())) else {}
nothing = {"mask": np.full((1, *fine), -1, np.float32)} if about["mask_prompt"] else {}


def decode(image, prompt):  # logits of an image of the model's shape
    (tokens,) = encoder.run(None, {"image": np.float32(image)[None, None]})
    return decoder.run(None, {"tokens": tokens, **prompt})[0][0]


def resize(array, new, first=None, extent=None):  # linear along axes that grow, area average along axes that shrink
    for axis, (old, size) in enumerate(zip(array.shape, new, strict=True)):
        row, voxel = np.arange(size)[:, None], np.arange(old)
        begin, length = (0, old) if first is None else (first[axis], extent[axis])
        matrix = np.maximum(1 - np.abs(np.clip(begin + (row + 0.5) * length / size - 0.5, 0, old - 1) - voxel), 0)
        if first is None and size < old:
            cells = (voxel >= row * old // size) & (voxel < -((row + 1) * old // -size))
            matrix = cells / cells.sum(axis=1, keepdims=True)
        array = np.moveaxis(np.tensordot(np.float32(matrix), array, (1, axis)), 0, axis)
    return array


def bounds(inside):  # first and last voxel (2,3) of a mask along each axis
    return np.array([np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {a})))[[0, -1]] for a in range(3)]).T


def starts(low, high, size, full):  # the fewest windows of the grid over an axis that hold low to high
    step, last = max(int(size * (1 - zoom["overlap"])), 1), max(full - size, 0)
    grid = [min(i * step, last) for i in range(-(-last // step) + 1)]
    first, end = max(s for s in grid if s <= low), min((s for s in grid if s + size > high), default=last)
    near = [s for s in grid if min(first, end) <= s <= max(first, end)]  # more than one if one is too short
    return near if end > first else [min(near, key=lambda s: abs(2 * s + size - low - high))]


ct = nibabel.as_closest_canonical(file := nibabel.load(sys.argv[2]))
hu = np.rint(ct.get_fdata(dtype=np.float32)).astype(np.int16).T  # axes to the head, to the front, to the right
dark, bright = map(float, np.percentile(hu[hu > hu.mean()], (0.05, 99.95)))
body = tuple(slice(low, high + 1) for low, high in bounds(hu > dark).T)
image = np.clip((hu[body].astype(np.float32) - dark) / (bright - dark), 0, 1)
full, level = np.array(image.shape), np.log(zoom["threshold"] / (1 - zoom["threshold"]))
small = resize(decode(resize(image, shape), given | nothing), np.minimum(shape, full))  # zoom out
coarse, total, count = resize(small, full), np.zeros(full, np.float32), np.zeros(full, int)
mask, scale = np.zeros(hu.shape, np.uint8), np.array(small.shape) / full
if (found := coarse > level).any():  # zoom in
    low, high = np.clip(bounds(found) + np.ceil(zoom["reach"] * full / shape).astype(int) * [[-1], [1]], 0, full - 1)
    for start in product(*map(starts, low, high, shape, full)):
        part = tuple(map(slice, start, start + shape))
        if found[part].any():
            window, inside, seen = np.zeros(shape), tuple(map(slice, image[part].shape)), {}
            window[inside] = image[part]
            if nothing:  # the coarse mask is a prompt, 0 outside of the image
                cells = tuple(map(slice, np.ceil((full - start) * fine / shape - 0.5).astype(int)))
                seen["mask"] = np.zeros((1, *fine), np.float32)
                seen["mask"][0][cells] = 1 / (1 + np.exp(-resize(small, fine, start * scale, shape * scale)[cells]))
            total[part] += decode(window, given | seen)[inside]
            count[part] += 1
    region = tuple(map(slice, low, high + 1))
    mask[body][region] = (np.where(count, total / np.maximum(count, 1), coarse) > level)[region]
back = nibabel.orientations.ornt_transform(nibabel.io_orientation(ct.affine), nibabel.io_orientation(file.affine))
nibabel.save(nibabel.Nifti1Image(mask.T, ct.affine).as_reoriented(back), sys.argv[3])
