"""Readers of the public sets: files in, NumPy arrays out.

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

from benchtop.data import DataError, Raw
from benchtop.data.fetch import Files

Entry = dict[str, Any]


def official(*sizes: int) -> tuple:
    """Row numbers of consecutive parts; with two sizes (train, test) the validation rows come out of train."""
    ends = np.cumsum((0, *sizes))
    parts = [np.arange(a, b) for a, b in zip(ends[:-1], ends[1:])]
    return tuple(parts) if len(parts) == 3 else (parts[0], None, parts[1])


def codes(values) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers and class names, in sorted order of the names."""
    names, numbers = np.unique(np.asarray(values, dtype=str), return_inverse=True)
    return numbers.astype(np.int64), tuple(names.tolist())


def arrays(files: Files, pattern: str) -> dict[str, np.ndarray]:
    """Arrays of an npz file; object arrays (pickles) are refused."""
    with np.load(files.stream(pattern), allow_pickle=False) as found:
        return dict(found)


def array(files: Files, pattern: str) -> np.ndarray:
    return np.load(files.stream(pattern), allow_pickle=False)


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
    """A csv file as pandas table; numbers are rounded correctly on every platform."""
    import pandas as pd

    return pd.read_csv(files.stream(pattern), float_precision="round_trip", **options)


# ---- images ----


def idx_array(content: bytes) -> np.ndarray:
    """An idx file of unsigned bytes: two zero bytes, 8, number of dimensions, sizes, values."""
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("not an idx file of unsigned bytes")
    shape = np.frombuffer(content, ">u4", content[3], 4).tolist()
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def idx(files: Files, entry: Entry) -> Raw:
    part = [
        (idx_array(files.read(f"{p}-images-idx3-ubyte")), idx_array(files.read(f"{p}-labels-idx1-ubyte")))
        for p in ("train", "t10k")
    ]
    x, y = (np.concatenate(both) for both in zip(*part))
    return Raw(x[:, None], y.astype(np.int64), tuple(entry["classes"]), official(*(len(p[0]) for p in part)))


def cifar_binary(files: Files, entry: Entry) -> Raw:
    """Records of 3,073 bytes: label, then red, green and blue plane."""
    records = np.frombuffer(b"".join(map(files.read, files.names("*_batch*.bin"))), np.uint8).reshape(-1, 3073)
    return Raw(
        records[:, 1:].reshape(-1, 3, 32, 32),
        records[:, 0].astype(np.int64),
        tuple(entry["classes"]),
        official(len(records) - 10_000, 10_000),
    )


def cifar_jpeg(files: Files, entry: Entry) -> Raw:
    found = arrays(files, "cifar10_jpeg_q75.npz")
    x = [
        picture(found[f"{p}_jpeg"][a:b].tobytes(), "RGB")
        for p in ("train", "test")
        for a, b in zip(found[f"{p}_offset"][:-1], found[f"{p}_offset"][1:])
    ]
    y = np.concatenate([found["train_label"], found["test_label"]]).astype(np.int64)
    return Raw(np.stack(x), y, tuple(entry["classes"]), official(len(found["train_label"]), len(found["test_label"])))


def cifar_lossless(files: Files, entry: Entry) -> Raw:
    """One row of a png is one image, 32 x 32 x 3."""
    rows = np.concatenate([picture(files.read(name), "RGB").transpose(1, 2, 0) for name in files.names("*.png")])
    x = rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
    return Raw(np.ascontiguousarray(x), array(files, "labels.npy").astype(np.int64), tuple(entry["classes"]))


def cifar_soft(files: Files, entry: Entry) -> Raw:
    """x: number of the test image in the official order; y: how the votes of about 50 people spread over classes."""
    y = array(files, "cifar10h-probs.npy").astype(np.float32)
    return Raw(np.arange(len(y)), y, tuple(entry["classes"]), extra={"votes": array(files, "cifar10h-counts.npy")})


def label_errors(files: Files, entry: Entry) -> Raw:
    """x: number of the test image; y: the given label. extra: predicted probabilities, and what five people said."""
    name = entry["variant"]
    asked = json.loads(files.text(f"{name}_mturk.json"))
    votes = np.array([[row["mturk"][k] for k in ("given", "guessed", "neither")] for row in asked])
    y = array(files, f"{name}_test_set_original_labels.npy").astype(np.int64)
    return Raw(
        np.arange(len(y)),
        y,
        extra={
            "probabilities": array(files, f"{name}_test_set_pyx.npy").astype(np.float32),
            "asked": np.array([row["id"] for row in asked]),
            "guessed": np.array([row["our_guessed_label"] for row in asked]),
            "votes": votes,
        },
    )


def labelled_npz(files: Files, entry: Entry) -> Raw:
    """PneumoniaMNIST: images and labels per part."""
    found = arrays(files, "*.npz")
    x, y = (np.concatenate([found[f"{p}_{what}"] for p in ("train", "val", "test")]) for what in ("images", "labels"))
    sizes = [len(found[f"{p}_labels"]) for p in ("train", "val", "test")]
    return Raw(x[:, None], y[:, 0].astype(np.int64), tuple(entry["classes"]), official(*sizes))


def pacs(files: Files, entry: Entry) -> Raw:
    """extra["domain"]: number of the domain of each image, by row."""
    found = arrays(files, "*.npz")
    x = np.ascontiguousarray(found["x"].transpose(0, 3, 1, 2))
    extra = {"domain": found["domain"].astype(np.int64), "domains": tuple(found["domain_names"].tolist())}
    return Raw(x, found["label"].astype(np.int64), tuple(found["class_names"].tolist()), extra=extra)


def omniglot(files: Files, entry: Entry) -> Raw:
    """background: y = character; runs: y = character within the run, official 20-way one-shot runs (train, test)."""
    if entry["variant"] == "background":
        byname = {"/".join(name.split("/")[-3:]): name for name in files.names("images_background_small?/*.png")}
        y, classes = codes([name.rsplit("/", 1)[0] for name in sorted(byname)])
        return Raw(pictures(files, [byname[name] for name in sorted(byname)], "L"), y, classes)
    train = files.names("run*/training/*.png")
    pairs = [line.split() for name in files.names("run*/class_labels.txt") for line in files.text(name).splitlines()]
    y, classes = codes([*train, *(cls for _, cls in pairs)])
    rows = (np.arange(len(train)), np.arange(0), np.arange(len(train), len(y)))
    return Raw(pictures(files, [*train, *(item for item, _ in pairs)], "L"), y, classes, rows)


def segmentation(files: Files, entry: Entry) -> Raw:
    """ISBI 2012: y is 1 on membranes, per pixel."""
    numbers = range(len(files.names("image/*.png")))
    y = pictures(files, [f"label/{i}.png" for i in numbers], "L")[:, 0]
    return Raw(pictures(files, [f"image/{i}.png" for i in numbers], "L"), (y < 128).astype(np.int64))


def change(files: Files, entry: Entry) -> Raw:
    """LEVIR: x holds the picture before (3 channels) and after (3 channels); y is 1 where a building changed."""
    before, after, y = (files.names(f"{folder}/*.png") for folder in ("A", "B", "label"))
    x = np.concatenate([pictures(files, before, "RGB"), pictures(files, after, "RGB")], axis=1)
    parts = np.array([name.split("/")[-1].split("_")[0] for name in before])
    rows = tuple(np.flatnonzero(parts == part) for part in ("train", "val", "test"))
    return Raw(x, (pictures(files, y, "L")[:, 0] > 127).astype(np.int64), rows=rows)


def patches(files: Files, entry: Entry) -> Raw:
    """Pictures of a restoration test set, cut into squares that do not overlap; y = number of the picture."""
    names = files.names(f"{entry['variant']}/*")
    return cut([picture(files.read(name), entry["mode"]) for name in names], entry["side"])


def cut(images: list[np.ndarray], side: int, classes: tuple[str, ...] = ()) -> Raw:
    """(channels, side, side) squares from top left on; what is left over at the right and lower edge is dropped."""
    x, y = [], []
    for number, image in enumerate(images):
        c, h, w = (image.shape[0], *(n // side for n in image.shape[1:]))
        grid = image[:, : h * side, : w * side].reshape(c, h, side, w, side).transpose(1, 3, 0, 2, 4)
        x.append(grid.reshape(-1, c, side, side))
        y += [number] * (h * w)
    return Raw(np.concatenate(x), np.array(y), classes)


def spectra(files: Files, entry: Entry) -> Raw:
    """Jasper Ridge: x (pixels, 198 bands) as a share of the largest value; y (pixels, 4) abundances."""
    found = matlab(files, "jasperRidge2_R198.mat")
    x = (found["Y"].T / found["maxValue"].item()).astype(np.float32)
    return Raw(
        x,
        found["A"].T.astype(np.float32),
        tuple(entry["classes"]),
        extra={"endmembers": found["M"].T.astype(np.float32)},
    )


# ---- text ----


def characters(files: Files, entry: Entry) -> Raw:
    """One long text, a token a character."""
    text = files.text("input.txt")
    vocabulary = tuple(sorted(set(text)))
    return Raw(np.array([*map({c: i for i, c in enumerate(vocabulary)}.__getitem__, text)]), vocabulary=vocabulary)


def words(files: Files, entry: Entry) -> Raw:
    """WikiText-2: one long text, a token a word, <eos> at line ends; trained on valid.txt, tested on test.txt."""
    texts = [re.sub(r" *\n", " <eos> ", files.text(f"{part}.txt")).split() for part in ("valid", "test")]
    vocabulary = tuple(sorted({"<unk>", *texts[0]}))
    number = {word: i for i, word in enumerate(vocabulary)}
    ids = [np.array([number.get(word, number["<unk>"]) for word in text]) for text in texts]
    return Raw(np.concatenate(ids), rows=official(*map(len, ids)), vocabulary=vocabulary, extra={"joiner": " "})


PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<begin>", "<end>"


def vocabulary_of(texts: list[list[str]], limit: int = 1 << 30, least: int = 1) -> tuple[str, ...]:
    """The four special tokens, then the most frequent ones (ties by spelling)."""
    counts = collections.Counter(token for text in texts for token in text)
    frequent = sorted((w for w, n in counts.items() if n >= least), key=lambda w: (-counts[w], w))
    return (PAD, UNKNOWN, BEGIN, END, *frequent[: limit - 4])


def encode(texts: list[list[str]], vocabulary: tuple[str, ...], longest: int, ends: bool = False) -> np.ndarray:
    """Token ids, one text a row, cut to ``longest`` and filled up with <pad> (0)."""
    number = {token: i for i, token in enumerate(vocabulary)}
    rows = [[number.get(token, 1) for token in text[:longest]] for text in texts]
    if ends:
        rows = [[2, *row, 3] for row in rows]
    out = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for line, row in zip(out, rows):
        line[: len(row)] = row
    return out


def classified(texts: list[str], labels, entry: Entry, rows=None) -> Raw:
    """Texts with a class each; the vocabulary has words seen at least twice, labels play no part in it."""
    split = [text.split() for text in texts]
    vocabulary = vocabulary_of(split, entry.get("words", 20_000), least=2)
    y, classes = codes(labels)
    x = encode(split, vocabulary, entry.get("longest", 128))
    return Raw(x, y, tuple(entry.get("classes", classes)), rows, vocabulary, {"joiner": " "})


def sentences(files: Files, entry: Entry) -> Raw:
    """SST-2 and AG News: text, tab, label."""
    parts = [
        [line.rsplit("\t", 1) for line in files.text(f"{part}.tsv").splitlines()[entry["header"] :] if line]
        for part in entry["parts"]
    ]
    text, label = zip(*(row for part in parts for row in part))
    return classified(text, label, entry, official(*map(len, parts)))


def corpus(files: Files, entry: Entry) -> Raw:
    """NLTK's corpora: a folder a class, a file a class, or (questions) the class before a colon."""
    name = entry["variant"]
    if name == "qc":
        parts = [files.read(f"qc/{part}.txt").decode("latin-1").splitlines() for part in ("train", "test")]
        label, text = zip(*(re.match(r"(\w+):\S+ (.*)", line).groups() for part in parts for line in part))
        return classified(text, label, entry, official(*map(len, parts)))
    found = [f for f in files.names(f"{name}/*") if not f.rsplit("/", 1)[1].startswith("README")]
    if name == "movie_reviews":
        return classified([files.read(f).decode("latin-1") for f in found], [f.split("/")[-2] for f in found], entry)
    lines = [
        (line, f.split(".")[-1] if "polarity" in name else f.split("/")[-1].split(".")[0])
        for f in found
        for line in files.read(f).decode("latin-1").splitlines()
    ]
    return classified(*zip(*lines), entry)


def pairs(files: Files, entry: Entry) -> Raw:
    """Sequence to sequence: x and y are rows of token ids between <begin> and <end>, over one vocabulary."""
    parts = []
    for part in entry["parts"]:
        if "languages" in entry:
            source, target = (files.text(f"{part}.{language}").splitlines() for language in entry["languages"])
            pair = [
                (re.findall(r"\w+|[^\w\s]", s), re.findall(r"\w+|[^\w\s]", t))
                for s, t in zip(source, target, strict=True)
            ]
        elif part.endswith(".jsonl"):
            lines = [json.loads(line) for line in files.text(part).splitlines()]
            pair = [(list(line["question"]), list(line["answer"])) for line in lines]
        else:
            lines = [re.match("IN: (.*) OUT: (.*)", line).groups() for line in files.text(part).splitlines()]
            pair = [(s.split(), t.split()) for s, t in lines]
        parts.append(pair)
    sources, targets = zip(*(row for pair in parts for row in pair))
    vocabulary = vocabulary_of([*sources, *targets], entry.get("words", 1 << 30), entry.get("least", 1))
    x, y = (encode(side, vocabulary, entry.get("longest", 1 << 30), ends=True) for side in (sources, targets))
    return Raw(x, y, (), official(*map(len, parts)), vocabulary, {"joiner": entry.get("joiner", " ")})


def lines(files: Files, entry: Entry) -> Raw:
    """Short texts, a character a token: y is x one step on, both filled up with <pad>."""
    texts = [list(line) for line in files.text(entry["file"]).split()]
    vocabulary = vocabulary_of(texts)
    ids = encode(texts, vocabulary, 1 << 30, ends=True)
    return Raw(np.where(ids == 3, 0, ids)[:, :-1], ids[:, 1:], vocabulary=vocabulary)


def molecules(files: Files, entry: Entry) -> Raw:
    """x: the SMILES string, a character a token; y: measured values (NaN = not measured), or a class."""
    table = frame(files, entry["file"])
    smiles = [list(text.strip()) for text in table[entry.get("text", "smiles")]]
    vocabulary = vocabulary_of(smiles)
    y = table[entry["target"]].to_numpy(np.float32 if isinstance(entry["target"], list) else np.int64)
    return Raw(
        encode(smiles, vocabulary, entry.get("longest", 1 << 30)),
        y,
        tuple(entry.get("classes", entry["target"] if isinstance(entry["target"], list) else ())),
        vocabulary=vocabulary,
    )


# ---- tables ----


def table(files: Files, entry: Entry) -> Raw:
    """Rows of csv files, one a part: numbers first, then a column of 0 and 1 for each word of each column of words.

    An empty number becomes 0, and a column of its own says so.
    """
    import pandas as pd

    parts = [frame(files, part, **entry.get("csv", {})) for part in entry["parts"]]
    both = pd.concat(parts, ignore_index=True)
    y, classes = codes(both.pop(both.columns[entry["target"]]).astype(str).str.strip())
    numbers = both.select_dtypes("number").drop(columns=[c for c in both.columns if c in entry.get("drop", [])])
    empty = numbers.loc[:, numbers.isna().any()].isna().add_suffix(" empty")
    words = pd.get_dummies(both.select_dtypes(exclude="number"), dummy_na=False)
    found = pd.concat([numbers.fillna(0), empty, words], axis=1)
    rows = official(*map(len, parts)) if len(parts) > 1 else None
    return Raw(found.to_numpy(np.float32), y, classes, rows, extra={"columns": tuple(map(str, found.columns))})


def uci(files: Files, entry: Entry) -> Raw:
    """Regression with Gal's 20 splits: split 0 is the test part, extra["test rows"] has all of them, -1 filled."""
    folder = f"{entry['variant']}/data"
    values = np.loadtxt(files.stream(f"{folder}/data.txt"))
    inputs, target = (
        np.loadtxt(files.stream(f"{folder}/index_{what}.txt"), int, ndmin=1) for what in ("features", "target")
    )
    number = len(files.names(f"{folder}/index_test_*.txt"))
    tests = [np.loadtxt(files.stream(f"{folder}/index_test_{i}.txt"), int) for i in range(number)]
    every = np.full((number, max(map(len, tests))), -1)
    for line, rows in zip(every, tests):
        line[: len(rows)] = rows
    rows = (np.setdiff1d(np.arange(len(values)), tests[0]), None, tests[0])
    x, y = values[:, inputs].astype(np.float32), values[:, target[0]].astype(np.float32)
    return Raw(x, y, (), rows, extra={"test rows": every})


def attributes(files: Files, entry: Entry) -> Raw:
    """Animals with Attributes: x (50 animals, 85) of 0 and 1, y the animal."""
    x = np.loadtxt(files.stream("predicate-matrix-binary.txt"), np.float32)
    names = tuple(line.split()[1] for line in files.text("predicates.txt").splitlines() if line.strip())
    return Raw(x, np.arange(len(x)), tuple(entry["classes"]), extra={"columns": names})


def ratings(files: Files, entry: Entry) -> Raw:
    """x (ratings, 2): user and item, numbered from 0; y: the rating."""
    if "npz" in entry:
        found = arrays(files, entry["npz"])["ratings"]
        x = np.argwhere(np.isfinite(found))
        return Raw(x, found[x[:, 0], x[:, 1]].astype(np.float32))
    found = frame(files, "ratings.csv").to_numpy()
    x = np.stack([np.unique(found[:, i], return_inverse=True)[1] for i in (0, 1)], axis=1)
    return Raw(x, found[:, 2].astype(np.float32), extra={"time": found[:, 3].astype(np.int64)})


def bandit(files: Files, entry: Entry) -> Raw:
    """Open Bandit: x what was known of the user, y click; extra, by row: action, position, propensity; and the items."""
    import pandas as pd

    policy, campaign = entry["variant"].split("-")
    log = frame(files, f"{policy}/{campaign}/{campaign}.csv", index_col=0)
    items = frame(files, f"{policy}/{campaign}/item_context.csv", index_col=0)
    users = pd.concat([log.filter(like="affinity"), pd.get_dummies(log.filter(like="user_feature"))], axis=1)
    return Raw(
        users.to_numpy(np.float32),
        log["click"].to_numpy(np.int64),
        ("no click", "click"),
        extra={
            "action": log["item_id"].to_numpy(),
            "position": log["position"].to_numpy(),
            "propensity": log["propensity_score"].to_numpy(np.float32),
            "items": pd.get_dummies(items.set_index("item_id")).to_numpy(np.float32),
            "columns": tuple(users.columns),
        },
    )


# ---- series and signals ----


def series(files: Files, entry: Entry) -> Raw:
    """One long series, in the order of time; y is the next step."""
    found = frame(files, entry["file"], **entry.get("csv", {})).select_dtypes("number")
    x = found.to_numpy(np.float32)
    names = {"columns": tuple(map(str, found.columns))}
    return Raw(x, rows=official(*entry["sizes"]) if "sizes" in entry else None, extra=names)


def ts(files: Files, entry: Entry) -> Raw:
    """UCR/UEA archive: x (n, channels, length), shorter series filled up with 0; y a class or, by header, a number."""
    parts = [
        files.text(f"{entry['variant']}_{part}.ts").lower().partition("@data")[2].split() for part in ("TRAIN", "TEST")
    ]
    rows = [line.split(":") for part in parts for line in part]
    signals = [[np.array(channel.split(","), np.float32) for channel in row[:-1]] for row in rows]
    length = [len(signal[0]) for signal in signals]
    x = np.zeros((len(rows), len(signals[0]), max(length)), np.float32)
    for i, signal in enumerate(signals):
        x[i, :, : length[i]] = signal
    numeric = entry.get("target") == "number"
    y, classes = (np.array([row[-1] for row in rows], np.float32), ()) if numeric else codes([row[-1] for row in rows])
    return Raw(x, y, classes, official(*map(len, parts)), extra={"length": np.array(length)})


def spoken(files: Files, entry: Entry) -> Raw:
    """Spoken digits at 8 kHz: x (n, 8000) in -1..1, cut or filled up to one second; official test: takes 0 to 4."""
    names = files.names("recordings/*.wav")
    digit, speaker, take = zip(*(re.fullmatch(r"(\d)_(\w+)_(\d+)", n.rsplit("/", 1)[1][:-4]).groups() for n in names))
    x = np.zeros((len(names), 8000), np.float32)
    for row, name in zip(x, names):
        with wave.open(files.stream(name)) as sound:
            signal = np.frombuffer(sound.readframes(8000), "<i2") / np.float32(32768)
        row[: len(signal)] = signal
    test = np.array(take, int) < 5
    who, speakers = codes(speaker)
    rows = (np.flatnonzero(~test), None, np.flatnonzero(test))
    return Raw(x, np.array(digit, np.int64), tuple("0123456789"), rows, extra={"speaker": who, "speakers": speakers})


def events(files: Files, entry: Entry) -> Raw:
    """N-MNIST: x (n, 2 polarities, 10 steps of 31 ms, 34, 34) counts of events, 5 bytes each in the file."""
    lists = [np.loadtxt(files.stream(f"{part}.txt"), int) for part in ("train1K", "test100")]
    number, y = np.concatenate(lists).T
    x = np.zeros((len(number), 2, 10, 34, 34), np.uint8)
    for image, n in zip(x, number):
        e = np.frombuffer(files.read(f"{n}.bs2"), np.uint8).reshape(-1, 5).astype(int)
        step = (((e[:, 2] & 127) << 16) | (e[:, 3] << 8) | e[:, 4]) // 31_000
        np.add.at(image, (e[:, 2] >> 7, np.minimum(step, 9), e[:, 1].clip(max=33), e[:, 0].clip(max=33)), 1)
    return Raw(x, y, tuple("0123456789"), official(*map(len, lists)))


def eeg(files: Files, entry: Entry) -> Raw:
    """Motor imagery: x (trials, 64 channels, 640) in microvolt, 4 s from the cue at 160 Hz; y left or right fist."""
    edfio = library("edfio")
    x, y = [], []
    for run in entry["runs"]:
        recording = edfio.read_edf(files.stream(f"S001R{run:02}.edf"))
        signal = np.stack([s.data for s in recording.signals])
        for note in recording.annotations:
            start = round(note.onset * 160)
            if note.text in ("T1", "T2") and start + 640 <= signal.shape[1]:
                x.append(signal[:, start : start + 640])
                y.append(int(note.text == "T2"))
    return Raw(np.stack(x).astype(np.float32), np.array(y), tuple(entry["classes"]))


def library(name: str):
    """An optional library, or one line that says how to get it."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise DataError(f"this set is read by {name}, which is not installed: pip install {name}") from None


def spikes(files: Files, entry: Entry) -> Raw:
    """x (trials, 500 bins of 1 ms): number of the cell that fired, 0 = none; y the sound that was played."""
    found = frame(files, f"{entry['variant']}.csv")
    role = found.pop("role").to_numpy()
    y = found.pop("sound_ID").to_numpy()
    rows = tuple(np.flatnonzero(role == part) for part in ("train", "val", "test"))
    return Raw(found.to_numpy(np.int32), np.unique(y, return_inverse=True)[1], tuple(map(str, np.unique(y))), rows)


def brain(files: Files, entry: Entry) -> Raw:
    """fMRI at rest: x (11 subjects, 94 regions, 355 scans), y the subject; extra: mean fibre counts and lengths."""
    x = np.stack([matlab(files, name)["tc"] for name in files.names("*_tc.mat")]).astype(np.float32)
    extra = {"connections": matlab(files, "Cmat_avg.mat")["sc"], "lengths": matlab(files, "Dmat_avg.mat")["len"]}
    return Raw(x, np.arange(len(x)), extra={k: v.astype(np.float32) for k, v in extra.items()})


# ---- fields ----


def solution(files: Files, entry: Entry) -> Raw:
    """A solution of an equation on a grid: x (points, 2) time and place (or two places), y (points, 1 or 2) its value."""
    found = matlab(files, entry["file"])
    if "w" in found:
        x, y = np.stack([found["x"][0], found["y"][0]], 1), found["w"].T
    else:
        t, place = (found[k].ravel() for k in entry["axes"])
        x = np.stack(np.meshgrid(t, place, indexing="ij"), -1).reshape(-1, 2)
        u = found[entry["values"]].T.reshape(-1, 1)
        y = np.hstack([u.real, u.imag]) if np.iscomplexobj(u) else u
    return Raw(x.astype(np.float32), y.astype(np.float32))


def operator(files: Files, entry: Entry) -> Raw:
    """Pairs of functions on a grid: coefficient and solution (Darcy), first state and all later ones (Burgers)."""
    parts = [arrays(files, f"{entry['variant']}_{part}.npz") for part in ("train_16", "test_16")]
    x, y = (np.concatenate([part[k] for part in parts]).astype(np.float32) for k in "xy")
    extra = {}
    if entry["variant"] == "darcy":
        fine = arrays(files, "darcy_test_32.npz")
        extra = {"x 32": fine["x"].astype(np.float32), "y 32": fine["y"].astype(np.float32)}
    return Raw(x, y, (), official(*(len(part["x"]) for part in parts)), extra=extra)


# ---- graphs ----


def nodes(features, y, edges, rows=None, classes=(), **extra) -> Raw:
    """Node classification: x numbers of nodes; extra["features"] (nodes, f), extra["edges"] (2, both directions)."""
    both = np.concatenate([edges, edges[::-1]], axis=1)
    both = np.unique(both[:, both[0] != both[1]], axis=1).astype(np.int64)
    extra = {"features": features.astype(np.float32), "edges": both} | extra
    return Raw(np.arange(len(y)), y.astype(np.int64), classes, rows, extra=extra)


def csr(data, indices, indptr, shape) -> np.ndarray:
    """Dense matrix of a compressed one; numbers that point outside are a ValueError."""
    n, width = map(int, shape)
    if (
        n * width > 1 << 28
        or len(indptr) != n + 1
        or (np.diff(indptr) < 0).any()
        or len(data) != len(indices)
        or indptr[-1] != len(data)
    ):
        raise ValueError("a sparse matrix whose parts do not fit")
    dense = np.zeros((n, width), np.float32)
    np.add.at(dense, (np.repeat(np.arange(n), np.diff(indptr)), indices), data)
    return dense


def graph_npz(files: Files, entry: Entry) -> Raw:
    found = arrays(files, f"{entry['variant']}.npz")
    part = {k: csr(*(found[f"{k}_{p}"] for p in ("data", "indices", "indptr", "shape"))) for k in ("adj", "attr")}
    return nodes(
        part["attr"], found["labels"], np.stack(part["adj"].nonzero()), classes=tuple(found["class_names"].tolist())
    )


def webgraph(files: Files, entry: Entry) -> Raw:
    """Geom-GCN's graphs: split 0 of ten; extra["splits"] (10, nodes) is 0 train, 1 validation, 2 test."""
    name = entry["variant"]
    table = [line.split("\t") for line in files.text(f"{name}/out1_node_feature_label.txt").splitlines()[1:]]
    table.sort(key=lambda row: int(row[0]))
    values = [np.array(row[1].split(","), int) for row in table]
    if name == "film":  # numbers of the words that occur
        features = np.zeros((len(table), 932))
        for line, value in zip(features, values):
            line[value] = 1
    else:
        features = np.stack(values)
    edges = np.loadtxt(files.stream(f"{name}/out1_graph_edges.txt"), int, skiprows=1).T
    found = [arrays(files, f"{name}_split_0.6_0.2_{i}.npz") for i in range(10)]
    splits = np.stack(
        [
            s["val_mask"] + 2 * s["test_mask"] + 3 * (s["train_mask"] + s["val_mask"] + s["test_mask"] == 0)
            for s in found
        ]
    )
    rows = tuple(np.flatnonzero(splits[0] == part) for part in range(3))
    return nodes(features, np.array([int(row[2]) for row in table]), edges, rows, splits=splits.astype(np.int64))


def planetoid(files: Files, entry: Entry) -> Raw:
    """Cora and Citeseer with the usual split: 20 a class to train on, 500 to validate, 1,000 to test."""
    part = {k: stored(files.read(f"ind.{entry['variant']}.{k}")) for k in ("allx", "ally", "tx", "ty", "y", "graph")}
    test = np.array(files.text(f"ind.{entry['variant']}.test.index").split(), int)
    n, known = len(part["graph"]), len(part["ally"])
    features, onehot = np.zeros((n, part["allx"].shape[1])), np.zeros((n, part["ally"].shape[1]))
    features[:known], onehot[:known] = part["allx"], part["ally"]
    features[test], onehot[test] = part["tx"], part["ty"]
    edges = np.array([(a, b) for a, near in part["graph"].items() for b in near]).T
    train = len(part["y"])
    rows = (np.arange(train), np.arange(train, train + 500), test)
    return nodes(features, onehot.argmax(1), edges, rows)


def stored(content: bytes) -> Any:
    """Arrays, sparse matrices and adjacency lists of Planetoid's files, which are pickles - without unpickling.

    ``pickletools`` only lists the instructions; the few that these files use are carried out here on plain values. No
    name in the file is ever looked up or called, so a file cannot run anything.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    marks: list[int] = []

    def from_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for op, argument, _ in pickletools.genops(content):
        name = op.name
        if name in ("PROTO", "STOP"):
            continue
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "BINSTRING"):
            stack.append(argument)
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name == "GLOBAL":
            stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
        elif name == "TUPLE":
            stack.append(tuple(from_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("REDUCE", "NEWOBJ"):  # "call": keep what would be called, and with what
            arguments, called = stack.pop(), stack.pop()
            stack.append({} if called == "collections defaultdict" else {"call": called, "with": arguments})
        elif name == "BUILD":
            state = stack.pop()
            stack[-1]["state"] = state
        elif name == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif name == "APPENDS":
            items = from_mark()
            stack[-1].extend(items)
        elif name == "SETITEMS":
            items = from_mark()
            stack[-1].update(zip(items[::2], items[1::2]))
        else:
            raise ValueError(f"unexpected instruction {name}")
    (value,) = stack
    return value if "call" not in value else rebuilt(value)


def rebuilt(value: dict[str, Any]) -> np.ndarray:
    """The array or the sparse matrix (made dense) that such a description stands for."""
    if value["call"] == "scipy.sparse.csr csr_matrix":
        state = value["state"]
        return csr(*(rebuilt(state[k]) for k in ("data", "indices", "indptr")), state["_shape"])
    _, shape, kind, fortran, text = value["state"]
    code = str(kind["with"][0])
    if not re.fullmatch(r"[iuf][1248]", code) or fortran:
        raise ValueError(f"unexpected array of type {code}")
    return np.frombuffer(text.encode("latin-1"), f"<{code}").reshape(shape)


def whole_graphs(files: Files, entry: Entry) -> Raw:
    """Graph classification: x numbers of graphs; extra: "features" (nodes, tags) one-hot, "edges", "graph" of each node."""
    tokens = iter(files.text(f"{entry['variant']}.txt").splitlines())
    y, tags, graph, edges = [], [], [], []
    for g in range(int(next(tokens))):
        n, label = map(int, next(tokens).split())
        y.append(label)
        first = len(tags)
        for i in range(n):
            tag, count, *near = map(int, next(tokens).split()[: 2 + n])
            tags.append(tag)
            graph.append(g)
            edges += [(first + i, first + j) for j in near[:count]]
    kinds, tag = np.unique(tags, return_inverse=True)
    labels, classes = codes(y)
    raw = nodes(np.eye(len(kinds))[tag], tag, np.array(edges).T, graph=np.array(graph))
    return raw._replace(x=np.arange(len(y)), y=labels, classes=classes)
