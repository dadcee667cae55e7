"""Local copies of image sets, in small files of the formats in which they are handed out."""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "models"))

import images  # noqa: E402

TRAIN = np.arange(5 * 6, dtype=np.uint8).reshape(5, 2, 3) * 8
TEST = TRAIN[:2, ::-1]
FLAT = [x.reshape(len(x), -1) / 255.0 for x in (TRAIN, TEST)]


def idx(path, data, zipped):
    raw = struct.pack(">IIII", 2051, *data.shape) + data.tobytes()
    path.write_bytes(gzip.compress(raw) if zipped else raw)


def write(folder, kind):
    """Write the images in one format; return what a user would name."""
    if kind.startswith("idx"):
        end = "-images-idx3-ubyte" + (".gz" if kind == "idx.gz" else "")
        idx(folder / f"train{end}", TRAIN, kind == "idx.gz")
        idx(folder / f"t10k{end}", TEST, kind == "idx.gz")
        return folder
    if kind == "npz":
        np.savez(folder / "mnist.npz", x_train=TRAIN, x_test=TEST, y_train=np.zeros(5))
        return folder / "mnist.npz"
    if kind == "mat":
        from scipy.io import savemat

        savemat(folder / "chardata.mat", {"data": FLAT[0].T, "testdata": FLAT[1].T, "target": np.zeros(5)})
        return folder / "chardata.mat"
    for name, rows in zip(("train", "valid", "test"), (FLAT[0], FLAT[1], FLAT[1]), strict=True):
        np.savetxt(folder / f"binarized_mnist_{name}.amat", rows)
    return folder / "binarized_mnist_train.amat"


@pytest.mark.parametrize("kind", ["idx", "idx.gz", "npz", "mat", "amat"])
def test_every_format_gives_the_same_images(tmp_path, kind):
    named = write(tmp_path, kind)
    for path in {named, tmp_path}:
        train, test = images.load(str(path), 0)
        np.testing.assert_allclose(train, FLAT[0], atol=1e-6)
        np.testing.assert_allclose(test, FLAT[1], atol=1e-6)
    assert len(images.load(str(named), 0, held_back=2)[0]) == 3


def test_the_digits_split_depends_on_the_seed():
    train, test = images.load("digits", 0)
    assert train.shape == (1500, 64) and test.shape == (297, 64) and train.max() == 1
    assert (images.load("digits", 1)[0] != train).any()


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="no data at 'nowhere'"):
        images.load("nowhere", 0)
    with pytest.raises(ValueError, match="holds no IDX, .npz, .mat or .amat"):
        images.load(str(tmp_path), 0)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2049, 1, 1, 1) + b"0")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"0" * 20)
    with pytest.raises(ValueError, match="is not an IDX file of images"):
        images.load(str(tmp_path), 0)
    np.savez(tmp_path / "a.npz", pixels=TRAIN)
    with pytest.raises(ValueError, match="has no x_train and x_test; it has pixels"):
        images.load(str(tmp_path / "a.npz"), 0)
    with pytest.raises(ValueError, match="held_back"):
        images.load("digits", 0, held_back=5000)
