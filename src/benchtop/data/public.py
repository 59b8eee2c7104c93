"""Readers of the public sets: files in, NumPy arrays out. What differs from set to set stands in ``registry.json``.

Our own parsers only where the format is trivial (idx, csv, npz, one line a graph); pandas, SciPy, Pillow and edfio do
the rest. Each reader takes the files and the set's registry entry and returns a :class:`Raw`.
"""

import collections
import io
import json
import pickletools
import re
import wave
from typing import Any

import numpy as np

from benchtop.data import Raw, library
from benchtop.data.fetch import Files

Entry = dict[str, Any]


def official(*sizes: int) -> tuple:
    """Row numbers of consecutive parts; with two sizes (train, test) the validation rows come out of train."""
    first, *rest = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return (first, *rest) if len(rest) == 2 else (first, None, *rest)


def codes(values) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers and class names, in sorted order of the names."""
    names, numbers = np.unique(np.asarray(values, dtype=str), return_inverse=True)
    return numbers.astype(np.int64), tuple(names.tolist())


def arrays(files: Files, pattern: str) -> dict[str, np.ndarray]:
    """Arrays of npz and npy files: "stem/key" and "stem"; object arrays (pickles) are refused, floats are float32."""
    found = {}
    for name in files.names(pattern):
        stem, content = name.rsplit("/", 1)[-1].rsplit(".", 1)[0], np.load(files.stream(name), allow_pickle=False)
        found |= {stem: content} if name.endswith("npy") else {f"{stem}/{k}": content[k] for k in content.files}
    return {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in found.items()}


def picture(content: bytes, mode: str) -> np.ndarray:
    """Pixels, (channels, height, width) uint8; mode as in Pillow, "L" or "RGB"."""
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(content)).convert(mode))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def pictures(files: Files, names: list[str], mode: str) -> np.ndarray:
    return np.stack([picture(files.read(name), mode) for name in names])


def matlab(files: Files, pattern: str) -> dict[str, np.ndarray]:
    from scipy.io import loadmat

    return loadmat(files.stream(pattern))


def frame(files: Files, pattern: str, **options):
    """A csv file as pandas table."""
    import pandas as pd

    return pd.read_csv(files.stream(pattern), **options)


def numbers(files: Files, pattern: str, kind: type = int, **options) -> np.ndarray:
    return np.loadtxt(files.stream(pattern), kind, **options)


# ---- images ----


def idx(files: Files, entry: Entry) -> Raw:
    """Idx files of unsigned bytes: two zero bytes, 8, number of dimensions, sizes (big-endian), values."""

    def read(name: str) -> np.ndarray:
        content = files.read(f"{name}-ubyte")
        if len(content) < 4 or content[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of unsigned bytes")
        shape = np.frombuffer(content, ">u4", content[3], 4).tolist()
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)

    x, y = ([read(f"{part}-{what}") for part in ("train", "t10k")] for what in ("images-idx3", "labels-idx1"))
    classes = tuple(entry["classes"])
    return Raw(np.concatenate(x)[:, None], np.concatenate(y).astype(np.int64), classes, official(*map(len, y)))


def cifar_binary(files: Files, entry: Entry) -> Raw:
    """Records of 3,073 bytes: label, then red, green and blue plane."""
    records = np.frombuffer(b"".join(map(files.read, files.names("*_batch*.bin"))), np.uint8).reshape(-1, 3073)
    x, y, rows = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64), (len(records) - 10_000, 10_000)
    return Raw(x, y, tuple(entry["classes"]), official(*rows))


def cifar_jpeg(files: Files, entry: Entry) -> Raw:
    """An npz file that holds JPEG files one after the other, and where each begins."""
    found = {k.split("/")[1]: v for k, v in arrays(files, "*.npz").items()}
    x = [
        picture(found[f"{part}_jpeg"][a:b].tobytes(), "RGB")
        for part in ("train", "test")
        for a, b in zip(found[f"{part}_offset"][:-1], found[f"{part}_offset"][1:])
    ]
    y = [found[f"{part}_label"].astype(np.int64) for part in ("train", "test")]
    return Raw(np.stack(x), np.concatenate(y), tuple(entry["classes"]), official(*map(len, y)))


def cifar_lossless(files: Files, entry: Entry) -> Raw:
    """One row of a png is one image, 32 x 32 x 3."""
    rows = np.concatenate([picture(files.read(name), "RGB").transpose(1, 2, 0) for name in files.names("*.png")])
    x, (y,) = rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2), arrays(files, "*labels.npy").values()
    return Raw(np.ascontiguousarray(x), y.astype(np.int64), tuple(entry["classes"]))


def named_arrays(files: Files, entry: Entry) -> Raw:
    """npz and npy files: "x" and "y" list arrays, part after part; without "x", x is the number of the row."""
    found = arrays(files, "*.np?")

    def joined(keys: list[str]) -> np.ndarray:
        whole = np.concatenate([found[key] for key in keys])
        if entry["kind"] == "fields":
            return whole.astype(np.float32)
        return whole if whole.dtype.kind in "fU" or (whole.dtype == np.uint8 and whole.ndim > 2) else whole.astype(int)

    y, sizes = joined(entry["y"]), [len(found[key]) for key in entry["y"]]
    x = joined(entry["x"]) if "x" in entry else np.arange(len(y))
    if entry["kind"] == "images":
        x, y = (x[:, None] if x.ndim == 3 else np.ascontiguousarray(x.transpose(0, 3, 1, 2))), y.ravel()
    extra = {name: joined([key]) for name, key in entry.get("extra", {}).items()}
    extra = {name: tuple(v.tolist()) if v.dtype.kind == "U" else v for name, v in extra.items()}
    classes = tuple(entry.get("classes", ())) or extra.pop("classes", ())
    return Raw(x, y, classes, official(*sizes) if len(sizes) > 1 else None, extra=extra)


def label_errors(files: Files, entry: Entry) -> Raw:
    """x: number of the test image; y: the given label. extra: predicted probabilities, and what five people said."""
    name = entry["variant"]
    asked, found = json.loads(files.text(f"{name}_mturk.json")), arrays(files, f"{name}_test_set_*.npy")
    y = found[f"{name}_test_set_original_labels"].astype(np.int64)
    extra = {
        "probabilities": found[f"{name}_test_set_pyx"],
        "asked": np.array([row["id"] for row in asked]),
        "guessed": np.array([row["our_guessed_label"] for row in asked]),
        "votes": np.array([[row["mturk"][k] for k in ("given", "guessed", "neither")] for row in asked]),
    }
    return Raw(np.arange(len(y)), y, extra=extra)


def omniglot(files: Files, entry: Entry) -> Raw:
    """background: y = character; runs: y = character within the run, official 20-way one-shot runs (train, test)."""
    if entry["variant"] == "background":
        byname = {"/".join(name.split("/")[-3:]): name for name in files.names("images_background_small?/*.png")}
        y, classes = codes([name.rsplit("/", 1)[0] for name in sorted(byname)])
        return Raw(pictures(files, [byname[name] for name in sorted(byname)], "L"), y, classes)
    train = files.names("run*/training/*.png")
    pairs = [line.split() for name in files.names("run*/class_labels.txt") for line in files.text(name).splitlines()]
    y, classes = codes([*train, *(name for _, name in pairs)])
    rows = (np.arange(len(train)), np.arange(0), np.arange(len(train), len(y)))
    return Raw(pictures(files, [*train, *(item for item, _ in pairs)], "L"), y, classes, rows)


def pixelwise(files: Files, entry: Entry) -> Raw:
    """x: pictures of the "inputs" folders, channels one after the other; y: 1 where the label is dark, or bright.

    Files go by number where their names are numbers; "train_...", "val_..." and "test_..." name the part.
    """

    def folder(name: str) -> list[str]:
        return sorted(files.names(f"{name}/*.png"), key=lambda path: path.rsplit("/", 1)[1].zfill(8))

    x = np.concatenate([pictures(files, folder(name), entry["mode"]) for name in entry["inputs"]], axis=1)
    y, names = pictures(files, folder("label"), "L")[:, 0] > 127, folder(entry["inputs"][0])
    parts = np.array([name.split("/")[-1].split("_")[0] for name in names])
    rows = tuple(np.flatnonzero(parts == part) for part in ("train", "val", "test")) if "train" in parts else None
    return Raw(x, (y != entry.get("dark", False)).astype(np.int64), rows=rows)


def patches(files: Files, entry: Entry) -> Raw:
    """Pictures of a restoration test set, cut into squares that do not overlap; y = number of the picture."""
    names = files.names(f"{entry['variant']}/*")
    return cut([picture(files.read(name), entry["mode"]) for name in names], entry["side"])


def cut(images: list[np.ndarray], side: int, classes: tuple[str, ...] = ()) -> Raw:
    """(channels, side, side) squares from top left on; what is left over at the right and lower edge is dropped."""
    x = []
    for image in images:
        c, h, w = (image.shape[0], *(n // side for n in image.shape[1:]))
        grid = image[:, : h * side, : w * side].reshape(c, h, side, w, side).transpose(1, 3, 0, 2, 4)
        x.append(grid.reshape(-1, c, side, side))
    return Raw(np.concatenate(x), np.repeat(np.arange(len(x)), list(map(len, x))), classes)


def spectra(files: Files, entry: Entry) -> Raw:
    """Jasper Ridge: x (pixels, 198 bands) as a share of the largest value; y (pixels, 4) abundances."""
    found = matlab(files, "jasperRidge2_R198.mat")
    x, y, pure = (a.T.astype(np.float32) for a in (found["Y"] / found["maxValue"].item(), found["A"], found["M"]))
    return Raw(x, y, tuple(entry["classes"]), extra={"endmembers": pure})


# ---- text ----


def long_text(files: Files, entry: Entry) -> Raw:
    """One long text, a token a character, or a word with <eos> at line ends and words that train lacks as <unk>."""
    texts = [files.text(part) for part in entry["parts"]]
    if entry.get("words"):
        texts = [re.sub(r" *\n", " <eos> ", text).split() for text in texts]
    vocabulary = tuple(sorted({*texts[0], *(["<unk>"] if entry.get("words") else [])}))
    number = {token: i for i, token in enumerate(vocabulary)}
    ids = [np.array([number[token] if token in number else number["<unk>"] for token in text]) for text in texts]
    rows, extra = (official(*map(len, ids)), {"joiner": " "}) if entry.get("words") else (None, None)
    return Raw(np.concatenate(ids), rows=rows, vocabulary=vocabulary, extra=extra)


def vocabulary_of(texts: list[list[str]], limit: int | None = None, least: int = 1) -> tuple[str, ...]:
    """Four special tokens, then the most frequent ones (ties by spelling)."""
    counts = collections.Counter(token for text in texts for token in text)
    frequent = sorted((w for w, n in counts.items() if n >= least), key=lambda w: (-counts[w], w))
    return ("<pad>", "<unk>", "<begin>", "<end>", *frequent)[:limit]


def encode(texts: list[list[str]], vocabulary: tuple[str, ...], longest: int | None, ends: bool = False) -> np.ndarray:
    """Token ids, one text a row, cut to ``longest`` and filled up with <pad> (0); ``ends``: within <begin>, <end>."""
    number = {token: i for i, token in enumerate(vocabulary)}
    rows = [[number.get(token, 1) for token in text[:longest]] for text in texts]
    return padded([[2, *row, 3] for row in rows] if ends else rows, np.int32)


def padded(rows: list, dtype: Any, fill: int = 0) -> np.ndarray:
    """Rows of different lengths as one array, filled up at the end."""
    out = np.full((len(rows), max(map(len, rows))), fill, dtype)
    for line, row in zip(out, rows):
        line[: len(row)] = row
    return out


def sentences(files: Files, entry: Entry) -> Raw:
    """Texts with a class each. ``pattern`` takes class and text out of a line, or "label" finds the class in the name of the file.

    The vocabulary has the words seen at least twice; labels play no part in it.
    """
    parts = []
    for part in entry["parts"]:
        rows = []
        for name in files.names(part):
            text = files.read(name).decode(entry.get("encoding", "utf-8"))
            lines = [text] if entry.get("whole") else text.splitlines()[entry.get("header", 0) :]
            if "label" in entry:
                rows += [(re.search(entry["label"], name)[1], line) for line in lines]
            else:
                rows += [re.fullmatch(entry["pattern"], line).group("y", "x") for line in lines if line]
        parts.append(rows)
    labels, texts = zip(*(row for rows in parts for row in rows))
    split, (y, classes) = [text.split() for text in texts], codes(labels)
    vocabulary = vocabulary_of(split, 20_000, least=2)
    rows = official(*map(len, parts)) if len(parts) > 1 else None
    x = encode(split, vocabulary, entry["longest"])
    return Raw(x, y, tuple(entry.get("classes", classes)), rows, vocabulary, {"joiner": " "})


def pairs(files: Files, entry: Entry) -> Raw:
    """Sequence to sequence: x and y are rows of token ids between <begin> and <end>, over one vocabulary."""
    parts = []
    for part in entry["parts"]:
        if "languages" in entry:  # a file a language, a sentence a line
            both = [files.text(f"{part}.{language}").splitlines() for language in entry["languages"]]
            found = [[re.findall(r"\w+|[^\w\s]", text) for text in line] for line in zip(*both, strict=True)]
        elif part.endswith(".jsonl"):
            lines = map(json.loads, files.text(part).splitlines())
            found = [[list(line["question"]), list(line["answer"])] for line in lines]
        else:
            lines = (re.match("IN: (.*) OUT: (.*)", line).groups() for line in files.text(part).splitlines())
            found = [[text.split() for text in line] for line in lines]
        parts.append(found)
    sides = list(zip(*(row for found in parts for row in found)))
    vocabulary = vocabulary_of([*sides[0], *sides[1]], entry.get("words"), entry.get("least", 1))
    x, y = (encode(side, vocabulary, entry.get("longest"), ends=True) for side in sides)
    return Raw(x, y, (), official(*map(len, parts)), vocabulary, {"joiner": entry.get("joiner", " ")})


def lines(files: Files, entry: Entry) -> Raw:
    """Short texts, a character a token: y is x one step on, both filled up with <pad>."""
    texts = [list(line) for line in files.text(entry["file"]).split()]
    vocabulary = vocabulary_of(texts)
    ids = encode(texts, vocabulary, None, ends=True)
    return Raw(np.where(ids == 3, 0, ids)[:, :-1], ids[:, 1:], vocabulary=vocabulary)


def molecules(files: Files, entry: Entry) -> Raw:
    """x: the SMILES string, a character a token; y: measured values (NaN = not measured), or a class."""
    found, target = frame(files, entry["file"]), entry["target"]
    smiles = [list(text.strip()) for text in found[entry.get("text", "smiles")]]
    vocabulary, measured = vocabulary_of(smiles), isinstance(target, list)
    y = found[target].to_numpy(np.float32 if measured else np.int64)
    classes = tuple(entry.get("classes", target if measured else ()))
    return Raw(encode(smiles, vocabulary, entry.get("longest")), y, classes, vocabulary=vocabulary)


# ---- tables ----


def table(files: Files, entry: Entry) -> Raw:
    """Rows of csv files, one a part: numbers first, then a column of 0 and 1 for each word of each column of words.

    An empty number becomes 0, and a column of its own says so.
    """
    import pandas as pd

    parts = [frame(files, part, **entry.get("csv", {})) for part in entry["parts"]]
    both = pd.concat(parts, ignore_index=True)
    y, classes = codes(both.pop(both.columns[entry["target"]]).astype(str).str.strip())
    values = both.select_dtypes("number").drop(columns=entry.get("drop", []), errors="ignore")
    empty = values.loc[:, values.isna().any()].isna().add_suffix(" empty")
    words = pd.get_dummies(both.select_dtypes(exclude="number"), dummy_na=False)
    found = pd.concat([values.fillna(0), empty, words], axis=1)
    rows = official(*map(len, parts)) if len(parts) > 1 else None
    return Raw(found.to_numpy(np.float32), y, classes, rows, extra={"columns": tuple(map(str, found.columns))})


def uci(files: Files, entry: Entry) -> Raw:
    """Regression with Gal's 20 splits: split 0 is the test part, extra["test rows"] has all of them, -1 filled."""
    folder = f"{entry['variant']}/data"
    values = numbers(files, f"{folder}/data.txt", float)
    inputs, target = (numbers(files, f"{folder}/index_{what}.txt", ndmin=1) for what in ("features", "target"))
    number = len(files.names(f"{folder}/index_test_*.txt"))
    tests = [numbers(files, f"{folder}/index_test_{i}.txt") for i in range(number)]
    rows = (np.setdiff1d(np.arange(len(values)), tests[0]), None, tests[0])
    x, y = values[:, inputs].astype(np.float32), values[:, target[0]].astype(np.float32)
    return Raw(x, y, (), rows, extra={"test rows": padded(tests, int, -1)})


def attributes(files: Files, entry: Entry) -> Raw:
    """Animals with Attributes: x (50 animals, 85) of 0 and 1, y the animal."""
    x = numbers(files, "predicate-matrix-binary.txt", np.float32)
    names = tuple(line.split()[1] for line in files.text("predicates.txt").splitlines() if line.strip())
    return Raw(x, np.arange(len(x)), tuple(entry["classes"]), extra={"columns": names})


def ratings(files: Files, entry: Entry) -> Raw:
    """x (ratings, 2): user and item, numbered from 0; y: the rating; a matrix with NaN for none, or a csv file."""
    if "npz" in entry:
        found = arrays(files, entry["npz"])["jester5k_ratings/ratings"]
        x = np.argwhere(np.isfinite(found))
        return Raw(x, found[x[:, 0], x[:, 1]])
    found = frame(files, "ratings.csv").to_numpy()
    x = np.stack([np.unique(found[:, i], return_inverse=True)[1] for i in (0, 1)], axis=1)
    return Raw(x, found[:, 2].astype(np.float32), extra={"time": found[:, 3].astype(np.int64)})


def bandit(files: Files, entry: Entry) -> Raw:
    """Open Bandit: x what was known of the user, y click; extra, by row: action, position, propensity; and the items."""
    import pandas as pd

    policy, campaign = entry["variant"].split("-")
    log, items = (frame(files, f"{policy}/{campaign}/{n}.csv", index_col=0) for n in (campaign, "item_context"))
    users = pd.concat([log.filter(like="affinity"), pd.get_dummies(log.filter(like="user_feature"))], axis=1)
    extra = {
        "action": log["item_id"].to_numpy(),
        "position": log["position"].to_numpy(),
        "propensity": log["propensity_score"].to_numpy(np.float32),
        "items": pd.get_dummies(items.set_index("item_id")).to_numpy(np.float32),
        "columns": tuple(users.columns),
    }
    return Raw(users.to_numpy(np.float32), log["click"].to_numpy(np.int64), ("no click", "click"), extra=extra)


# ---- series and signals ----


def series(files: Files, entry: Entry) -> Raw:
    """One long series, in the order of time; y is the next step."""
    found = frame(files, entry["file"], **entry.get("csv", {})).select_dtypes("number")
    rows = official(*entry["sizes"]) if "sizes" in entry else None
    return Raw(found.to_numpy(np.float32), rows=rows, extra={"columns": tuple(map(str, found.columns))})


def ts(files: Files, entry: Entry) -> Raw:
    """UCR/UEA archive: x (n, channels, length), shorter series filled up with 0; y a class or, by header, a number."""
    texts = [files.text(f"{entry['variant']}_{part}.ts").lower() for part in ("TRAIN", "TEST")]
    parts = [text.partition("@data")[2].split() for text in texts]
    *channels, label = zip(*(line.split(":") for part in parts for line in part), strict=True)
    signals = [[np.array(values.split(","), np.float32) for values in channel] for channel in channels]
    x = np.ascontiguousarray(np.stack([padded(channel, np.float32) for channel in signals], axis=1))
    y, classes = (np.array(label, np.float32), ()) if entry.get("target") == "number" else codes(label)
    return Raw(x, y, classes, official(*map(len, parts)), extra={"length": np.array(list(map(len, signals[0])))})


def spoken(files: Files, entry: Entry) -> Raw:
    """Spoken digits at 8 kHz: x (n, 8000) in -1..1, cut or filled up to one second; official test: takes 0 to 4."""
    names = files.names("recordings/*.wav")
    digit, speaker, take = zip(*(re.fullmatch(r"(\d)_(\w+)_(\d+)", n.rsplit("/", 1)[1][:-4]).groups() for n in names))
    x = np.zeros((len(names), 8000), np.float32)
    for row, name in zip(x, names):
        with wave.open(files.stream(name)) as sound:
            signal = np.frombuffer(sound.readframes(8000), "<i2") / np.float32(32768)
        row[: len(signal)] = signal
    test, (who, speakers) = np.array(take, int) < 5, codes(speaker)
    rows = (np.flatnonzero(~test), None, np.flatnonzero(test))
    return Raw(x, np.array(digit, np.int64), tuple("0123456789"), rows, extra={"speaker": who, "speakers": speakers})


def events(files: Files, entry: Entry) -> Raw:
    """N-MNIST: x (n, 2 polarities, 10 steps of 31 ms, 34, 34) counts of events, 5 bytes each in the file."""
    lists = [numbers(files, f"{part}.txt") for part in ("train1K", "test100")]
    (number, y), byname = np.concatenate(lists).T, {n.rsplit("/", 1)[1]: n for n in files.names("*.bs2")}
    x = np.zeros((len(number), 2, 10, 34, 34), np.uint8)
    for image, n in zip(x, number):
        e = np.frombuffer(files.read(byname[f"{n}.bs2"]), np.uint8).reshape(-1, 5).astype(int)
        step = (((e[:, 2] & 127) << 16) | (e[:, 3] << 8) | e[:, 4]) // 31_000
        np.add.at(image, (e[:, 2] >> 7, np.minimum(step, 9), e[:, 1].clip(max=33), e[:, 0].clip(max=33)), 1)
    return Raw(x, y, tuple("0123456789"), official(*map(len, lists)))


def eeg(files: Files, entry: Entry) -> Raw:
    """Motor imagery: x (trials, 64 channels, 640) in microvolt, 4 s from the cue at 160 Hz; y left or right fist."""
    edfio, x, y = library("edfio"), [], []
    for run in entry["runs"]:
        recording = edfio.read_edf(files.stream(f"S001R{run:02}.edf"))
        signal = np.stack([s.data for s in recording.signals])
        for note in recording.annotations:
            start = round(note.onset * 160)
            if note.text in ("T1", "T2") and start + 640 <= signal.shape[1]:
                x.append(signal[:, start : start + 640])
                y.append(int(note.text == "T2"))
    return Raw(np.stack(x).astype(np.float32), np.array(y), tuple(entry["classes"]))


def spikes(files: Files, entry: Entry) -> Raw:
    """x (trials, 500 bins of 1 ms): number of the cell that fired, 0 = none; y the sound that was played."""
    found = frame(files, f"{entry['variant']}.csv")
    role, (sounds, y) = found.pop("role").to_numpy(), np.unique(found.pop("sound_ID"), return_inverse=True)
    rows = tuple(np.flatnonzero(role == part) for part in ("train", "val", "test"))
    return Raw(found.to_numpy(np.int32), y, tuple(map(str, sounds)), rows)


def brain(files: Files, entry: Entry) -> Raw:
    """fMRI at rest: x (11 subjects, 94 regions, 355 scans), y the subject; extra: mean fibre counts and lengths."""
    x = np.stack([matlab(files, name)["tc"] for name in files.names("*_tc.mat")]).astype(np.float32)
    extra = {"connections": matlab(files, "Cmat_avg.mat")["sc"], "lengths": matlab(files, "Dmat_avg.mat")["len"]}
    return Raw(x, np.arange(len(x)), extra={k: v.astype(np.float32) for k, v in extra.items()})


def solution(files: Files, entry: Entry) -> Raw:
    """A solution of an equation on a grid: x (points, 2) time and place (or two places), y (points, 1 or 2) its value."""
    found = matlab(files, entry["file"])
    if "w" in found:
        x, y = np.stack([found["x"][0], found["y"][0]], 1), found["w"].T
    else:
        x = np.stack(np.meshgrid(*(found[k].ravel() for k in entry["axes"]), indexing="ij"), -1).reshape(-1, 2)
        u = found[entry["values"]].T.reshape(-1, 1)
        y = np.hstack([u.real, u.imag]) if np.iscomplexobj(u) else u
    return Raw(x.astype(np.float32), y.astype(np.float32))


# ---- graphs ----


def nodes(features, y, edges, rows=None, classes=(), **extra) -> Raw:
    """Node classification: x numbers of nodes; extra["features"] (nodes, f), extra["edges"] (2, both directions)."""
    both = np.concatenate([edges, edges[::-1]], axis=1)
    both = np.unique(both[:, both[0] != both[1]], axis=1).astype(np.int64)
    extra = {"features": features.astype(np.float32), "edges": both} | extra
    return Raw(np.arange(len(y)), y.astype(np.int64), classes, rows, extra=extra)


def dense(data, indices, indptr, shape) -> np.ndarray:
    """Float32 matrix of a compressed one; numbers that point outside are a ValueError."""
    from scipy.sparse import csr_matrix

    if np.prod(np.asarray(shape, float)) > 1 << 28:
        raise ValueError(f"a matrix of shape {tuple(shape)}")
    matrix = csr_matrix((data, indices, indptr), shape)
    matrix.check_format(full_check=True)
    return matrix.astype(np.float32).toarray()


def graph_npz(files: Files, entry: Entry) -> Raw:
    found = {k.split("/")[1]: v for k, v in arrays(files, f"{entry['variant']}.npz").items()}
    adjacent, features = (
        dense(*(found[f"{k}_{p}"] for p in ("data", "indices", "indptr", "shape"))) for k in ("adj", "attr")
    )
    return nodes(features, found["labels"], np.stack(adjacent.nonzero()), classes=tuple(found["class_names"].tolist()))


def webgraph(files: Files, entry: Entry) -> Raw:
    """Geom-GCN's graphs: split 0 of ten; extra["splits"] (10, nodes) is 0 train, 1 validation, 2 test, 3 none."""
    name = entry["variant"]
    table = [line.split("\t") for line in files.text(f"{name}/out1_node_feature_label.txt").splitlines()[1:]]
    table.sort(key=lambda row: int(row[0]))
    features = [np.array(row[1].split(","), int) for row in table]
    if name == "film":  # numbers of the words that occur
        features = [np.isin(np.arange(932), words) for words in features]
    edges = numbers(files, f"{name}/out1_graph_edges.txt", skiprows=1).T
    found = arrays(files, f"{name}_split_0.6_0.2_?.npz")
    masks = [[found[f"{name}_split_0.6_0.2_{i}/{p}_mask"] != 0 for p in ("train", "val", "test")] for i in range(10)]
    splits = np.stack([np.select(mask, [0, 1, 2], 3) for mask in masks])
    rows = tuple(np.flatnonzero(splits[0] == part) for part in range(3))
    return nodes(np.stack(features), np.array([int(row[2]) for row in table]), edges, rows, splits=splits)


def planetoid(files: Files, entry: Entry) -> Raw:
    """Cora and Citeseer with the usual split: 20 a class to train on, 500 to validate, 1,000 to test."""
    part = {k: stored(files.read(f"ind.{entry['variant']}.{k}")) for k in ("allx", "ally", "tx", "ty", "y", "graph")}
    test = np.array(files.text(f"ind.{entry['variant']}.test.index").split(), int)
    n, known, train = len(part["graph"]), len(part["ally"]), len(part["y"])
    features, onehot = (np.zeros((n, part[k].shape[1])) for k in ("allx", "ally"))
    features[:known], onehot[:known] = part["allx"], part["ally"]
    features[test], onehot[test] = part["tx"], part["ty"]
    edges = np.array([(a, b) for a, near in part["graph"].items() for b in near]).T
    return nodes(features, onehot.argmax(1), edges, (np.arange(train), np.arange(train, train + 500), test))


def stored(content: bytes) -> Any:
    """Arrays, sparse matrices and adjacency lists of Planetoid's files, which are pickles - without unpickling.

    ``pickletools`` only lists the instructions; the few that these files use are carried out here on plain values. No
    name in the file is ever looked up or called, so a file cannot run anything.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    empty = {"MARK": lambda: empty, "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
    empty |= {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}

    def from_mark() -> list[Any]:
        start = max(i for i, item in enumerate(stack) if item is empty)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    for op, argument, _ in pickletools.genops(content):
        match op.name:
            case "PROTO" | "STOP":
                pass
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "SHORT_BINSTRING" | "BINSTRING" | "GLOBAL":
                stack.append(argument)
            case name if name in empty:
                stack.append(empty[name]())
            case "TUPLE":
                stack.append(tuple(from_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
            case "REDUCE" | "NEWOBJ":  # "call": keep what would be called, and with what
                arguments, called = stack.pop(), stack.pop()
                stack.append({} if called == "collections defaultdict" else {"call": called, "with": arguments})
            case "BUILD":
                state = stack.pop()
                stack[-1]["state"] = state
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                items = from_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = from_mark()
                stack[-1].update(zip(items[::2], items[1::2]))
            case name:
                raise ValueError(f"unexpected instruction {name}")
    (value,) = stack
    return value if "call" not in value else rebuilt(value)


def rebuilt(value: dict[str, Any]) -> np.ndarray:
    """The array or the sparse matrix (made dense) that such a description stands for."""
    if value["call"] == "scipy.sparse.csr csr_matrix":
        state = value["state"]
        return dense(*(rebuilt(state[k]) for k in ("data", "indices", "indptr")), state["_shape"])
    _, shape, kind, fortran, text = value["state"]
    code = str(kind["with"][0])
    if not re.fullmatch(r"[iuf][1248]", code) or fortran:
        raise ValueError(f"unexpected array of type {code}")
    return np.frombuffer(text.encode("latin-1"), f"<{code}").reshape(shape)


def whole_graphs(files: Files, entry: Entry) -> Raw:
    """Graph classification: x numbers of graphs; extra: "features" (nodes, tags) one-hot, "edges", "graph" of each node."""
    rows = iter([list(map(int, line.split()[:100_000])) for line in files.text(f"{entry['variant']}.txt").splitlines()])
    y, tags, graph, edges = [], [], [], []
    for g in range(next(rows)[0]):
        (n, label), first = next(rows), len(tags)
        y.append(label)
        for i in range(first, first + n):
            tag, count, *near = next(rows)
            tags.append(tag)
            graph.append(g)
            edges += [(i, first + j) for j in near[:count]]
    kinds, tag = np.unique(tags, return_inverse=True)
    labels, classes = codes(y)
    raw = nodes(np.eye(len(kinds))[tag], tag, np.array(edges).T, graph=np.array(graph))
    return raw._replace(x=np.arange(len(y)), y=labels, classes=classes)
