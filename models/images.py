"""Images as rows of pixels in [0, 1]: scikit-learn's digits, Debian's Fashion-MNIST, or a local copy of MNIST or Omniglot.

Reads the formats in which these sets are handed out: IDX (`train-images-idx3-ubyte`, also gzipped, with its `t10k` or
`test` neighbour in one folder), `.npz` with `x_train` and `x_test`, `.mat` with `data` and `testdata` (pixels by
images), and `.amat`, a row of numbers an image, with `train` and `test` in the names of the two files.
"""

import gzip
import struct
from pathlib import Path

import numpy as np

# Where Debian's package dataset-fashion-mnist puts its four files (`make data` installs it).
FASHION = Path("/usr/share/datasets/fashion-mnist")


def load(data, seed, held_back=0):
    """Return the pixels of the train and the test images; the last `held_back` train images are left out (validation)."""
    train, test = _digits(seed) if data == "digits" else _read(FASHION if data == "fashion-mnist" else Path(data))
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"the train images of {data} have {train.shape[1]} pixels, and the test images {test.shape[1]}."
        )
    if not 0 <= held_back < len(train):
        raise ValueError(f"held_back is 0 or more, and less than the {len(train)} train images; got {held_back}.")
    return train[: len(train) - held_back], test


def _digits(seed):
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels, in a split that depends on the seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    return train_test_split(load_digits().data / 16.0, test_size=297, random_state=seed)


def _read(path):
    if not path.exists():
        raise ValueError(
            f"there is no data at '{path}'; give the path of a local copy (a folder of IDX files, .npz, .mat or .amat), "
            "'digits' for the digits that come with scikit-learn, or 'fashion-mnist' where Debian's package of it is installed "
            "(`make data`)."
        )
    # A file of a pair is read with its neighbour, and any other file alone.
    paired = path.suffix == ".amat" or "idx3-ubyte" in path.name
    files = sorted(path.iterdir()) if path.is_dir() else sorted(path.parent.iterdir()) if paired else [path]
    for read in (_idx, _amat) if paired else (_idx, _npz, _mat, _amat):
        found = read(files)
        if found is not None:
            return tuple(_unit(images) for images in found)
    raise ValueError(f"'{path}' holds no IDX, .npz, .mat or .amat files of train and test images.")


def _unit(images):
    """Return rows of pixels in [0, 1], from numbers up to 1 or up to 255."""
    rows = np.asarray(images, np.float32).reshape(len(images), -1)
    return rows / 255.0 if rows.max() > 1 else rows


def _pair(files, ending, first, second):
    """Return the two files whose names hold one of the words of each part, or None."""
    fitting = [file for file in files if any(file.name.endswith(end) for end in ending)]
    train = next((file for file in fitting if any(word in file.name for word in first)), None)
    test = next((file for file in fitting if any(word in file.name for word in second)), None)
    return None if train is None or test is None else (train, test)


def _idx(files):
    pair = _pair(files, ("idx3-ubyte", "idx3-ubyte.gz"), ("train-images",), ("t10k-images", "test-images"))
    return None if pair is None else [_idx_images(file) for file in pair]


def _idx_images(file):
    raw = file.read_bytes()
    raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
    kind, count, height, width = struct.unpack(">IIII", raw[:16])
    if kind != 2051 or len(raw) != 16 + count * height * width:
        raise ValueError(f"'{file}' is not an IDX file of images.")
    return np.frombuffer(raw, np.uint8, offset=16).reshape(count, height * width)


def _npz(files):
    file = next((file for file in files if file.suffix == ".npz"), None)
    if file is None:
        return None
    with np.load(file) as arrays:
        if "x_train" not in arrays or "x_test" not in arrays:
            raise ValueError(f"'{file}' has no x_train and x_test; it has {', '.join(arrays)}.")
        return [arrays["x_train"], arrays["x_test"]]


def _mat(files):
    from scipy.io import loadmat

    file = next((file for file in files if file.suffix == ".mat"), None)
    if file is None:
        return None
    arrays = loadmat(file)
    if "data" not in arrays or "testdata" not in arrays:
        raise ValueError(f"'{file}' has no 'data' and 'testdata', pixels by images.")
    return [arrays["data"].T, arrays["testdata"].T]


def _amat(files):
    pair = _pair(files, (".amat",), ("train",), ("test",))
    return None if pair is None else [np.loadtxt(file, dtype=np.float32, ndmin=2) for file in pair]
